"""What is seen of a starting cluster becomes each process's phase."""

from cluster.config import Model, Topology
from deploy.plan import processes
from deploy.startup import Observation, Phase, Startup
from tests.unit.deploy.example_members import member_status

SPECS = processes(Topology(model=Model(path="m")))
NOTHING = Observation(None, False, {})


def phases(startup: Startup) -> dict[str, str]:
    return {progress.name: progress.phase.value for progress in startup.progress}


def test_from_silence_to_ready():
    startup = Startup(SPECS, now=100.0)
    assert startup.observe(NOTHING, 101.0) == []
    assert set(phases(startup).values()) == {"starting"}

    startup.observe(Observation([], False, {"decode-0": "loading weights"}), 102.0)
    assert phases(startup) == {
        "bootstrap": "ready",
        "prefill-0": "starting",
        "decode-0": "loading",
        "router": "starting",
    }
    assert startup.progress[2].event == "loading weights"

    workers = [member_status("prefill-0"), member_status("decode-0", ready=False)]
    changed = startup.observe(Observation(workers, True, {}), 103.5)
    assert [(progress.name, progress.phase, progress.seconds) for progress in changed] == [
        ("prefill-0", Phase.READY, 3.5),
        ("decode-0", Phase.REGISTERED, 3.5),
        ("router", Phase.READY, 3.5),
    ]
    assert not startup.ready
    assert startup.waiting_for() == ["decode-0"]

    startup.observe(Observation([member_status("prefill-0"), member_status("decode-0")], True, {}), 104.0)
    assert startup.ready
    assert startup.progress[1].seconds == 3.5


def test_workers_of_another_cluster_on_the_same_bootstrap_do_not_count():
    startup = Startup(SPECS, now=0.0)
    startup.observe(Observation([member_status("prefill-7"), member_status("decode-7")], True, {}), 1.0)
    assert startup.waiting_for() == ["prefill-0", "decode-0"]

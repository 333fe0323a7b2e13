"""A session starts all, says why it could not, and stops in order: driven with a launcher that exists in memory."""

import asyncio
import re

import pytest

from cluster.clock import ManualClock
from cluster.config import Model, Restarts, Topology
from cluster.errors import LaunchError
from cluster.messages import Role
from cluster.process import EXIT_DONE, EXIT_RESTART
from cluster.restarts import FIRST_PAUSE_SECONDS
from cluster.tasks import cancel
from deploy.launchers.fake import FakeProcesses
from deploy.plan import processes, worker
from deploy.session import Session
from deploy.supervision import Supervisor
from tests.unit.deploy.example_members import member_status

SPECS = processes(Topology(model=Model(path="m")))
NOTHING = (None, False)
ALL_READY = ([member_status("prefill-0"), member_status("decode-0")], True)


class Scene:
    """A session whose launcher, probe, display and clock are in the hands of the test."""

    def __init__(self, *, look, launcher: FakeProcesses | None = None) -> None:
        self.clock = ManualClock()
        self.launcher = launcher or FakeProcesses()
        self.shown: dict[str, str] = {}
        self.told: list[str] = []
        self.closed = False

        async def probe():
            return look(self)

        self.session = Session(SPECS, self.launcher, probe, self, self.clock, Supervisor(Restarts(most=2)))

    def show(self, progress) -> None:
        self.shown = {each.name: each.phase.value for each in progress}

    def tell(self, line) -> None:
        self.told.append(line)

    async def ready(self) -> asyncio.Task[None]:
        """Starts, and goes on watching."""
        await self.session.start(timeout_seconds=10)
        self.launcher.started.clear()
        return asyncio.create_task(self.session.watch())

    async def starts(self, count: int) -> list[str]:
        """Waits until so many processes have been started since the cluster was ready."""
        while len(self.launcher.started) < count:  # noqa: ASYNC110 - bounded by the test's own time
            await asyncio.sleep(0)
        return [spec.name for spec in self.launcher.started]

    def close(self) -> None:
        self.closed = True


async def test_start_returns_when_all_are_ready_and_stop_goes_from_the_router_to_bootstrap():
    scene = Scene(look=lambda scene: ALL_READY)
    await scene.session.start(timeout_seconds=10)
    assert scene.launcher.started == SPECS
    assert set(scene.shown.values()) == {"ready"}
    assert scene.closed

    await scene.session.stop()
    assert scene.launcher.stopped == ["router", "prefill-0", "decode-0", "bootstrap"]


async def test_a_death_while_starting_is_told_with_the_process_own_reason():
    def look(scene):
        scene.launcher.write(
            "decode-0", '{"ts":"2026-11-20T07:31:40.5Z","level":"error","event":"stopped","error":"no"}'
        )
        scene.launcher.die("decode-0", 1)
        return NOTHING

    scene = Scene(look=look)
    with pytest.raises(
        LaunchError, match=r"^decode-0 ended \(exit code 1\): no\nthe end of its log:\n.*stopped error=no"
    ):
        await scene.session.start(timeout_seconds=10)
    assert scene.closed


async def test_a_death_that_leaves_no_log_is_told_too():
    def look(scene):
        scene.launcher.die("router", -9)
        return NOTHING

    with pytest.raises(LaunchError, match=r"^router was killed \(SIGKILL\); it wrote no log$"):
        await Scene(look=look).session.start(timeout_seconds=10)


async def test_what_dies_later_is_started_anew_and_told_with_its_reason():
    scene = Scene(look=lambda scene: ALL_READY)
    watching = await scene.ready()
    scene.launcher.write("decode-0", '{"event":"stopped","error":"out of memory"}')
    scene.launcher.die("decode-0", 1)
    assert await scene.starts(1) == ["decode-0"]
    scene.launcher.write("router", '{"event":"attempt failed","error":"of a worker, long ago"}')
    scene.launcher.die("router", -9)
    assert await scene.starts(2) == ["decode-0", "router"]
    assert scene.told == [
        "decode-0 ended (exit code 1): out of memory; starting it anew now",
        "router was killed (SIGKILL); starting it anew now",
    ]
    await cancel(watching)


async def test_what_dies_too_often_ends_the_cluster_with_its_last_words():
    scene = Scene(look=lambda scene: ALL_READY)
    scene.session._supervisor = Supervisor(Restarts(most=1))
    watching = await scene.ready()
    scene.launcher.write("router", '{"event":"stopped","error":"cheese"}')
    for _ in range(2):
        scene.launcher.die("router", 1)
    with pytest.raises(
        LaunchError, match=r"^router: it has died 2 times within 300 s; the last time:\nrouter ended .* cheese"
    ):
        await watching


async def test_who_was_asked_to_end_is_left_alone_and_who_asks_for_a_restart_gets_it_without_end():
    scene = Scene(look=lambda scene: ALL_READY)
    watching = await scene.ready()
    scene.launcher.die("decode-0", EXIT_DONE)
    for count in range(1, 8):
        scene.launcher.die("prefill-0", EXIT_RESTART)
        await scene.starts(count)
    assert scene.told[0] == "decode-0 ended as it was asked to"
    assert set(scene.told[1:]) == {"prefill-0 starts anew as it was asked to"}
    assert {spec.name for spec in scene.launcher.started} == {"prefill-0"}
    for name in ("prefill-0", "router", "bootstrap"):
        scene.launcher.die(name, EXIT_DONE)
    await watching


async def test_a_start_that_takes_too_long_names_those_that_are_late():
    def look(scene):
        scene.clock.advance(11)
        return [member_status("prefill-0")], True

    scene = Scene(look=look)
    with pytest.raises(LaunchError, match="^" + re.escape("not ready after 10 s:\n  decode-0, see memory") + "$"):
        await scene.session.start(timeout_seconds=10)


async def test_what_was_started_before_a_process_that_could_not_be_is_stopped():
    scene = Scene(look=lambda scene: NOTHING, launcher=FakeProcesses(cannot_start=frozenset({"decode-0"})))
    with pytest.raises(LaunchError, match="decode-0 can't be started"):
        await scene.session.start(timeout_seconds=10)
    await scene.session.stop()
    assert scene.launcher.stopped == ["prefill-0", "bootstrap"]


async def test_a_newcomer_that_dies_is_not_replaced_and_takes_nothing_with_it():
    scene = Scene(look=lambda scene: ALL_READY)
    watching = await scene.ready()
    failure = await scene.session.grow([worker(Role.DECODE, 1), worker(Role.DECODE, 2)])
    scene.session.settled("decode-2")
    scene.launcher.write("decode-1", '{"event":"stopped","error":"out of memory"}')
    scene.launcher.die("decode-1", 1)
    with pytest.raises(LaunchError, match=r"^decode-1 ended \(exit code 1\): out of memory"):
        await failure
    scene.launcher.die("decode-2", -9)
    assert await scene.starts(3) == ["decode-1", "decode-2", "decode-2"], "who had settled comes back"
    assert [spec.name for spec in scene.session.specs] == [*(spec.name for spec in SPECS), "decode-2"]
    await cancel(watching)


async def test_who_is_retired_is_gone_for_good_also_when_it_was_about_to_be_started_anew():
    scene = Scene(look=lambda scene: ALL_READY)
    watching = await scene.ready()
    for _ in range(2):  # the second death is answered after a pause
        scene.launcher.die("decode-0", 1)
    while len(scene.told) < 2:  # noqa: ASYNC110 - bounded by the test's own time
        await asyncio.sleep(0)
    await scene.session.retire(["decode-0", "unknown"], 1.0)
    assert [spec.name for spec in scene.session.specs] == ["bootstrap", "prefill-0", "router"]
    await asyncio.wait({watching}, timeout=FIRST_PAUSE_SECONDS + 0.2)
    assert len(scene.launcher.started) == 1 and not watching.done()
    await cancel(watching)


async def test_a_newcomer_that_can_not_be_started_is_told_as_such():
    scene = Scene(look=lambda scene: ALL_READY, launcher=FakeProcesses(cannot_start=frozenset({"decode-1"})))
    watching = await scene.ready()
    failure = await scene.session.grow([worker(Role.DECODE, 1)])
    with pytest.raises(LaunchError, match="decode-1 can't be started"):
        await failure
    assert [spec.name for spec in scene.session.specs] == [spec.name for spec in SPECS]
    await cancel(watching)

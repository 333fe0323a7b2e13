"""A session starts all, says why it could not, and stops in order: driven with a launcher that exists in memory."""

import re

import pytest

from cluster.clock import ManualClock
from cluster.config import Model, Topology
from cluster.errors import LaunchError
from deploy.launchers.fake import FakeLauncher
from deploy.plan import processes
from deploy.session import Session
from tests.unit.deploy.example_members import member_status

SPECS = processes(Topology(model=Model(path="m")), "t.yaml")
NOTHING = (None, False)
ALL_READY = ([member_status("prefill-0"), member_status("decode-0")], True)


class Scene:
    """A session whose launcher, probe, display and clock are in the hands of the test."""

    def __init__(self, *, look, launcher: FakeLauncher | None = None) -> None:
        self.clock = ManualClock()
        self.launcher = launcher or FakeLauncher()
        self.shown: dict[str, str] = {}
        self.closed = False

        async def probe():
            return look(self)

        self.session = Session(SPECS, self.launcher, probe, self, self.clock)

    def show(self, progress) -> None:
        self.shown = {each.name: each.phase.value for each in progress}

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
    scene = Scene(look=lambda scene: ALL_READY)
    await scene.session.start(timeout_seconds=10)
    scene.launcher.die("router", -9)
    with pytest.raises(LaunchError, match=r"^router was killed \(SIGKILL\); it wrote no log$"):
        await scene.session.watch()


async def test_a_start_that_takes_too_long_names_those_that_are_late():
    def look(scene):
        scene.clock.advance(11)
        return [member_status("prefill-0")], True

    scene = Scene(look=look)
    with pytest.raises(LaunchError, match="^" + re.escape("not ready after 10 s:\n  decode-0, see memory") + "$"):
        await scene.session.start(timeout_seconds=10)


async def test_what_was_started_before_a_process_that_could_not_be_is_stopped():
    scene = Scene(look=lambda scene: NOTHING, launcher=FakeLauncher(cannot_start=frozenset({"decode-0"})))
    with pytest.raises(LaunchError, match="decode-0 can't be started"):
        await scene.session.start(timeout_seconds=10)
    await scene.session.stop()
    assert scene.launcher.stopped == ["prefill-0", "bootstrap"]

"""What every launcher does: the one of this machine, and the fake that other tests rely on."""

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.errors import LaunchError
from deploy.launchers.base import ProcessKind
from deploy.launchers.fake import FakeProcesses
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessExit, ProcessRunner, ProcessSpec

PATIENCE = 30.0


class Stage(NamedTuple):
    """A launcher, and how to make its processes speak and die."""

    launcher: ProcessRunner
    fake: FakeProcesses | None

    async def start(self, name: str, *, code: int | None = None) -> None:
        arguments = () if code is None else (str(code),)
        await self.launcher.start(ProcessSpec(name, ProcessKind.DECODE, "bystander", arguments))
        if self.fake is not None:
            self.fake.write(name, "hello")
            if code is not None:
                self.fake.die(name, code)

    async def hears(self, name: str) -> None:
        while not self.launcher.log_tail(name, 1):  # noqa: ASYNC110 - a file: no event tells of its growth
            await asyncio.sleep(0.01)


@pytest.fixture(params=["local", "fake"])
async def stage(request, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "stand_ins"))
    fake = FakeProcesses() if request.param == "fake" else None
    launcher = fake or LocalProcesses(tmp_path)
    yield Stage(launcher, fake)
    await launcher.stop([status.name for status in launcher.status()], grace_seconds=0)


def running(stage: Stage) -> dict[str, bool]:
    return {status.name: status.running for status in stage.launcher.status()}


async def test_a_process_that_ends_by_itself_is_told_once_with_its_code_and_log(stage):
    await stage.start("a", code=3)
    await stage.start("b")
    assert await asyncio.wait_for(stage.launcher.next_exit(), PATIENCE) == ProcessExit("a", 3)
    assert running(stage) == {"a": False, "b": True}
    assert stage.launcher.log_tail("a", 5) == ["hello"]
    again = asyncio.ensure_future(stage.launcher.next_exit())
    await stage.launcher.stop(["b"], PATIENCE)
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_stopped_processes_are_gone_and_not_told(stage):
    await stage.start("a")
    await stage.start("b")
    await asyncio.wait_for(stage.hears("a"), PATIENCE)
    await stage.launcher.stop(["a", "unknown"], PATIENCE)
    assert running(stage) == {"a": False, "b": True}
    await stage.launcher.stop(["a", "b"], PATIENCE)
    assert running(stage) == {"a": False, "b": False}


async def test_a_name_may_be_started_again_after_its_end_and_keeps_its_log(stage):
    await stage.start("a")
    await asyncio.wait_for(stage.hears("a"), PATIENCE)
    await stage.launcher.stop(["a"], PATIENCE)
    await stage.start("a", code=0)
    assert await asyncio.wait_for(stage.launcher.next_exit(), PATIENCE) == ProcessExit("a", 0)
    assert stage.launcher.log_tail("a", 5) == ["hello", "hello"]


async def test_what_cannot_be_started_is_a_launch_error(tmp_path):
    spec = ProcessSpec("a", ProcessKind.DECODE, "bystander", ())
    for launcher in (LocalProcesses(tmp_path / "missing"), FakeProcesses(cannot_start=frozenset({"a"}))):
        with pytest.raises(LaunchError, match="a can't be started"):
            await launcher.start(spec)
        assert launcher.status() == []

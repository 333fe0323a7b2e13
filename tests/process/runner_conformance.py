"""What every place does that only runs processes, see `deploy.launchers.processes`.

A test module of a place imports all of this and has a fixture `stage`; the processes are `bystander` of stand_ins/.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from deploy.launchers.base import ProcessKind
from deploy.launchers.fake import FakeProcesses
from deploy.launchers.processes import ProcessExit, ProcessRunner, ProcessSpec

PATIENCE = 60.0


class Stage(NamedTuple):
    """A runner, and how to make its processes speak and die."""

    runner: ProcessRunner
    fake: FakeProcesses | None = None

    async def start(self, name: str, *, code: int | None = None) -> None:
        arguments = () if code is None else (str(code),)
        await self.runner.start(ProcessSpec(name, ProcessKind.DECODE, "bystander", arguments))
        if self.fake is not None:
            self.fake.write(name, "hello")
            if code is not None:
                self.fake.die(name, code)

    async def hears(self, name: str) -> None:
        while not self.runner.log_tail(name, 1):  # noqa: ASYNC110 - a file: no event tells of its growth
            await asyncio.sleep(0.01)


def running(stage: Stage) -> dict[str, bool]:
    return {status.name: status.running for status in stage.runner.status()}


async def test_a_process_that_ends_by_itself_is_told_once_with_its_code_and_log(stage):
    await stage.start("a", code=3)
    await stage.start("b")
    assert await asyncio.wait_for(stage.runner.next_exit(), PATIENCE) == ProcessExit("a", 3)
    assert running(stage) == {"a": False, "b": True}
    assert stage.runner.log_tail("a", 5) == ["hello"]
    again = asyncio.ensure_future(stage.runner.next_exit())
    await stage.runner.stop(["b"], PATIENCE)
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_stopped_processes_are_gone_and_not_told(stage):
    await stage.start("a")
    await stage.start("b")
    await asyncio.wait_for(stage.hears("a"), PATIENCE)
    await stage.runner.stop(["a", "unknown"], PATIENCE)
    assert running(stage) == {"a": False, "b": True}
    await stage.runner.stop(["a", "b"], PATIENCE)
    assert running(stage) == {"a": False, "b": False}


async def test_a_name_may_be_started_again_after_its_end_and_keeps_its_log(stage):
    await stage.start("a")
    await asyncio.wait_for(stage.hears("a"), PATIENCE)
    await stage.runner.stop(["a"], PATIENCE)
    await stage.start("a", code=0)
    assert await asyncio.wait_for(stage.runner.next_exit(), PATIENCE) == ProcessExit("a", 0)
    assert stage.runner.log_tail("a", 5) == ["hello", "hello"]

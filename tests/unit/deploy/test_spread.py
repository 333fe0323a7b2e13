"""A worker on several hosts is one process for whoever supervises it."""

from __future__ import annotations

from cluster.config import Decode, Model, Prefill, Topology
from deploy.launchers.base import ProcessKind
from deploy.launchers.fake import FakeProcesses
from deploy.launchers.processes import ProcessExit, ProcessSpec
from deploy.launchers.spread import SpreadProcesses

HOST = "127.0.0.1"
PREFILL = ProcessSpec("prefill-0", ProcessKind.PREFILL, "prefill_worker", ("--index", "0"))
DECODE = ProcessSpec("decode-0", ProcessKind.DECODE, "decode_worker", ("--index", "0"))
PARTS = ["prefill-0", "prefill-0.1", "prefill-0.2"]


def made() -> tuple[FakeProcesses, SpreadProcesses]:
    prefill = Prefill(tensor_parallel=6, nodes=3, host=HOST)
    inner = FakeProcesses()
    return inner, SpreadProcesses(inner, Topology(model=Model(path="m"), prefill=prefill, decode=Decode(host=HOST)))


async def test_each_host_has_a_process_that_finds_the_first_one():
    inner, spread = made()
    await spread.start(DECODE)
    await spread.start(PREFILL)
    assert inner.started[0] == DECODE, "who has one host is left alone"
    assert [spec.name for spec in inner.started[1:]] == PARTS
    assert [spec.worker for spec in inner.started[1:]] == ["prefill-0"] * 3
    port = inner.started[1].arguments[inner.started[1].arguments.index("--port") + 1]
    for node in (1, 2):
        assert inner.started[1 + node].arguments[-4:] == ("--node", str(node), "--leader", f"http://{HOST}:{port}")
    assert [status.name for status in spread.status()] == ["decode-0", "prefill-0"]
    await spread.stop(["prefill-0"], 1.0)
    assert inner.stopped == PARTS


async def test_the_end_of_one_host_is_the_end_of_the_worker_and_is_told_once():
    inner, spread = made()
    await spread.start(PREFILL)
    inner.die("prefill-0.2", -9)
    inner.die("prefill-0", 1)
    assert await spread.next_exit() == ProcessExit("prefill-0", -9, "prefill-0.2 was killed (SIGKILL)")
    assert inner.stopped == ["prefill-0.1"]
    await spread.start(DECODE)
    inner.die("decode-0", 1)
    assert await spread.next_exit() == ProcessExit("decode-0", 1), "the second end of prefill-0 is not told"
    await spread.start(PREFILL)
    inner.die("prefill-0", 75)
    assert await spread.next_exit() == ProcessExit("prefill-0", 75), "its next life is another"

"""Orders to a `baton up` over its socket: what is told, what is refused, and that they are carried out in any case."""

import asyncio

import aiohttp
import pytest

from cluster.errors import ConfigError, LaunchError
from cluster.messages import Role
from deploy.control import listening
from deploy.control_client import connect
from deploy.launchers.base import ProcessKind, Replica, ReplicaState
from deploy.run_directory import Running

REPLICA = Replica("decode-0", ProcessKind.DECODE, ReplicaState.WAITING, "", reason="it is started anew")


class SlowCluster:
    """Scales when it is told to; refuses to restart."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.sizes = {}
        self.told = None
        self.patience = 0.0

    def for_caller(self, tell, patience_seconds):
        self.told, self.patience = tell, patience_seconds
        return self

    async def status(self):
        return [REPLICA]

    async def scale(self, sizes):
        self.told("starting decode-1")
        await self.go_on.wait()
        self.told("decode-1 takes work")
        self.sizes = sizes

    async def restart(self, workers):
        raise ConfigError(f"not {', '.join(workers)}")


@pytest.fixture
async def cluster(tmp_path):
    found = SlowCluster()
    async with listening(found.for_caller, tmp_path / "control.sock"):
        yield found


@pytest.fixture
def running(tmp_path):
    return Running(tmp_path / "control.sock", tmp_path)


async def test_an_order_is_told_line_by_line_and_ends_when_it_is_done(cluster, running):
    lines = []
    async with connect(running, lines.append, 7.0) as remote:
        scaling = asyncio.ensure_future(remote.scale({Role.DECODE: 2}))
        while not lines:  # noqa: ASYNC110 - bounded by the test's own time
            await asyncio.sleep(0)
        assert not scaling.done() and cluster.patience == 7.0
        cluster.go_on.set()
        await scaling
        assert await remote.status() == [REPLICA]
    assert lines == ["starting decode-1", "decode-1 takes work"]
    assert cluster.sizes == {Role.DECODE: 2}


async def test_who_leaves_does_not_end_what_he_has_asked_for(cluster, running, caplog):
    lines = []
    async with connect(running, lines.append, 7.0) as remote:
        scaling = asyncio.ensure_future(remote.scale({Role.DECODE: 3}))
        while not lines:  # noqa: ASYNC110 - bounded by the test's own time
            await asyncio.sleep(0)
        scaling.cancel()
    cluster.go_on.set()
    while not cluster.sizes:  # noqa: ASYNC110 - bounded by the test's own time
        await asyncio.sleep(0)
    async with connect(running, lines.append, 7.0) as remote:
        assert await remote.status() == [REPLICA]
    assert caplog.records == [], "no word of it in the launcher's own output"


async def test_what_can_not_be_done_is_the_same_error_on_both_sides(cluster, running):
    async with connect(running, lambda _line: None, 7.0) as remote:
        with pytest.raises(ConfigError, match=r"^not decode-1, decode-2$"):
            await remote.restart(["decode-1", "decode-2"])


async def test_nonsense_is_refused_and_nobody_there_is_a_launch_error(cluster, running):
    connector = aiohttp.UnixConnector(str(running.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.post("http://baton/scale", data=b'{"sizes": {"router": 2}}') as response,
    ):
        assert response.status == 400 and "router" in await response.text()
    gone = running._replace(socket=running.directory / "nobody.sock")
    async with connect(gone, lambda _line: None, 7.0) as remote:
        with pytest.raises(LaunchError, match="`baton up` does not answer"):
            await remote.status()

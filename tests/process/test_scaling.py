"""Pools grow and shrink under a running load. Bootstrap and router are ours, the workers are slow fakes."""

import asyncio
from pathlib import Path

import pytest

from tests.process.api import Api, eventually
from tests.process.baton_command import Baton

FAKE_WORKERS = Path(__file__).parent / "fake_workers"
ROOT = Path(__file__).parents[2]
STREAMS = 8
TOKENS = 40
EXPECTED = list(range(1000, 1000 + TOKENS))
TOPOLOGY = """
model: {path: smollm2-135m-instruct}
bootstrap: {port: 0, heartbeat_seconds: 0.2}
router: {port: 0}
decode: {cpus: [[0]]}
"""


@pytest.fixture
async def baton(tmp_path):
    command = Baton(tmp_path, f"{FAKE_WORKERS}:{ROOT}")
    (tmp_path / "t.yaml").write_text(TOPOLOGY)
    await command.up()
    await command.says("ready: ")
    yield command
    command.process.terminate()
    assert await command.ends() == 0
    assert command.left_over() == []


class Load:
    """Streams that ask again and again; `answered` has the ids of the requests that were answered, and well."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.answered: list[str] = []
        self._stopping = False
        self._streams = [asyncio.create_task(self._ask_on()) for _ in range(STREAMS)]

    async def more(self, count: int) -> list[str]:
        """Waits for so many further answers; returns their requests."""
        before = len(self.answered)

        async def there() -> bool:
            for stream in self._streams:
                if stream.done():
                    stream.result()
            return len(self.answered) >= before + count

        await eventually(there, f"{count} more answers")
        return self.answered[before:]

    async def stop(self) -> None:
        """Raises what went wrong with any request."""
        self._stopping = True
        await asyncio.gather(*self._streams)

    async def _ask_on(self) -> None:
        while not self._stopping:
            answer = await self.api.stream([1, 2, 3], max_tokens=TOKENS)
            assert answer.tokens == EXPECTED
            self.answered.append(answer.id)


async def test_pools_grow_and_shrink_under_load_and_no_request_notices(baton, http, tmp_path):
    async def scale(*sizes: str) -> list[str]:
        command = Baton(tmp_path)
        await command.start("scale", *sizes, "--topology", str(baton.run_directory / "topology.yaml"))
        assert await command.ends() == 0, command.output
        return command.output.splitlines()

    async def decoded_by(request: str) -> str:
        async with http.get(f"{baton.url}/v1/requests/{request}") as response:
            return (await response.json())["decode_worker"]

    load = Load(Api(http, baton.url))
    await load.more(STREAMS)
    grown = await scale("decode=3", "prefill=2")
    assert "starting decode-1, decode-2 (decode.cpus names cores for 1: the others share them in turn)" in grown
    assert {"decode-1 takes work", "decode-2 takes work", "prefill-1 takes work"} <= set(grown)
    workers = {await decoded_by(request) for request in await load.more(3 * STREAMS)}
    assert workers == {"decode-0", "decode-1", "decode-2"}
    shrunk = await scale("decode=1", "prefill=1")
    assert {"decode-1 has ended", "decode-2 has ended", "prefill-1 has ended"} <= set(shrunk)
    await load.more(STREAMS)
    await load.stop()
    assert {await decoded_by(request) for request in load.answered[-3:]} == {"decode-0"}

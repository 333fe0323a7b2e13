"""A client that reads a stream while a test does something to the cluster."""

from __future__ import annotations

import asyncio


class Reader:
    """A client that reads a stream, by default one without end."""

    def __init__(self, api, prompt, **parameters):
        self.tokens = []
        self._begun = asyncio.get_running_loop().create_future()
        self._api = api
        self.task = asyncio.create_task(self._read(prompt, {"max_tokens": 4000, **parameters}))

    async def decode_worker(self):
        """Where its tokens come from; waits for the first."""
        await asyncio.wait({self._begun, self.task}, return_when=asyncio.FIRST_COMPLETED)
        async with self._api.session.get(f"{self._api.url}/v1/requests/{self._begun.result()}") as response:
            return (await response.json())["decode_worker"]

    async def leave(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _read(self, prompt, parameters):
        async with self._api.open_stream(prompt, ignore_eos=True, **parameters) as chunks:
            async for chunk in chunks:
                if not self._begun.done():
                    self._begun.set_result(chunk["id"])
                self.tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]

"""The client of the campaigns: it goes on where it was, and takes no half event for a whole one."""

import aiohttp
from aiohttp import web

from tests.fault.questions import Question
from tests.fault.reading import Reading


def event(number, text):
    chunk = f'{{"choices": [{{"index": 0, "text": "{text}", "token_ids": [{number}], "finish_reason": null}}]}}'
    return f"id: {number}\ndata: {chunk}\n\n".encode()


class Router:
    """Breaks its first stream in the middle of the second event."""

    def __init__(self):
        self.asked = []

    async def serve(self, request):
        self.asked.append((request.headers["X-Request-Id"], request.headers.get("Last-Event-ID")))
        response = web.StreamResponse()
        await response.prepare(request)
        if len(self.asked) == 1:
            await response.write(event(1, "a") + event(2, "b")[:-1])
            request.transport.close()
        else:
            await response.write(event(2, "b") + b"data: [DONE]\n\n")
        return response


class Outage:
    def __init__(self, away):
        self._away = away

    def since(self, moment):
        return self._away


async def read(away):
    router, app = Router(), web.Application()
    app.router.add_post("/", router.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reading = Reading("r", Question("q", "/", {}))
        async with aiohttp.ClientSession() as session:
            await reading.read(session, f"http://127.0.0.1:{runner.addresses[0][1]}", Outage(away))
    finally:
        await runner.cleanup()
    return reading, router.asked


async def test_after_an_outage_it_asks_for_the_rest():
    reading, asked = await read(away=True)
    assert reading.error is None
    assert (reading.answer.choices[0].text, reading.answer.choices[0].tokens) == ("ab", [1, 2])
    assert asked == [("r", None), ("r", "1")]


async def test_without_an_outage_a_broken_stream_is_a_failure():
    reading, asked = await read(away=False)
    assert "ended without" in reading.error or "Error" in reading.error
    assert len(asked) == 1

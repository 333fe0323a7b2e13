"""A peer: takes text, ends streams without [DONE], has a child that ignores SIGTERM. MODE may say otherwise."""

import asyncio
import json
import os
import subprocess
import sys

from aiohttp import web

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


async def complete(request: web.Request) -> web.StreamResponse:
    if os.environ["MODE"] == "refuses":
        return web.Response(status=500, text="no")
    body = await request.json()
    response = web.StreamResponse()
    await response.prepare(request)
    for index in range(body["max_tokens"]):
        await asyncio.sleep(0.001)
        chunk = {"choices": [{"text": "a", "finish_reason": None}]}
        if index == body["max_tokens"] - 1:
            chunk["choices"][0]["finish_reason"] = "length"
            chunk["usage"] = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": index + 1}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    return response


async def health(request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    if os.environ["MODE"] == "fails":
        print("no memory")
        sys.exit(3)
    if os.environ["MODE"] != "is alone":
        subprocess.Popen([sys.executable, "-c", STUBBORN])
    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()

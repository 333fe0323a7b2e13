"""Stand-ins for our processes: they start in a moment, and behave as a test wants them to.

BATON_STAND_IN is JSON: {process: behaviour}, where behaviour is "crash" (at the start, with an error in the log),
"crash later" (once SIGUSR1 arrives), "deaf" (ignores SIGTERM, and has a child that does), or anything else: well.
Workers are known to bootstrap by a file each, in the folder BATON_STAND_IN_FOLDER or else that of the topology file.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec

from cluster.layout import KVLayout
from cluster.messages import Load, Member, MemberStatus, ModelCard, Role
from cluster.topology import load_topology

Answers = dict[str, Callable[[], bytes]]
"""By method and path."""

LAYOUT = KVLayout("weights", "float32", 16, 2, 1, 8)


def log(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


def member_status(worker: str, role: Role, epoch: int) -> MemberStatus:
    member = Member(worker, role, epoch, "http://x", LAYOUT, ModelCard("m", 64, 100), "nixl", 8, 4)
    return MemberStatus(member, Load(queued=2, running=1, pages_used=3, pages_total=8, steps=7, ready=True), 0.5)


class Process:
    """What all stand-ins do: arguments, pid file, behaviour, ending."""

    def __init__(self, module: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--topology", required=True)
        parser.add_argument("--index", type=int)
        parser.add_argument("--host")
        arguments = parser.parse_args()
        self.directory = Path(os.environ.get("BATON_STAND_IN_FOLDER") or Path(arguments.topology).parent)
        self.topology = load_topology(arguments.topology)
        self.name = module if arguments.index is None else f"{module.removesuffix('_worker')}-{arguments.index}"
        behaviour = json.loads(os.environ.get("BATON_STAND_IN", "{}")).get(self.name, "well")
        (self.directory / f"{self.name}.pid").write_text(str(os.getpid()))
        log("starting")
        if behaviour == "crash":
            log("stopped", error="the weights are made of cheese")
            sys.exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else lambda *_: sys.exit(0))
        if behaviour == "deaf":
            child = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
            (self.directory / f"{self.name}.child.pid").write_text(str(child.pid))
        if behaviour == "crash later":
            signal.signal(signal.SIGUSR1, lambda *_: os._exit(3))

    def serve(self, host: str, port: int, answers: Answers) -> None:
        """Serves these requests until stopped."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                answer = answers.get(f"{self.command} {self.path}")
                self.send_response(404 if answer is None else 200)
                self.end_headers()
                self.wfile.write(answer() if answer else b"")

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer((host, port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.wait()

    def wait(self) -> None:
        try:
            threading.Event().wait()
        finally:
            with (self.directory / "stopped").open("a") as stopped:
                stopped.write(f"{self.name}\n")


def worker(module: str, role: Role) -> None:
    """A member from its start to its end; like a real one, it stays in the roster when it is killed."""
    process = Process(module)
    file = process.directory / f"{process.name}.member"
    file.write_bytes(msgspec.json.encode(member_status(process.name, role, time.time_ns())))
    try:
        process.wait()
    finally:
        file.unlink()


def members(directory: Path) -> list[bytes]:
    found = []
    for path in directory.glob("*.member"):
        with contextlib.suppress(FileNotFoundError):  # it has just left
            found.append(path.read_bytes())
    return [each for each in found if each]  # not while it is being written


def bootstrap() -> None:
    process = Process("bootstrap")

    def workers() -> bytes:
        return b'{"workers": [' + b", ".join(members(process.directory)) + b"]}"

    config = process.topology.bootstrap
    process.serve(config.host, config.port, {"GET /workers": workers})


def router() -> None:
    process = Process("router")
    words = [{"id": "r1", "choices": [{"delta": {"content": word}}]} for word in ("Light", " scatters", ".")]
    answer = "".join(f"data: {json.dumps(word)}\n\n" for word in words) + "data: [DONE]\n\n"
    record = {"id": "r1", "prompt_tokens": 30, "output_tokens": 3, "total_seconds": 0.5, "first_token_seconds": 0.25}

    def fleet() -> bytes:
        known = [msgspec.json.decode(each, type=MemberStatus).member for each in members(process.directory)]
        workers = [{"worker": member.worker, "epoch": member.epoch, "live": True} for member in known]
        return json.dumps({"workers": workers}).encode()

    config = process.topology.router
    process.serve(
        config.host,
        config.port,
        {
            "GET /health": lambda: b"{}",
            "GET /status": fleet,
            "GET /v1/requests/r1": lambda: json.dumps(record).encode(),
            "POST /v1/chat/completions": lambda: answer.encode(),
        },
    )

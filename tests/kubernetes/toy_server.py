"""What runs in the pods of `test_kubelet.py`: `python toy_server.py`, on port 8000, asked what its container is like.

GET /name, /ready        who it is
GET /live                well, until /hang was asked
GET /read/PATH           a file's content
GET /write/PATH          whether it may write there
GET /resolve/HOST        that host's addresses
GET /exit                ends with code 3
"""

import http.server
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

HUNG = threading.Event()


def answer(what: str, rest: str) -> str:
    """Raises `OSError` for what can't be done."""
    if what == "read":
        return Path("/", rest).read_text()
    if what == "write":
        Path("/", rest).write_text("something")
    elif what == "resolve":
        return " ".join(sorted({str(found[4][0]) for found in socket.getaddrinfo(rest, 80, type=socket.SOCK_STREAM)}))
    elif what == "hang":
        HUNG.set()
    elif what == "exit":
        os._exit(3)
    if what == "live" and HUNG.is_set():
        raise OSError("it hangs")
    return os.environ["NAME"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        _, what, *rest = self.path.split("/", 2)
        try:
            status, body = 200, answer(what, "".join(rest))
        except OSError as error:
            status, body = 500, str(error)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def leave(number: int, frame: FrameType | None) -> None:
    print("asked to end", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    print("serving as", os.environ["NAME"], flush=True)
    http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()

"""An engine process without a model: `python -m toy_engine`. A prompt is an order, [what, how many tenths of a second].

    FINISH   ends the attempt after that time
    COMPUTE  takes one step of that length, layer by layer
    HANG     takes one step of that length, without a layer
    DEAFEN   stops the transfer thread for that time
    DIE      ends the process at once

CRASHES in the environment names a file: while it exists, the process ends when it has loaded, or hangs if it says so;
if it names another rank, that one ends.
"""

import os
import sys
import threading
import time
from pathlib import Path

from cluster.engine_main import EngineContext, main
from cluster.engine_messages import EngineReady, FromRouter, ToRouter
from cluster.errors import ConfigError
from cluster.layout import KVLayout
from cluster.messages import (
    AttemptFinished,
    CancelAttempt,
    EngineRank,
    FinishReason,
    Load,
    ModelCard,
    Role,
    Speed,
)
from cluster.process_identity import current

FINISH, COMPUTE, HANG, DEAFEN, DIE = range(5)
TENTH = 0.1
LAYOUT = KVLayout("toy", "float32", 16, 2, 1, 8)


class ToyHandler:
    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._ends: dict[object, tuple[str, float]] = {}
        self._deaf_until = 0.0
        self._steps = 0
        threading.Thread(target=self._look_after_transfers, daemon=True).start()

    def handle(self, message, now):
        if not isinstance(message, FromRouter):
            return
        fence = message.message.fence
        if isinstance(message.message, CancelAttempt):
            if fence in self._ends:
                self._finish(fence, FinishReason.CANCELLED)
            return
        what, tenths = message.message.prompt
        seconds = tenths * TENTH
        self._ends[fence] = (message.router, now + seconds)
        if what == DIE:
            os._exit(3)
        elif what == DEAFEN:
            self._deaf_until = now + seconds
        elif what == HANG:
            time.sleep(seconds)
        elif what == COMPUTE:
            for _ in range(tenths):
                time.sleep(TENTH)
                self._context.board.advance()

    def step(self, now):
        self._steps += 1
        for fence in [fence for fence, (_, end) in self._ends.items() if now >= end]:
            self._finish(fence, FinishReason.LENGTH)
        return False

    def load(self):
        return Load(running=len(self._ends), steps=self._steps)

    def close(self):
        pass

    def _finish(self, fence, reason):
        router, _ = self._ends.pop(fence)
        self._context.send(ToRouter(router, AttemptFinished(fence, Role.DECODE, reason)))

    def _look_after_transfers(self):
        while True:
            if time.monotonic() >= self._deaf_until:
                self._context.board.transfers_seen(None)
            time.sleep(TENTH)


def build(context):
    crashes = Path(os.environ["CRASHES"])
    while crashes.exists() and crashes.read_text() == "hang":
        time.sleep(TENTH)
    if crashes.exists() and not crashes.read_text().startswith("rank"):
        raise ConfigError("told to crash")
    ready = EngineReady(
        context.epoch, LAYOUT, ModelCard("toy", 64, 100), 8, b"descriptor", current(), Speed(0.01, 0.001, 16)
    )
    return ToyHandler(context), ready


def follow(context):
    """A rank that has nothing to do but to be there, and to look after no transfers."""
    crashes = Path(os.environ["CRASHES"])
    if crashes.exists() and crashes.read_text() == f"rank {context.rank.number}":
        raise ConfigError("told to crash")
    threading.Thread(target=_look_after_nothing, args=(context.board,), daemon=True).start()
    (leader,) = context.rank.steps
    return leader.receive, EngineRank(b"descriptor", current())


def _look_after_nothing(board):
    while True:
        board.transfers_seen(None)
        time.sleep(TENTH)


if __name__ == "__main__":
    sys.exit(main("toy_engine", lambda topology: topology.decode.cpus, build, follow))

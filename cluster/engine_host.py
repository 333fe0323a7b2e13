"""The control process's view of its engine process: start it, talk to it, notice its death, stop it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from cluster.engine_messages import EngineFailed, EngineMessage, EngineReady, Stop
from cluster.errors import BatonError, ConfigError, WorkerLost, from_info
from cluster.ipc import ControlChannel
from cluster.logging import get_logger
from cluster.messages import Message
from cluster.progress_board import ProgressBoard

log = get_logger(__name__)

STOP_SECONDS = 5.0


class EngineHost:
    """One engine process. Made by `start`; `close` in any case. `board` shows its progress."""

    def __init__(self, process: asyncio.subprocess.Process, channel: ControlChannel, board: ProgressBoard) -> None:
        self.board = board
        self._process = process
        self._channel = channel
        self._listens = False
        """It has begun to read what is posted."""

    @classmethod
    async def start(cls, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> EngineHost:
        """Runs `python -m module arguments --channel FD --board FD` with `environment` added to ours."""
        ours, theirs = socket.socketpair()
        board = ProgressBoard.create()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                "--channel",
                str(theirs.fileno()),
                "--board",
                str(board.descriptor),
                pass_fds=[theirs.fileno(), board.descriptor],
                env={**os.environ, **environment},
            )
        return cls(process, await ControlChannel.open(ours), board)

    async def ready(self) -> EngineReady:
        """Waits for the model to be loaded and warm. Raises what the engine process failed with."""
        messages = await self._channel.receive()
        if messages and isinstance(messages[0], EngineReady):
            self._listens = True
            return messages[0]
        if messages and isinstance(messages[0], EngineFailed):
            raise from_info(messages[0].error)
        raise ConfigError(f"the engine process died while starting ({await self._exit()}); its log says why")

    def post(self, message: Message) -> None:
        self._channel.post(message)

    async def receive(self) -> list[EngineMessage]:
        """The next messages. Raises `WorkerLost` when the engine process is dead, or what it failed with."""
        messages = await self._channel.receive()
        if not messages:
            raise WorkerLost(f"the engine process died ({await self._exit()})")
        for message in messages:
            if isinstance(message, EngineFailed):
                raise from_info(message.error)
        return messages

    def kill(self) -> None:
        """Without last words; `receive` tells of its death."""
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """Asks it to stop, waits for its last step, kills it if that takes too long. When this returns the process is
        dead, and reaped by us: nothing of it can write any more."""
        if not self._listens:
            self.kill()
        self._channel.post(Stop())
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError:
            log.warning("the engine process does not stop: killing it", pid=self._process.pid)
            self._process.kill()
            await self._process.wait()
        await self._channel.close()
        self.board.close()

    async def _exit(self) -> str:
        """How it ended, in words."""
        code = await self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def failure(error: BaseException) -> EngineFailed:
    """The last word of an engine process: a typed error as it is, any other by its name."""
    if isinstance(error, BatonError):
        return EngineFailed(error.to_info())
    return EngineFailed(BatonError(f"{type(error).__name__}: {error}").to_info())

"""One rank of a worker as a process: how its control process, or the rank host of a further node, starts and ends
it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from cluster.engine_messages import EngineMessage
from cluster.ipc import ControlChannel
from cluster.messages import Message
from cluster.progress_board import Board, ProgressBoard


class End(NamedTuple):
    """How a rank ended."""

    words: str
    well: bool
    """By itself and without an error."""


class RankProcess(Protocol):
    """One rank, here or on another host. All methods are for the control process's event loop."""

    @property
    def board(self) -> Board: ...

    def post(self, message: Message) -> None:
        """To its engine process; dropped after its end. Only rank 0 listens."""

    async def receive(self) -> list[EngineMessage]:
        """At least one message; an empty list is the end: the process is about to be dead."""

    async def end(self) -> End:
        """Returns when it is dead and reaped; or when its host can't be reached any more: then that host ends it, and
        nobody here can prove it."""

    def kill(self) -> None:
        """Without last words; does nothing to who is dead."""

    async def close(self) -> None:
        """After its end."""


class LocalRank:
    """Implements `RankProcess` on this host: a child of ours."""

    def __init__(self, process: asyncio.subprocess.Process, channel: ControlChannel, board: ProgressBoard) -> None:
        self.board = board
        self.pid = process.pid
        self._process = process
        self._channel = channel

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> LocalRank:
        """Runs `command --channel FD --board FD` with `environment` added to ours, and with `descriptors` inherited."""
        ours, theirs = socket.socketpair()
        board = ProgressBoard.create()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                *("--channel", str(theirs.fileno()), "--board", str(board.descriptor)),
                pass_fds=[theirs.fileno(), board.descriptor, *descriptors],
                env={**os.environ, **environment},
            )
        return cls(process, await ControlChannel.open(ours), board)

    def post(self, message: Message) -> None:
        self._channel.post(message)

    async def receive(self) -> list[EngineMessage]:
        return await self._channel.receive()

    async def end(self) -> End:
        code = await self._process.wait()
        words = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return End(words, well=code == 0)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        await self._channel.close()


def engine_command(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def place_arguments(number: int, size: int, hosts: int, links: Sequence[int]) -> list[str]:
    """Which rank of how many an engine process is; `links`: the descriptors of `cluster.ranks.Rank.inherited`."""
    counts = ["--rank", str(number), "--ranks", str(size), "--hosts", str(hosts)]
    return [*counts, "--links", *map(str, links)]

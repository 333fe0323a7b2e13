"""The control process's view of its engine process: start it, talk to it, notice its death, stop it.

Where the model is spread over several ranks, each is a process, and they live and die together: rank 0 is who is talked
to, and the death of any of them is the death of all.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from cluster.engine_messages import EngineFailed, EngineMessage, EngineReady, RankReady, Stop
from cluster.errors import BatonError, ConfigError, WorkerLost, from_info
from cluster.ipc import ControlChannel
from cluster.logging import get_logger
from cluster.messages import EngineRank, Message
from cluster.progress_board import GroupBoard, ProgressBoard
from cluster.tasks import cancel

log = get_logger(__name__)

STOP_SECONDS = 5.0


class _RankProcess(NamedTuple):
    process: asyncio.subprocess.Process
    channel: ControlChannel
    board: ProgressBoard

    async def exit(self) -> str:
        """How it ended, in words."""
        code = await self.process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class EngineHost:
    """One engine process, or one per rank. Made by `start`; `close` in any case. `board` shows its progress."""

    def __init__(self, ranks: Sequence[_RankProcess]) -> None:
        self._ranks = ranks
        self._process, self._channel, board = ranks[0]
        self.board = board if len(ranks) == 1 else GroupBoard([rank.board for rank in ranks])
        self._listens = False
        """It has begun to read what is posted."""
        self._death: BatonError | None = None
        """Of a follower, which was the end of all."""
        self._followers = [asyncio.get_running_loop().create_future() for _ in ranks[1:]]
        self._watching = [
            asyncio.create_task(self._watch(number), name=f"engine rank {number}") for number in range(1, len(ranks))
        ]

    @classmethod
    async def start(
        cls, module: str, arguments: Sequence[str], environment: Mapping[str, str], ranks: int = 1
    ) -> EngineHost:
        """Runs `python -m module arguments --channel FD --board FD` with `environment` added to ours; of several
        `ranks`, each with --rank, --ranks and the --links between them (`cluster.ranks.Rank.inherited`)."""
        command = [sys.executable, "-m", module, *arguments]
        with ExitStack() as ours:
            links = _links(ranks, ours)
            return cls([await _start(command, environment, links, number) for number in range(ranks)])

    async def ready(self) -> EngineReady:
        """Waits for the model to be loaded and warm. Raises what the engine process failed with."""
        messages = await self._channel.receive()
        if messages and isinstance(messages[0], EngineReady):
            followers: list[EngineRank] = list(await asyncio.gather(*self._followers))
            self._listens = True
            return msgspec.structs.replace(messages[0], followers=followers)
        if messages and isinstance(messages[0], EngineFailed):
            raise from_info(messages[0].error)
        ended = await self._ended()
        raise self._death or ConfigError(f"the engine process died while starting ({ended}); its log says why")

    def post(self, message: Message) -> None:
        self._channel.post(message)

    async def receive(self) -> list[EngineMessage]:
        """The next messages. Raises `WorkerLost` when the engine process is dead, or what it failed with."""
        messages = await self._channel.receive()
        if not messages:
            ended = await self._ended()
            raise self._death or WorkerLost(f"the engine process died ({ended})")
        for message in messages:
            if isinstance(message, EngineFailed):
                raise from_info(message.error)
        return messages

    def kill(self) -> None:
        """Without last words; `receive` tells of its death."""
        for rank in self._ranks:
            rank.kill()

    async def close(self) -> None:
        """Asks it to stop, waits for its last step, kills it if that takes too long. When this returns the process is
        dead, and reaped by us: nothing of it can write any more."""
        await cancel(*self._watching)
        if not self._listens:
            self.kill()
        self._channel.post(Stop())
        ends = asyncio.gather(*(rank.process.wait() for rank in self._ranks))
        try:
            await asyncio.wait_for(asyncio.shield(ends), STOP_SECONDS)
        except asyncio.TimeoutError:
            log.warning("the engine process does not stop: killing it", pid=self._process.pid)
            self.kill()
            await ends
        for rank in self._ranks:
            await rank.channel.close()
        self.board.close()

    async def _ended(self) -> str:
        """How rank 0 did, in words. If it ended well, that was because a follower had gone: waits for its story."""
        ended = await self._ranks[0].exit()
        if self._process.returncode == 0 and self._watching:
            await asyncio.wait(self._watching, timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return ended

    async def _watch(self, number: int) -> None:
        """Until a follower's end, which is the end of all. Its last word may be an error; whom another's end has ended
        has none, and ends well."""
        rank, ready = self._ranks[number], self._followers[number - 1]
        death: BatonError | None = None
        while messages := await rank.channel.receive():
            for message in messages:
                if isinstance(message, RankReady):
                    ready.set_result(message.rank)
                elif isinstance(message, EngineFailed):
                    death = from_info(message.error)
        ended = await rank.exit()
        if death is None and rank.process.returncode != 0:
            death = WorkerLost(f"rank {number} of the engine process died ({ended})")
        if death is not None and self._death is None:
            log.error("a rank has ended: ending the others", rank=number, error=str(death))
            self._death = death
        self.kill()
        if not ready.done():
            ready.set_exception(self._death or WorkerLost(f"rank {number} of the engine process has ended"))
            ready.exception()  # whoever waits for it hears of it; nobody may


async def _start(
    command: Sequence[str], environment: Mapping[str, str], links: Sequence[Sequence[int]], number: int
) -> _RankProcess:
    ours, theirs = socket.socketpair()
    board = ProgressBoard.create()
    place = ["--rank", str(number), "--ranks", str(len(links)), "--links", *map(str, links[number])]
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--channel", str(theirs.fileno()), "--board", str(board.descriptor)),
            *(place if len(links) > 1 else ()),
            pass_fds=[theirs.fileno(), board.descriptor, *links[number]],
            env={**os.environ, **environment},
        )
    return _RankProcess(process, await ControlChannel.open(ours), board)


def _links(ranks: int, ours: ExitStack) -> list[list[int]]:
    """For each rank the descriptors that it inherits, see `Rank.inherited`; our copies close with `ours`. None for one
    that is alone."""
    if ranks == 1:
        return [[]]
    meeting = os.memfd_create("baton-rendezvous")
    ours.callback(os.close, meeting)
    links = [[meeting] for _ in range(ranks)]
    for follower in links[1:]:
        for _ in ("steps", "transfers"):
            for end, rank in zip(socket.socketpair(), (links[0], follower), strict=True):
                rank.append(ours.enter_context(end).fileno())
    return links


def failure(error: BaseException) -> EngineFailed:
    """The last word of an engine process: a typed error as it is, any other by its name."""
    if isinstance(error, BatonError):
        return EngineFailed(error.to_info())
    return EngineFailed(BatonError(f"{type(error).__name__}: {error}").to_info())

"""The control process's view of its engine process: start it, talk to it, notice its death, stop it.

Where the model is spread over several ranks, each is a process, and they live and die together: rank 0 is who is talked
to, and the death of any of them is the death of all. It is on this host; the others may be on further ones
(`cluster.rank_hosts`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from cluster.engine_messages import EngineFailed, EngineMessage, EngineReady, RankReady, Stop
from cluster.errors import BatonError, ConfigError, WorkerLost, from_info
from cluster.logging import get_logger
from cluster.messages import EngineRank, Message
from cluster.progress_board import GroupBoard
from cluster.rank_hosts import RankHosts
from cluster.rank_links import LINKS, RankDoor, listen
from cluster.rank_process import LocalRank, RankProcess, engine_command, place_arguments
from cluster.tasks import cancel

log = get_logger(__name__)

STOP_SECONDS = 5.0
LINK_SECONDS = 30.0
"""For ranks on other hosts to be linked to rank 0; their processes have only begun then."""


class EngineHost:
    """One engine process, or one per rank. Made by `start` or `start_spread`; `close` in any case. `board` shows its
    progress."""

    def __init__(self, ranks: Sequence[RankProcess]) -> None:
        self._ranks = ranks
        self._first = ranks[0]
        self.board = ranks[0].board if len(ranks) == 1 else GroupBoard([rank.board for rank in ranks])
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
        `ranks`, each with its place among them (`cluster.ranks.Rank.inherited`)."""
        command = engine_command(module, arguments)
        if ranks == 1:
            return cls([await LocalRank.start(command, environment)])
        with ExitStack() as ours:
            links = _links(ranks, ours)
            meeting = os.memfd_create("baton-rendezvous")
            ours.callback(os.close, meeting)
            places = [
                _Place(place_arguments(number, ranks, 1, links[number]), links[number]).meeting_here(meeting)
                for number in range(ranks)
            ]
            return cls(await _start_all(command, environment, places))

    @classmethod
    async def start_spread(
        cls, module: str, arguments: Sequence[str], environment: Mapping[str, str], ranks: int, hosts: RankHosts
    ) -> EngineHost:
        """The same, spread over this host and all of `hosts`, for which it waits. Raises `WorkerLost` if one of them is
        lost meanwhile, or can't start its part."""
        await hosts.all_there()
        here = ranks // hosts.nodes
        with ExitStack() as ours:
            meeting = ours.enter_context(listen(hosts.address))
            door = ours.enter_context(RankDoor(hosts.address))
            port = meeting.getsockname()[1]
            distant = hosts.start(ranks, port, door)
            try:
                farther = await _linked(door, range(here, ranks), distant)
                links = _links(here, ours)
                links[0] += farther
                meet = ["--meet-at", hosts.host, str(port)]
                places = [
                    _Place([*place_arguments(number, ranks, hosts.nodes, links[number]), *meet], links[number])
                    for number in range(here)
                ]
                places[0] = places[0].meeting_here(meeting.fileno())
                near = await _start_all(engine_command(module, arguments), environment, places)
            except BaseException:
                for rank in distant:
                    rank.kill()
                raise
            return cls([*near, *distant])

    async def ready(self) -> EngineReady:
        """Waits for the model to be loaded and warm. Raises what the engine process failed with."""
        messages = await self._first.receive()
        if messages and isinstance(messages[0], EngineReady):
            followers: list[EngineRank] = list(await asyncio.gather(*self._followers))
            self._listens = True
            return msgspec.structs.replace(messages[0], followers=followers)
        if messages and isinstance(messages[0], EngineFailed):
            raise from_info(messages[0].error)
        ended = await self._ended()
        raise self._death or ConfigError(f"the engine process died while starting ({ended}); its log says why")

    def post(self, message: Message) -> None:
        self._first.post(message)

    async def receive(self) -> list[EngineMessage]:
        """The next messages. Raises `WorkerLost` when the engine process is dead, or what it failed with."""
        messages = await self._first.receive()
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
        dead, and reaped: nothing of it can write any more. But for ranks on a host that can't be reached, of which
        nobody is told that they are dead (`cluster.rank_hosts`)."""
        await cancel(*self._watching)
        if not self._listens:
            self.kill()
        self._first.post(Stop())
        ends = asyncio.gather(*(rank.end() for rank in self._ranks))
        try:
            await asyncio.wait_for(asyncio.shield(ends), STOP_SECONDS)
        except asyncio.TimeoutError:
            log.warning("the engine process does not stop: killing it")
            self.kill()
            await ends
        for rank in self._ranks:
            await rank.close()
        self.board.close()

    async def _ended(self) -> str:
        """How rank 0 did, in words. If it ended well, that was because a follower had gone: waits for its story."""
        end = await self._first.end()
        if end.well and self._watching:
            await asyncio.wait(self._watching, timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return end.words

    async def _watch(self, number: int) -> None:
        """Until a follower's end, which is the end of all. Its last word may be an error; whom another's end has ended
        has none, and ends well."""
        rank, ready = self._ranks[number], self._followers[number - 1]
        death: BatonError | None = None
        while messages := await rank.receive():
            for message in messages:
                if isinstance(message, RankReady):
                    ready.set_result(message.rank)
                elif isinstance(message, EngineFailed):
                    death = from_info(message.error)
        end = await rank.end()
        if death is None and not end.well:
            death = WorkerLost(f"rank {number} of the engine process died ({end.words})")
        if death is not None and self._death is None:
            log.error("a rank has ended: ending the others", rank=number, error=str(death))
            self._death = death
        self.kill()
        if not ready.done():
            ready.set_exception(self._death or WorkerLost(f"rank {number} of the engine process has ended"))
            ready.exception()  # whoever waits for it hears of it; nobody may


class _Place(NamedTuple):
    """Of a rank on this host: its arguments, and what it inherits."""

    arguments: list[str]
    descriptors: list[int]

    def meeting_here(self, descriptor: int) -> _Place:
        """With the file, or the listening socket, where the ranks meet."""
        return _Place([*self.arguments, "--meeting", str(descriptor)], [*self.descriptors, descriptor])


async def _start_all(
    command: Sequence[str], environment: Mapping[str, str], places: Sequence[_Place]
) -> list[RankProcess]:
    return [await LocalRank.start([*command, *place.arguments], environment, place.descriptors) for place in places]


async def _linked(door: RankDoor, numbers: Sequence[int], ranks: Sequence[RankProcess]) -> list[int]:
    """The descriptors of rank 0's links to these ranks on other hosts. Raises `WorkerLost`."""
    collecting = asyncio.ensure_future(door.collect(numbers))
    ends = [asyncio.ensure_future(rank.end()) for rank in ranks]
    try:
        await asyncio.wait({collecting, *ends}, timeout=LINK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return collecting.result()
        over = [f"rank {number}: {end.result().words}" for number, end in zip(numbers, ends, strict=True) if end.done()]
        raise WorkerLost("; ".join(over) or f"ranks on other hosts were not linked within {LINK_SECONDS:g} s")
    finally:
        await cancel(collecting, *ends)


def _links(ranks: int, ours: ExitStack) -> list[list[int]]:
    """For each rank of this host the descriptors of its links, see `Rank.inherited`; our copies close with `ours`."""
    links: list[list[int]] = [[] for _ in range(ranks)]
    for follower in links[1:]:
        for _ in range(LINKS):
            for end, rank in zip(socket.socketpair(), (links[0], follower), strict=True):
                rank.append(ours.enter_context(end).fileno())
    return links


def failure(error: BaseException) -> EngineFailed:
    """The last word of an engine process: a typed error as it is, any other by its name."""
    if isinstance(error, BatonError):
        return EngineFailed(error.to_info())
    return EngineFailed(BatonError(f"{type(error).__name__}: {error}").to_info())

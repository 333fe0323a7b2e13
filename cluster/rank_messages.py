"""Messages between a worker's control process and the rank hosts of its further nodes (`cluster.rank_hosts`,
`cluster.rank_host`).

    rank host -> control    RankHostHello, then for each life RankUp, RanksSeen, RankOver; HostLeaving
    control -> rank host    StartRanks, EndRanks (or Refused); DeathAsked -> DeathWitnessed

A life is one group of ranks, from start to end; what carries another life's number is out of date.
"""

from __future__ import annotations

from typing import Union

import msgspec

from cluster.errors import ErrorInfo, UnknownMessage
from cluster.layout import SCHEMA_VERSION
from cluster.messages import DeathAsked, DeathWitnessed, EngineRank, Message, Refused


class RankHostHello(Message, frozen=True):
    """First frame of a rank host: it runs the ranks of that node, 0 being the control process's own."""

    node: int
    version: int = SCHEMA_VERSION


class StartRanks(Message, frozen=True):
    """Run ranks `first` to `first + count - 1` of `size` on `hosts` hosts; what runs still of an earlier life ends
    before."""

    life: int
    first: int
    count: int
    size: int
    hosts: int
    meeting_port: int
    """Of rank 0, for `cluster.ranks.MeetingPort`."""
    links_port: int
    """Of the control process: where each rank's links to rank 0 begin, see `cluster.rank_links`."""
    token: str
    """What opens that port."""


class EndRanks(Message, frozen=True):
    """Kill them."""

    life: int


class RankUp(Message, frozen=True):
    """A rank has loaded and registered its pool."""

    life: int
    number: int
    rank: EngineRank


class RankSeen(msgspec.Struct, frozen=True):
    """What a rank's progress board shows, see `cluster.progress_board.Progress`."""

    number: int
    engine: int
    transfers: int
    oldest_transfer_age: float | None = None
    """In seconds: the clocks of two hosts have no common zero."""


class RanksSeen(Message, frozen=True):
    life: int
    ranks: list[RankSeen]


class RankOver(Message, frozen=True):
    """A rank's process is dead, and reaped."""

    life: int
    number: int
    words: str
    """How it ended."""
    well: bool
    """By itself and without an error."""
    error: ErrorInfo | None = None
    """Its last word."""


class HostLeaving(Message, frozen=True):
    """This host was asked to end: the worker should drain, for which there is some time."""


RankMessage = Union[
    RankHostHello, StartRanks, EndRanks, RankUp, RanksSeen, RankOver, HostLeaving, DeathAsked, DeathWitnessed, Refused
]

_decoder = msgspec.msgpack.Decoder(RankMessage)


def decode_rank_message(frame: bytes) -> RankMessage:
    """Raises `UnknownMessage`, with what was wrong, unless `frame` is exactly one message."""
    try:
        message: RankMessage = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnknownMessage(f"not a message of schema version {SCHEMA_VERSION}: {error}") from error
    return message

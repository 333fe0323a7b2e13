"""Messages between a worker's two processes, the control process and the engine process (`cluster.ipc`).

    control -> engine   FromRouter, RouterGone, FromPeer, PeerUp, PeerDown, StartProfile, StopProfile, Stop
    engine -> control   EngineReady or EngineFailed, then ToRouter, ToPeer, EngineLoad, ProfileReply, ProfileEnded

They never come from the network: a link doesn't decode them.
"""

from __future__ import annotations

from typing import Union

import msgspec

from cluster.errors import ErrorInfo, UnknownMessage
from cluster.layout import SCHEMA_VERSION, KVLayout
from cluster.memory_plan import MemoryUse
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    CancelAttempt,
    DecodeAttempt,
    EngineRank,
    Load,
    Message,
    ModelCard,
    PeerHello,
    PeerMessage,
    PrefillAttempt,
    ProcessIdentity,
    Speed,
    Tokens,
)


class EngineReady(Message, frozen=True):
    """First frame of an engine process that has loaded, registered its pool and warmed up."""

    epoch: int
    layout: KVLayout
    model: ModelCard
    pool_pages: int
    descriptor: bytes
    process: ProcessIdentity
    speed: Speed
    memory: MemoryUse | None = None
    """Of rank 0, where it says so."""
    followers: list[EngineRank] = []
    """The other ranks', filled in by the control process."""


class RankReady(Message, frozen=True):
    """First and only frame of a rank other than 0, which tells all else to rank 0 (`cluster.ranks`)."""

    rank: EngineRank


class EngineFailed(Message, frozen=True):
    """Last frame of an engine process that can't start or can't go on."""

    error: ErrorInfo


class EngineLoad(Message, frozen=True):
    load: Load


class FromRouter(Message, frozen=True):
    router: str
    message: Union[PrefillAttempt, DecodeAttempt, CancelAttempt]
    received_at: float | None = None
    """When the control process got it, so that waiting for the step under way counts as queueing. Of the host's
    monotonic clock, which both processes read. None: as it is handled."""


class ToRouter(Message, frozen=True):
    router: str
    message: Union[AttemptStarted, Tokens, AttemptFinished, AttemptFailed]


class RouterGone(Message, frozen=True):
    """Its connection broke: all its attempts are cancelled."""

    router: str


class FromPeer(Message, frozen=True):
    worker: str
    epoch: int
    message: PeerMessage


class ToPeer(Message, frozen=True):
    """Dropped if that instance is not connected: its `PeerDown` is on the way."""

    worker: str
    epoch: int
    message: PeerMessage


class PeerUp(Message, frozen=True):
    """A peer is connected, its hello checked."""

    hello: PeerHello


class PeerDown(Message, frozen=True):
    """The connection to that instance broke. It may live on: a silent connection is no proof of death."""

    worker: str
    epoch: int


class StartProfile(Message, frozen=True):
    """Record a trace of the next `steps` steps, and write it to `file`. Answered by `ProfileReply`."""

    file: str
    steps: int


class StopProfile(Message, frozen=True):
    """End the recording now. Answered by `ProfileReply`, when the file is there."""


class ProfileReply(Message, frozen=True):
    """One for each `StartProfile` and `StopProfile`, in order."""

    file: str = ""
    error: ErrorInfo | None = None


class ProfileEnded(Message, frozen=True):
    """A recording has reached its last step by itself; the file is there."""

    file: str


class Stop(Message, frozen=True):
    """Leave the step loop, release the device, exit 0."""


EngineMessage = Union[
    EngineReady, RankReady, EngineFailed, EngineLoad, FromRouter, ToRouter, RouterGone, FromPeer, ToPeer, PeerUp,
    PeerDown, StartProfile, StopProfile, ProfileReply, ProfileEnded, Stop,
]  # fmt: skip

_decoder = msgspec.msgpack.Decoder(EngineMessage)


def decode_engine_message(frame: bytes | bytearray | memoryview) -> EngineMessage:
    """Raises `UnknownMessage`, with what was wrong, unless `frame` is exactly one message."""
    try:
        message: EngineMessage = _decoder.decode(frame)
    except msgspec.DecodeError as error:
        raise UnknownMessage(f"not a message of schema version {SCHEMA_VERSION}: {error}") from error
    return message

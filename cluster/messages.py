"""Every message that goes over the network, and how it becomes bytes. Those between a worker's two processes are in
`cluster.engine_messages`.

All are frozen, tagged by type name and decoded by type. Lengths are in tokens, times in seconds, sizes in bytes.
`encode` and `decode` are msgpack; `decode` raises `UnknownMessage` for what is not one of these, or would break whoever
computes with it: a layout without layers, a temperature that is no number.

    router  <-> worker      RouterHello/WorkerHello, PrefillAttempt, DecodeAttempt, CancelAttempt
                            -> AttemptStarted, Tokens, AttemptFinished, AttemptFailed, Heartbeat
    prefill <-> decode      PeerHello both ways (or Refused), then Offer, Grant, Done, Ack, Abort, Aborted;
                            DeathAsked -> DeathWitnessed
    worker  <-> bootstrap   Register/Registered (or Refused), Heartbeat, Leave
    anyone  <-> bootstrap   Watch -> Roster, then Joined, Left
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Union

import msgspec
from msgspec import Meta

from cluster.errors import ErrorInfo, UnknownMessage
from cluster.layout import SCHEMA_VERSION, KVLayout, Positive
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the tag on the wire is the class's name."""


# --- identities ------------------------------------------------------------------------------------------------------


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Fence(msgspec.Struct, frozen=True):
    """Names one pairing for good: what carries another fence is of another life and is refused.

    An epoch is the instance of a worker's engine process (nanoseconds at its start); 0 where the pairing has no such
    leg: a unified decode worker has no prefill leg, a one-token request has no decode leg.
    """

    request: str
    attempt: int
    prefill_epoch: int
    decode_epoch: int

    def __str__(self) -> str:
        return f"{self.request}#{self.attempt}"


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process of one boot of one host; lets a neighbour on that host ask the kernel whether it is dead."""

    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int


class EngineRank(msgspec.Struct, frozen=True):
    """One engine process of a worker: rank 0, or one of its followers where the model is spread over several."""

    descriptor: bytes
    """What the other side's transfer backend needs to reach its registered pool."""
    process: ProcessIdentity
    """That writes, or is written to."""


class ModelCard(msgspec.Struct, frozen=True):
    """What the router must know of the model that a worker serves."""

    name: str
    context_length: Positive
    vocab_size: Positive


class Speed(msgspec.Struct, frozen=True):
    """What a worker measured at its start, alone: prices for whoever places requests."""

    step_seconds: float
    """A step that decodes one sequence."""
    prompt_token_seconds: float
    """What one prompt token adds to a step."""
    prompt_tokens_beside_decodes: int
    """The most in one step, see `engine.pacing`."""


class Member(msgspec.Struct, frozen=True):
    """One worker instance as bootstrap knows it. `url` is http://host:port, reachable by the others."""

    worker: str
    role: Role
    epoch: int
    url: str
    layout: KVLayout
    model: ModelCard
    transfer: str
    pool_pages: Positive
    max_running: Positive
    speed: Speed | None = None


class Load(msgspec.Struct, frozen=True):
    """What a heartbeat says of a worker's work. `steps` grows with each engine step: health is progress."""

    queued: int = 0
    """Attempts that wait for their first compute (prefill) or for KV (decode)."""
    queued_tokens: int = 0
    """Prompt tokens of them that are still to be computed."""
    running: int = 0
    """Attempts in the step loop."""
    pages_used: int = 0
    pages_total: int = 0
    pages_quarantined: int = 0
    """Pages that wait for a writer's word, see `kv_transfer.receiver_state`."""
    transfers: int = 0
    """Handoffs between their OFFER and their end."""
    steps: int = 0
    ready: bool = True
    owners: dict[str, int] = {}
    """Pages in use, by kind of owner; sums to `pages_used`."""
    pages_cached: int = 0
    """Pages that only the prefix cache has: they are given to whoever needs pages."""
    stale_messages: int = 0
    """Messages refused for their fence, since the engine process's start."""
    progress: int = 0
    """Grows while the engine process gets on: with each turn of its loop, idle or not, and each layer of a step."""
    oldest_transfer_seconds: float = 0.0
    """Age of the oldest write under way (prefill), or grant that is not written yet (decode); 0: there is none."""
    stalled: str = ""
    """What has stopped making progress, in words; empty while all goes on. Such a worker is not `ready`."""
    draining: bool = False
    """It finishes what it has and then ends. Such a worker is not `ready`."""


# --- a request's attempt ---------------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True):
    """How to choose tokens. The router resolves defaults: a worker sees final values only.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch a filter off. `seed` is always set. Penalties count the
    output so far, not the prompt. `logprobs` is None or the number of alternatives (0: the chosen token only), of the
    model's distribution before temperature, penalties and filters.
    """

    max_tokens: Positive
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    stop_token_ids: list[Count] = []
    """End-of-sequence tokens included, unless the request ignores them."""
    logprobs: int | None = None


class PrefillAttempt(Message, frozen=True):
    """Compute the KV of prompt + output, sample the next token, hand over to `decode` (None: it is the last token)."""

    fence: Fence
    prompt: list[int]
    sampling: Sampling
    decode: str | None
    output: list[int] = []
    """Tokens that earlier attempts already gave; the next token's offset is len(output)."""
    priority: int = 0
    """The higher, the more urgent."""


class DecodeAttempt(Message, frozen=True):
    """Await KV from `prefill` and go on from the first token (None: prefill here, unified)."""

    fence: Fence
    prompt: list[int]
    sampling: Sampling
    prefill: str | None
    output: list[int] = []
    priority: int = 0


class CancelAttempt(Message, frozen=True):
    """Stop working on it and give everything back. Unknown fences are ignored: the attempt may just have ended."""

    fence: Fence
    reason: str


class AttemptStarted(Message, frozen=True):
    """The leg's first compute begins (prefill), or its first decode step (decode)."""

    fence: Fence
    role: Role
    cached_tokens: int = 0
    """Prompt tokens whose KV was here already, where the leg prefills."""


class Logprobs(msgspec.Struct, frozen=True):
    """Natural logarithms: of the chosen token, and of the most likely ones, best first."""

    chosen: float
    top: list[tuple[int, float]] = []


class Emitted(msgspec.Struct, frozen=True):
    """Token number `offset` of a request's output."""

    fence: Fence
    offset: int
    token: int
    logprobs: Logprobs | None = None


class Tokens(Message, frozen=True):
    """All tokens of one step that belong to one router."""

    tokens: list[Emitted]


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    HANDED_OFF = "handed_off"
    """A prefill leg's normal end: decode has acknowledged the pages."""
    CANCELLED = "cancelled"
    RETRACTED = "retracted"
    """Decode took its pages for older ones: the request goes on as another attempt, after the tokens it has."""


class AttemptFinished(Message, frozen=True):
    """The leg's last word; every page of it is back in the pool (or in quarantine)."""

    fence: Fence
    role: Role
    reason: FinishReason
    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None


class AttemptFailed(Message, frozen=True):
    """The leg ended without its result. `blame` is the leg whose fault it was."""

    fence: Fence
    role: Role
    blame: Role
    error: ErrorInfo


class RouterHello(Message, frozen=True):
    """First frame of a router's connection to a worker. `epoch`: the life of the worker that it means; 0: any."""

    router: str
    epoch: int = 0
    version: int = SCHEMA_VERSION


class WorkerHello(Message, frozen=True):
    """The worker's reply to `RouterHello`."""

    member: Member
    version: int = SCHEMA_VERSION


# --- handing over KV (prefill <-> decode) ----------------------------------------------------------------------------


class PeerHello(Message, frozen=True):
    """First frame in both directions between a prefill worker (who dials) and a decode worker."""

    worker: str
    role: Role
    epoch: int
    layout: KVLayout
    transfer: str
    descriptor: bytes
    """What the other side's transfer backend needs to reach this one's registered pool."""
    engine: ProcessIdentity
    """The process that writes, or is written to."""
    to_epoch: int = 0
    """The life of the other side that it is meant for; 0: any."""
    followers: list[EngineRank] = []
    """The other ranks of a model that is spread over several; `descriptor` and `engine` are of rank 0."""
    version: int = SCHEMA_VERSION

    @property
    def ranks(self) -> list[EngineRank]:
        """All, in order."""
        return [EngineRank(self.descriptor, self.engine), *self.followers]


class Refused(Message, frozen=True):
    """The other side will not talk to us; the connection closes after it."""

    error: ErrorInfo


class Offer(Message, frozen=True):
    """P -> D: I have begun on this request; give me pages for `tokens` tokens of KV."""

    fence: Fence
    tokens: Positive


class Grant(Message, frozen=True):
    """D -> P: these pages are yours to write, in order; KV of the first `skip_tokens` tokens is here already.

    `pages[i]` holds tokens [(skip_tokens // page_size + i) * page_size, ...). Until P says DONE or ABORTED, or is
    proven dead, D neither reads nor reuses them.
    """

    fence: Fence
    pages: list[Count]
    skip_tokens: Count = 0


class Done(Message, frozen=True):
    """P -> D: all pages are written and no write is under way. `digests[i]` is of `Grant.pages[i]`."""

    fence: Fence
    first_token: Count
    digests: list[int]


class Ack(Message, frozen=True):
    """D -> P: verified and taken over; P may release its pages."""

    fence: Fence


class Abort(Message, frozen=True):
    """D -> P: stop writing and confirm by ABORTED. `error` says why, `blame` whose fault it is (None: a cancel)."""

    fence: Fence
    error: ErrorInfo
    blame: Role | None = None


class Aborted(Message, frozen=True):
    """P -> D: no write is under way and none will come. Ends the lease, whoever wanted the end."""

    fence: Fence
    error: ErrorInfo
    blame: Role | None = None


class DeathAsked(Message, frozen=True):
    """D -> P: is this process dead? It held pages of D and ran where P runs, out of sight of D's own kernel."""

    process: ProcessIdentity


class DeathWitnessed(Message, frozen=True):
    """P -> D: yes, by the word of my host's kernel. While it lives, or nothing is known, there is no answer."""

    process: ProcessIdentity


# --- membership (worker, router <-> bootstrap) -----------------------------------------------------------------------


class Register(Message, frozen=True):
    member: Member
    version: int = SCHEMA_VERSION


class Registered(Message, frozen=True):
    """Accepted: send a `Heartbeat` every `heartbeat_seconds`; after `lease_seconds` without one you are out."""

    heartbeat_seconds: float
    lease_seconds: float


class Heartbeat(Message, frozen=True):
    """Goes from a worker to bootstrap and to each connected router, at each interval."""

    worker: str
    epoch: int
    load: Load


class Leave(Message, frozen=True):
    worker: str
    epoch: int
    reason: str


class Watch(Message, frozen=True):
    """Asks for the roster now and for each change from now on. `watcher` is for the logs."""

    watcher: str
    version: int = SCHEMA_VERSION


class MemberStatus(msgspec.Struct, frozen=True):
    """A member and its last heartbeat. `age_seconds` is counted by bootstrap's own clock."""

    member: Member
    load: Load
    age_seconds: float


class Roster(Message, frozen=True):
    """All live members; replaces whatever the watcher knew."""

    members: list[MemberStatus]


class Joined(Message, frozen=True):
    """A member is new, or came back with a new epoch."""

    member: Member


class Left(Message, frozen=True):
    worker: str
    epoch: int
    reason: str


HandoffMessage = Union[Offer, Grant, Done, Ack, Abort, Aborted]
"""What carries a fence."""
PeerMessage = Union[Offer, Grant, Done, Ack, Abort, Aborted, DeathAsked, DeathWitnessed]
"""All that prefill and decode workers say to each other after their hellos."""
AnyMessage = Union[
    PrefillAttempt, DecodeAttempt, CancelAttempt, AttemptStarted, Tokens, AttemptFinished, AttemptFailed,
    RouterHello, WorkerHello, PeerHello, Refused, Offer, Grant, Done, Ack, Abort, Aborted,
    DeathAsked, DeathWitnessed, Register, Registered, Heartbeat, Leave, Watch, Roster, Joined, Left,
]  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes | bytearray | memoryview) -> AnyMessage:
    """Raises `UnknownMessage`, with what was wrong, unless `frame` is exactly one message."""
    try:
        message: AnyMessage = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnknownMessage(f"not a message of schema version {SCHEMA_VERSION}: {error}") from error
    return message

"""Every error that crosses a process or reaches a user, as one tree.

    BatonError
    ├── ConfigError                a topology, a flag or a model folder is wrong; the process does not start
    │   └── ModelError             the model's files are missing, broken or of an architecture we don't run
    ├── LaunchError                a process of the cluster can't be started or reached, or has died (`baton` only)
    ├── RequestError               the client's input is wrong (HTTP 4xx); retrying the same request is useless
    │   ├── InvalidRequest         400  malformed or out of range
    │   │   └── PromptTooLong      400  does not fit the context or the KV pool
    │   ├── Unauthorized           401  no API key, or no proof of the cluster's secret
    │   ├── ModelNotFound          404
    │   ├── NotFound               404  no such URL
    │   ├── MethodNotAllowed       405
    │   ├── BodyTimeout            408  the body did not come in time
    │   ├── Conflict               409  it is not the moment for it: started twice, stopped without a start
    │   ├── BodyTooLarge           413
    │   └── UnsupportedMediaType   415
    ├── AvailabilityError          (HTTP 503, Retry-After) the same request may succeed later or elsewhere
    │   ├── NoWorker               no live worker of the role that is needed
    │   ├── Overloaded             429  a bounded queue is full
    │   ├── Draining               the worker takes no new work
    │   ├── Cancelled              the attempt's other leg was given up, and not by this router: it lost its own
    │   ├── WorkerLost             the worker or its connection died while it had the request
    │   │   └── WorkerStalled      its connection stands, but it says that it is stuck
    │   │       └── WorkerSilent   it says nothing at all
    │   ├── TransferFailed         KV pages did not arrive, or arrived damaged
    │   │   └── PeerUnreachable    the peer's memory can't be written to
    │   ├── TransferStuck          a write can't be stopped but by the end of its process, which therefore ends
    │   ├── OutOfMemory            a worker's device has no memory for a step with this request
    │   ├── QuarantineFull         too many pages wait for writers nobody can vouch for: the engine process starts anew
    │   ├── AttemptsExhausted      a request has failed as often as it may
    │   └── DeadlineExceeded       the request's time is over
    ├── ProtocolError              a peer broke the contract; the message is refused and counted
    │   ├── StaleFence             the message is meant for another epoch, request or attempt
    │   ├── LayoutMismatch         two workers' KV layouts differ: they can't hand over to each other
    │   └── UnknownMessage         not a message of this schema version
    └── IllegalTransition          our own bug: an event that a state machine's table does not have

An error knows its HTTP status, whether another attempt may help, and whether it tells against the worker that is
blamed for it. `ErrorInfo` is what travels; `to_info` and `from_info` convert.

When a leg fails, another attempt may help against whatever lies in one worker, one connection or one pair: all of
AvailabilityError, and ProtocolError too (a worker that was restarted answers StaleFence, two that don't fit each other
LayoutMismatch: other workers will do). It can't help when the request itself is wrong (RequestError), when its time or
its attempts are over, or when the code is (IllegalTransition, and any class that this version does not know).
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error on the wire: the class's name, its message, and the request field it is about (if any)."""

    code: str
    message: str
    param: str | None = None


class BatonError(Exception):
    """Root of the tree. `status` is the HTTP status, `retryable` whether another attempt may help."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    fault: ClassVar[bool] = True
    """Whether it tells against the worker that is blamed, see `router.breaker_state`. False: a worker said no, as it
    should."""
    openai_type: ClassVar[str] = "server_error"
    """The `type` of the OpenAI error object."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_info(self) -> ErrorInfo:
        return ErrorInfo(type(self).__name__, self.message, self.param)


class ConfigError(BatonError):
    """A setting is wrong; the message names the key, the place and what was expected."""


class ModelError(ConfigError):
    """The model can't be loaded."""


class LaunchError(BatonError):
    """A process of the cluster can't be started or reached, or has died. Only the `baton` command meets it."""


class RequestError(BatonError):
    status = 400
    openai_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """Malformed JSON, a wrong type, or a value out of range."""


class PromptTooLong(InvalidRequest):
    """Prompt plus requested tokens exceed the model's context or the KV pool."""


class Unauthorized(RequestError):
    """Whoever asks has not shown that they may; the message never tells what would have been right."""

    status = 401


class ModelNotFound(RequestError):
    status = 404


class NotFound(RequestError):
    status = 404


class MethodNotAllowed(RequestError):
    status = 405


class BodyTimeout(RequestError):
    """The client was too slow in sending its request."""

    status = 408


class Conflict(RequestError):
    """What is asked for does not fit what is under way."""

    status = 409


class BodyTooLarge(RequestError):
    status = 413


class UnsupportedMediaType(RequestError):
    status = 415


class AvailabilityError(BatonError):
    status = 503
    retryable = True
    retry_after: int = 1
    """Seconds, for the Retry-After header."""


class NoWorker(AvailabilityError):
    """No live worker of a role that the request needs."""


class Overloaded(AvailabilityError):
    """A bounded queue is full, or is served too slowly for the request's own deadline."""

    status = 429
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int = 1, reason: str = "") -> None:
        """`reason` names the bound, for a metric; one of few."""
        super().__init__(message, param=param)
        self.retry_after = retry_after
        self.reason = reason


class Draining(AvailabilityError):
    """The worker is leaving and takes no new work."""

    fault = False


class Cancelled(AvailabilityError):
    """The attempt's other leg was given up: its router's connection broke, or it has ended there already."""

    fault = False


class WorkerLost(AvailabilityError):
    """The worker died, or its connection broke, while it had the request."""


class WorkerStalled(WorkerLost):
    """The worker has the request and makes no progress; it may wake up later."""


class WorkerSilent(WorkerStalled):
    """Nothing is heard of the worker: it is stopped, or the network to it is. No request does that to one."""


class TransferFailed(AvailabilityError):
    """The KV pages of a request did not arrive whole."""


class PeerUnreachable(TransferFailed):
    """The peer's memory can't be reached: it is dead, or the network to it is."""


class TransferStuck(AvailabilityError):
    """A write neither ends nor can be ended. Ends the engine process: then nothing of it can land any more."""


class OutOfMemory(AvailabilityError):
    """The device has no memory for a step with this request in it; the others in it go on."""


class QuarantineFull(AvailabilityError):
    """Too much of the pool has waited for too long for the word of its writers. Ends the engine process."""


class AttemptsExhausted(AvailabilityError):
    """One attempt after the other has failed; says how many, and what the last one said."""

    retryable = False


class DeadlineExceeded(AvailabilityError):
    """The request's deadline has passed."""

    retryable = False


class ProtocolError(BatonError):
    """A peer sent what the contract does not allow."""

    retryable = True


class StaleFence(ProtocolError):
    """The message belongs to another worker epoch, request or attempt."""

    fault = False


class LayoutMismatch(ProtocolError):
    """Two workers hold KV in different shapes and can't hand over to each other."""


class UnknownMessage(ProtocolError):
    """The frame is not a message of this schema version."""


class IllegalTransition(BatonError):
    """A state machine got an event its table does not have; carries the machine's last events."""


def _tree(root: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_info(info: ErrorInfo) -> BatonError:
    """The error that `info` describes; a class this version does not know becomes a plain `BatonError`."""
    kind = _tree(BatonError).get(info.code, BatonError)
    return kind(info.message, param=info.param)

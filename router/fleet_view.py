"""What the router knows of its workers. Pure: the shell tells it what happened, and when.

A worker gets new work while its link is up, its last heartbeat is younger than the lease, it says it is ready and it
has not said goodbye. Its load is estimated as: what others gave it, as of its last heartbeat, plus what this router has
under way there now. So a burst spreads before the next heartbeat, and what has ended counts no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cluster.messages import Fence, Heartbeat, Load, Member, Role
from router.policies import Candidate, Commitment, Kind, Snapshot, kind_of
from router.request_state import WorkerKey


class WorkerStatus(msgspec.Struct, frozen=True):
    """One worker, for people and tools."""

    worker: str
    role: Role
    epoch: int
    url: str
    live: bool
    """Gets new work."""
    linked: bool
    leaving: bool
    heartbeat_age_seconds: float | None
    """None while there is no link."""
    attempts: int
    """Of this router, under way there."""
    layout: str
    transfer: str
    load: Load


class Stall(NamedTuple):
    """How we know that a worker does not get on."""

    reason: str
    silent: bool
    """By hearing nothing; otherwise by its own word."""


class FleetLimits(msgspec.Struct, frozen=True):
    """What the live workers can take, in tokens."""

    context_length: int
    vocab_size: int
    pool_tokens: int


class _Foreign(NamedTuple):
    """What others gave a worker, as of its last heartbeat."""

    attempts: int = 0
    tokens: int = 0
    pages: int = 0


_NOTHING_FOREIGN = _Foreign()


@dataclass(eq=False)
class _Worker:
    key: WorkerKey
    member: Member
    kind: Kind
    linked: bool = False
    leaving: bool = False
    seen: float = float("-inf")
    """Of its last heartbeat, or of the link's beginning."""
    load: Load = field(default_factory=lambda: Load(ready=False))
    commitments: dict[Fence, Commitment] = field(default_factory=dict)
    tokens: int = 0
    pages: int = 0
    """Sums over the commitments."""
    foreign: _Foreign = _NOTHING_FOREIGN
    known: Candidate | None = None
    """What placement sees of it, until something changes: among hundreds of workers few do from one request to the
    next."""

    def candidate(self) -> Candidate:
        if self.known is None:
            self.known = Candidate(
                self.key,
                self.member,
                self.kind,
                attempts=self.foreign.attempts + len(self.commitments),
                tokens=self.foreign.tokens + self.tokens,
                pages=self.foreign.pages + self.pages,
                commitments=self.commitments.values(),
            )
        return self.known


class FleetView:
    """All workers by (name, epoch). `unified` says that no prefill pool is wanted."""

    def __init__(self, lease_seconds: float, *, unified: bool) -> None:
        self._lease_seconds = lease_seconds
        self._unified = unified
        self._workers: dict[WorkerKey, _Worker] = {}
        self._by_name: list[_Worker] = []
        """The same, in order of their names."""

    # --- what happens ------------------------------------------------------------------------------------------------

    def joined(self, member: Member) -> WorkerKey:
        """A worker is in the roster, for the first time or again."""
        key = WorkerKey(member.worker, member.epoch)
        if key not in self._workers:
            self._workers[key] = _Worker(key, member, kind_of(member))
            self._by_name = sorted(self._workers.values(), key=lambda worker: worker.key.worker)
        self._workers[key].leaving = False
        return key

    def left(self, key: WorkerKey) -> None:
        """It is out of the roster: no new work, but what it has goes on."""
        if key in self._workers:
            self._workers[key].leaving = True

    def linked(self, key: WorkerKey, now: float) -> None:
        worker = self._workers[key]
        worker.linked, worker.seen, worker.load = True, now, Load()
        worker.foreign, worker.known = _NOTHING_FOREIGN, None

    def unlinked(self, key: WorkerKey) -> None:
        if key in self._workers:
            self._workers[key].linked = False

    def gone(self, key: WorkerKey) -> None:
        """It will not come back."""
        worker = self._workers.pop(key, None)
        if worker is not None:
            self._by_name.remove(worker)

    def heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """False for an epoch that is not here."""
        worker = self._workers.get(WorkerKey(beat.worker, beat.epoch))
        if worker is None:
            return False
        worker.seen, worker.load = now, beat.load
        worker.foreign = _Foreign(
            attempts=max(0, beat.load.queued + beat.load.running - len(worker.commitments)),
            tokens=max(0, beat.load.queued_tokens - worker.tokens),
            pages=max(0, beat.load.pages_used - worker.pages),
        )
        worker.known = None
        return True

    def commit(self, key: WorkerKey, fence: Fence, prompt: int, output: int, *, prefills: bool) -> None:
        """An attempt of ours goes there: `prompt` tokens to compute (`prefills`) or to receive, up to `output` to
        come."""
        worker = self._workers[key]
        kept = prompt if worker.member.role is Role.PREFILL else prompt + output
        commitment = Commitment(prompt if prefills else 0, worker.member.layout.pages_for(kept))
        worker.commitments[fence] = commitment
        worker.tokens += commitment.tokens
        worker.pages += commitment.pages
        worker.known = None

    def prefilled(self, key: WorkerKey, fence: Fence) -> None:
        """Its prompt is computed: nobody waits for it any more."""
        worker = self._workers.get(key)
        commitment = worker.commitments.get(fence) if worker else None
        if worker is not None and commitment is not None:
            worker.commitments[fence] = commitment._replace(tokens=0)
            worker.tokens -= commitment.tokens
            worker.known = None

    def release(self, key: WorkerKey, fence: Fence) -> None:
        """That attempt is over there. Of a worker that is gone it is ignored."""
        worker = self._workers.get(key)
        commitment = worker.commitments.pop(fence, None) if worker else None
        if worker is not None and commitment is not None:
            worker.tokens -= commitment.tokens
            worker.pages -= commitment.pages
            worker.known = None

    # --- what is known -----------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        """The live workers, for a policy."""
        live = [worker.candidate() for worker in self._by_name if self._live(worker, now)]
        return Snapshot(
            [candidate for candidate in live if candidate.member.role is Role.PREFILL],
            [candidate for candidate in live if candidate.member.role is Role.DECODE],
            self._unified,
        )

    def slept(self, seconds: float) -> None:
        """For so long this router itself was stopped or stuck: that was nobody's silence, and words may be waiting."""
        for worker in self._workers.values():
            worker.seen += seconds

    def stalled(self, now: float) -> dict[WorkerKey, Stall]:
        """The workers that have attempts of ours and don't get on with them, and how we know. Their links stand: to
        stop a worker, or to swallow what it says, breaks no connection."""
        return {
            key: stall
            for key, worker in self._workers.items()
            if worker.linked and worker.commitments and (stall := self._stall(worker, now))
        }

    def is_leaving(self, key: WorkerKey) -> bool:
        """True too for one that is not here."""
        worker = self._workers.get(key)
        return worker is None or worker.leaving

    def limits(self, now: float) -> FleetLimits | None:
        """None while no decode worker is live."""
        members = [candidate.member for candidate in self.snapshot(now).decode]
        if not members:
            return None
        return FleetLimits(
            context_length=max(member.model.context_length for member in members),
            vocab_size=min(member.model.vocab_size for member in members),
            pool_tokens=max(member.pool_pages * member.layout.page_size for member in members),
        )

    def statuses(self, now: float) -> list[WorkerStatus]:
        """All workers, in order of their names."""
        return [
            WorkerStatus(
                worker=key.worker,
                role=worker.member.role,
                epoch=key.epoch,
                url=worker.member.url,
                live=self._live(worker, now),
                linked=worker.linked,
                leaving=worker.leaving,
                heartbeat_age_seconds=max(0.0, now - worker.seen) if worker.linked else None,
                attempts=len(worker.commitments),
                layout=worker.member.layout.fingerprint,
                transfer=worker.member.transfer,
                load=worker.load,
            )
            for key, worker in sorted(self._workers.items(), key=lambda item: (item[0].worker, item[0].epoch))
        ]

    def integrity_errors(self) -> list[str]:
        """What does not add up; empty when all is well."""
        errors = []
        for key, worker in self._workers.items():
            tokens = sum(commitment.tokens for commitment in worker.commitments.values())
            pages = sum(commitment.pages for commitment in worker.commitments.values())
            if (tokens, pages) != (worker.tokens, worker.pages):
                errors.append(f"{key}: counted {worker.tokens} tokens, {worker.pages} pages; owned {tokens}, {pages}")
        return errors

    def _stall(self, worker: _Worker, now: float) -> Stall | None:
        silent = now - worker.seen
        if silent > self._lease_seconds:
            return Stall(f"it has been silent for {silent:.1f} s", silent=True)
        return Stall(worker.load.stalled, silent=False) if worker.load.stalled else None

    def _live(self, worker: _Worker, now: float) -> bool:
        fresh = now - worker.seen <= self._lease_seconds
        return worker.linked and worker.load.ready and fresh and not worker.leaving

"""What goes wrong, and when: faults aimed at requests in each state of their journey.

A fault is aimed at a cell: a state of one of the five machines that carry a request, and a kind of fault. It strikes
when a machine enters that state (or a moment later), at the processes and connections that this very request uses. The
coverage counts in which state it found the machine when it struck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from cluster.messages import Fence
from cluster.state_machine import StateMachine
from decode_worker.decode_state import DecodeMachine, DecodeState
from kv_transfer.receiver_state import ReceiverLease, ReceiverState
from kv_transfer.sender_state import SenderHandoff, SenderState
from prefill_worker.prefill_state import PrefillMachine, PrefillState
from router.request_state import RequestMachine, RequestState
from tests.sim.kernel import Strand

CROWDED = ("PrefillMachine QUEUED", "ReceiverLease OFFERED", "DecodeMachine OFFERED")
"""Where a request only stays for lack of pages."""
POOLS = {
    "PrefillMachine QUEUED": (1, 2),
    "ReceiverLease OFFERED": (2, 1),
    "DecodeMachine OFFERED": (2, 1),
    "RequestMachine UNPLACED": (1, 1),
    "DecodeMachine PREFILLING": (0, 2),
}
"""Prefill and decode workers of a cluster in which requests come to that place, and stay a while."""

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster
    from tests.sim.router import Client
    from tests.sim.workers import SimWorker


class Fault(str, Enum):
    """Kinds of faults. "Stopped": by SIGSTOP, until SIGCONT some seconds later."""

    PREFILL_KILLED = "prefill worker killed"
    PREFILL_ENGINE_KILLED = "prefill engine process killed"
    PREFILL_STOPPED = "prefill worker stopped"
    PREFILL_ENGINE_STOPPED = "prefill engine process stopped"
    PREFILL_DRAINED = "prefill worker drained and restarted"
    PREFILL_TRANSFERS_STUCK = "prefill transfer thread stuck"
    DECODE_KILLED = "decode worker killed"
    DECODE_ENGINE_KILLED = "decode engine process killed"
    DECODE_STOPPED = "decode worker stopped"
    DECODE_ENGINE_STOPPED = "decode engine process stopped"
    DECODE_DRAINED = "decode worker drained and restarted"
    DECODE_TRANSFERS_STUCK = "decode transfer thread stuck"
    PEER_LINK_BROKEN = "link between the two workers broken"
    PEERS_CUT = "the two workers cut off from each other"
    PREFILL_LINK_BROKEN = "router's link to prefill broken"
    PREFILL_CUT = "router cut off from prefill"
    DECODE_LINK_BROKEN = "router's link to decode broken"
    DECODE_CUT = "router cut off from decode"
    WRITE_FAILED = "write fails"
    WRITE_DAMAGED = "write arrives damaged"
    WRITE_SLOW = "write takes seconds"
    WRITE_HANGS = "write never ends"
    MESSAGES_REPEATED = "messages repeated"
    MESSAGES_LOST = "messages between the two workers lost, one by one"
    ROUTER_KILLED = "router killed"
    BOOTSTRAP_KILLED = "bootstrap killed"
    CLIENT_LEAVES = "client leaves"
    CLIENT_RECONNECTS = "client loses its connection and asks for the rest"


JOURNEY: dict[type[StateMachine[Any]], tuple[Enum, ...]] = {
    RequestMachine: (
        RequestState.UNPLACED,
        RequestState.PLACED,
        RequestState.PREFILLING,
        RequestState.STREAMING,
    ),
    PrefillMachine: (
        PrefillState.QUEUED,
        PrefillState.COMPUTING,
        PrefillState.HOLDING_KV,
        PrefillState.ABORTING,
    ),
    SenderHandoff: (
        SenderState.UNCONNECTED,
        SenderState.OFFERED,
        SenderState.SENDING,
        SenderState.HOLDING,
        SenderState.STOPPING,
    ),
    ReceiverLease: (
        ReceiverState.OFFERED,
        ReceiverState.GRANTED,
        ReceiverState.VERIFYING,
        ReceiverState.QUARANTINED,
        ReceiverState.SETTLING,
    ),
    DecodeMachine: (
        DecodeState.RESERVING,
        DecodeState.OFFERED,
        DecodeState.AWAITING_KV,
        DecodeState.PREFILLING,
        DecodeState.RUNNING,
    ),
}
"""The states in which a request is under way, or something of it is left: the journey table of ARCHITECTURE.md."""

OF_PREFILL = frozenset(
    {
        Fault.PREFILL_KILLED,
        Fault.PREFILL_ENGINE_KILLED,
        Fault.PREFILL_STOPPED,
        Fault.PREFILL_DRAINED,
        Fault.PREFILL_ENGINE_STOPPED,
        Fault.PREFILL_TRANSFERS_STUCK,
        Fault.PEER_LINK_BROKEN,
        Fault.PEERS_CUT,
        Fault.PREFILL_LINK_BROKEN,
        Fault.PREFILL_CUT,
        Fault.WRITE_FAILED,
        Fault.WRITE_DAMAGED,
        Fault.WRITE_SLOW,
        Fault.WRITE_HANGS,
        Fault.MESSAGES_LOST,
    }
)
"""They need a prefill leg: a unified worker's PREFILLING has none."""


class Cell(NamedTuple):
    """`journey` is "machine STATE"."""

    journey: str
    fault: Fault


def place_of(machine: StateMachine[Any]) -> str:
    return f"{type(machine).__name__} {machine.state.name}"


def _cells() -> tuple[Cell, ...]:
    unified = f"{DecodeMachine.__name__} {DecodeState.PREFILLING.name}"
    journey = [f"{machine.__name__} {state.name}" for machine, states in JOURNEY.items() for state in states]
    return tuple(
        Cell(place, fault) for fault in Fault for place in journey if not (place == unified and fault in OF_PREFILL)
    )


CELLS = _cells()


def _prelude(*cells: tuple[type[StateMachine[Any]], Enum, Fault]) -> tuple[Cell, ...]:
    return tuple(Cell(f"{machine.__name__} {state.name}", fault) for machine, state, fault in cells)


_SLOW = (SenderHandoff, SenderState.OFFERED, Fault.WRITE_SLOW)
_STALLED = (RequestMachine, RequestState.STREAMING, Fault.DECODE_STOPPED)
_KILLED = (RequestMachine, RequestState.STREAMING, Fault.DECODE_KILLED)
_LEAVES = (ReceiverLease, ReceiverState.GRANTED, Fault.CLIENT_LEAVES)
_FORGOTTEN = (ReceiverLease, ReceiverState.GRANTED, Fault.DECODE_LINK_BROKEN)
PRELUDES: dict[str, tuple[tuple[Cell, ...], ...]] = {
    place: tuple(_prelude(*cells) for cells in ways)
    for place, ways in {
        "RequestMachine UNPLACED": [[_STALLED], [_STALLED], [_KILLED]],
        "PrefillMachine ABORTING": [[_SLOW, _LEAVES], [_SLOW, _FORGOTTEN]],
        "SenderHandoff STOPPING": [[_SLOW, _FORGOTTEN], [_SLOW, _LEAVES]],
        "SenderHandoff UNCONNECTED": [[(SenderHandoff, SenderState.OFFERED, Fault.PEER_LINK_BROKEN)]],
        "ReceiverLease QUARANTINED": [[_SLOW, _FORGOTTEN], [_SLOW, _LEAVES]],
        "ReceiverLease SETTLING": [[_SLOW, _FORGOTTEN], [_FORGOTTEN]],
    }.items()
}
"""How to get to places that an undisturbed request never sees: faults that come before."""


def aims(random: Random, cell: Cell) -> list[Cell]:
    """`cell`, what leads to it, and sometimes more."""
    before = random.choice(PRELUDES.get(cell.journey, ((),)))
    return [*before, cell, *random.choices(CELLS, k=random.choice([0, 0, 0, 1, 2]))]


STOP_SECONDS = (0.2, 1.0, 4.0, 6.0, 9.0)
CUT_SECONDS = (0.1, 0.8, 3.0, 7.0, 17.0)


class Director:
    """Waits for the machines of one simulation to come to where a fault is aimed at. `coverage` counts what struck."""

    def __init__(self, cluster: SimCluster, random: Random, aims: list[Cell]) -> None:
        self.coverage: Counter[Cell] = Counter()
        self.quiet_from = 0.0
        """When the last fault is over, as far as it goes by time."""
        self._cluster = cluster
        self._random = random
        self._aims = aims
        self._patience = random.randint(0, 3) if aims and aims[0].journey in CROWDED else 0
        """So many machines pass a place before it strikes there."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, machines that move are looked at."""
        initialise, move = StateMachine.__init__, StateMachine.to

        def begun(machine: StateMachine[Any], name: str, initial: Enum) -> None:
            initialise(machine, name, initial)
            if not isinstance(machine, RequestMachine):  # it is placed in the same breath
                self._entered(machine)

        def moved(machine: StateMachine[Any], state: Enum) -> None:
            move(machine, state)
            self._entered(machine)

        with mock.patch.object(StateMachine, "__init__", begun), mock.patch.object(StateMachine, "to", moved):
            yield

    def _entered(self, machine: StateMachine[Any]) -> None:
        if not self._aims or place_of(machine) != self._aims[0].journey:
            return
        if self._patience > 0:
            self._patience -= 1
            return
        aim = self._aims.pop(0)
        self._patience = self._random.choice([0, 0, 1]) if self._aims and self._aims[0].journey not in PRELUDES else 0
        delay = self._random.choice([0.0, 0.0, 0.0, self._random.uniform(0.0, 0.02)])
        self._cluster.loop.at(delay, None, self._strike, aim.fault, machine)

    def _strike(self, fault: Fault, machine: StateMachine[Any]) -> None:
        fence = _fence_of(machine)
        place = place_of(machine)
        target = _Target(self._cluster, fence, machine.name)
        if STRIKES[fault](self, target):
            self.coverage[Cell(place, fault)] += 1
            self._cluster.story.note(f"FAULT {fault.value}, while {machine.name} is at {place}")

    # --- what the kinds of faults do; False: it could not strike ------------------------------------------------------

    def kill(self, worker: SimWorker | None, *, engine_only: bool) -> bool:
        if worker is None or not worker.up:
            return False
        if engine_only and worker.life is not None:
            worker.life.die()
        else:
            worker.kill()
        return True

    def drain(self, worker: SimWorker | None) -> bool:
        if worker is None or not worker.up:
            return False
        worker.drain()
        return True

    def stop(self, strands: tuple[Strand, ...]) -> bool:
        """SIGSTOP, and SIGCONT after a while."""
        loop = self._cluster.loop
        waited_for = bool(self._aims) and self._aims[0].journey in PRELUDES
        seconds = max(STOP_SECONDS) if waited_for else self._random.choice(STOP_SECONDS)
        for strand in strands:
            loop.hold(strand)
            loop.at(seconds, None, loop.release, strand)
        self._lasts(seconds)
        return bool(strands)

    def cut(self, a: str | None, b: str | None) -> bool:
        if a is None or b is None:
            return False
        seconds = self._random.choice(CUT_SECONDS)
        self._cluster.network.cut(a, b, seconds)
        self._lasts(seconds)
        return True

    def break_links(self, a: str | None, b: str | None) -> bool:
        if a is None or b is None:
            return False
        self._cluster.network.break_links(a, b)
        return True

    def lose_messages(self, a: str | None, b: str | None) -> bool:
        """The next one or two: a process on the way has dropped them, the connection stands."""
        if a is None or b is None:
            return False
        self._cluster.network.lose(a, b, self._random.choice([1, 1, 2]))
        return True

    def spoil_write(self, fence: Fence | None, how: str) -> bool:
        """The next write of this handoff, if one comes."""
        if fence is None:
            return False
        self._cluster.fabric.plans[fence] = how
        return True

    def repeat_messages(self) -> bool:
        for _ in range(self._random.randint(1, 4)):
            delay = self._random.choice([0.0, self._random.uniform(0.0, 0.2), self._random.uniform(0.0, 4.0)])
            self._cluster.loop.at(delay, None, self._repeat_one)
        return True

    def _repeat_one(self) -> None:
        """One of the latest, rather than of the first."""
        heard = self._cluster.heard
        if heard:
            self._cluster.repeat(*heard[int(len(heard) * self._random.random() ** 0.3)])

    def kill_router(self) -> bool:
        if not self._cluster.router.strand.alive:
            return False
        self._cluster.kill_router()
        return True

    def kill_bootstrap(self) -> bool:
        if not self._cluster.bootstrap.strand.alive:
            return False
        self._cluster.kill_bootstrap()
        return True

    def leave(self, request: str) -> bool:
        client = self._client_of(request)
        if client is None:
            return False
        client.leave()
        return True

    def reconnect(self, request: str) -> bool:
        client = self._client_of(request)
        if client is None or not self._cluster.router.strand.alive:
            return False
        client.reconnect(self._random.uniform(0.0, 1.0))
        return True

    def _client_of(self, request: str) -> Client | None:
        """Who still waits for it. Request ids are CLIENT-CONNECTION-CHOICE."""
        name = request.split("-", 1)[0]
        return next((client for client in self._cluster.clients if client.name == name and not client.ended), None)

    def _lasts(self, seconds: float) -> None:
        self.quiet_from = max(self.quiet_from, self._cluster.loop.now() + seconds)


class _Target:
    """The processes that one attempt uses."""

    def __init__(self, cluster: SimCluster, fence: Fence | None, name: str) -> None:
        self.fence = fence
        self.request = fence.request if fence is not None else name
        self.prefill = _worker_at(cluster, fence.prefill_epoch if fence else 0)
        self.decode = _worker_at(cluster, fence.decode_epoch if fence else 0)

    @property
    def prefill_name(self) -> str | None:
        return self.prefill.name if self.prefill else None

    @property
    def decode_name(self) -> str | None:
        return self.decode.name if self.decode else None


def _worker_at(cluster: SimCluster, epoch: int) -> SimWorker | None:
    """The worker, if it still lives that life."""
    life = cluster.life(epoch) if epoch else None
    worker = cluster.workers[life.name] if life else None
    return worker if worker is not None and worker.up and worker.life is life else None


def _all_of(worker: SimWorker | None) -> tuple[Strand, ...]:
    return (*_engine_of(worker), worker.strand) if worker else ()


def _engine_of(worker: SimWorker | None) -> tuple[Strand, ...]:
    return worker.life.strands if worker and worker.life else ()


def _transfers_of(worker: SimWorker | None) -> tuple[Strand, ...]:
    return (worker.life.transfers,) if worker and worker.life else ()


def _fence_of(machine: Any) -> Fence | None:
    fence: Fence | None = machine.attempt.fence if hasattr(machine, "attempt") else getattr(machine, "fence", None)
    return fence


STRIKES: dict[Fault, Callable[[Director, _Target], bool]] = {
    Fault.PREFILL_KILLED: lambda d, t: d.kill(t.prefill, engine_only=False),
    Fault.PREFILL_ENGINE_KILLED: lambda d, t: d.kill(t.prefill, engine_only=True),
    Fault.PREFILL_STOPPED: lambda d, t: d.stop(_all_of(t.prefill)),
    Fault.PREFILL_ENGINE_STOPPED: lambda d, t: d.stop(_engine_of(t.prefill)),
    Fault.PREFILL_TRANSFERS_STUCK: lambda d, t: d.stop(_transfers_of(t.prefill)),
    Fault.DECODE_KILLED: lambda d, t: d.kill(t.decode, engine_only=False),
    Fault.DECODE_ENGINE_KILLED: lambda d, t: d.kill(t.decode, engine_only=True),
    Fault.PREFILL_DRAINED: lambda d, t: d.drain(t.prefill),
    Fault.DECODE_DRAINED: lambda d, t: d.drain(t.decode),
    Fault.DECODE_STOPPED: lambda d, t: d.stop(_all_of(t.decode)),
    Fault.DECODE_ENGINE_STOPPED: lambda d, t: d.stop(_engine_of(t.decode)),
    Fault.DECODE_TRANSFERS_STUCK: lambda d, t: d.stop(_transfers_of(t.decode)),
    Fault.PEER_LINK_BROKEN: lambda d, t: d.break_links(t.prefill_name, t.decode_name),
    Fault.PEERS_CUT: lambda d, t: d.cut(t.prefill_name, t.decode_name),
    Fault.PREFILL_LINK_BROKEN: lambda d, t: d.break_links("router", t.prefill_name),
    Fault.PREFILL_CUT: lambda d, t: d.cut("router", t.prefill_name),
    Fault.DECODE_LINK_BROKEN: lambda d, t: d.break_links("router", t.decode_name),
    Fault.DECODE_CUT: lambda d, t: d.cut("router", t.decode_name),
    Fault.WRITE_FAILED: lambda d, t: d.spoil_write(t.fence, "fail"),
    Fault.WRITE_DAMAGED: lambda d, t: d.spoil_write(t.fence, "damage"),
    Fault.WRITE_SLOW: lambda d, t: d.spoil_write(t.fence, "slow"),
    Fault.WRITE_HANGS: lambda d, t: d.spoil_write(t.fence, "hang"),
    Fault.MESSAGES_REPEATED: lambda d, t: d.repeat_messages(),
    Fault.MESSAGES_LOST: lambda d, t: d.lose_messages(t.prefill_name, t.decode_name),
    Fault.ROUTER_KILLED: lambda d, t: d.kill_router(),
    Fault.BOOTSTRAP_KILLED: lambda d, t: d.kill_bootstrap(),
    Fault.CLIENT_LEAVES: lambda d, t: d.leave(t.request),
    Fault.CLIENT_RECONNECTS: lambda d, t: d.reconnect(t.request),
}

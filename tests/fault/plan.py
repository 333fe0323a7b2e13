"""Which faults a campaign makes: each kind, to each role, at each moment of a request's journey. Pure; by seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from enum import Enum
from itertools import product
from typing import NamedTuple

from cluster.messages import Role


class Kind(str, Enum):
    """What is done."""

    KILL_WORKER = "SIGKILL of a worker"
    KILL_ENGINE = "SIGKILL of an engine process"
    STOP_WORKER = "SIGSTOP of a worker, 5 s"
    STOP_ENGINE = "SIGSTOP of an engine process, 5 s"
    CUT = "all connections of a worker cut"
    PARTITION = "nothing to or from a worker, 5 s"
    DEAFEN = "nothing to a worker, 5 s"
    KILL_ROUTER = "SIGKILL of the router"
    KILL_BOOTSTRAP = "SIGKILL of bootstrap"


class Moment(str, Enum):
    """Where the journey of the request at which a fault is aimed stands then: the rows of the journey table."""

    PLACED = "placed"
    COMPUTING = "computing"
    HANDING_OVER = "handing over"
    DECODING = "decoding"
    ENDED = "ended"
    LEFT = "client left"
    """Its client has gone while it was computed: a write may still land."""
    ANY = "any"
    """Aimed at nothing."""


class Lane(str, Enum):
    """Faults of different lanes meet; those of one come one after the other, so that each pool keeps a worker."""

    PREFILL = "prefill"
    DECODE = "decode"
    HOUSE = "house"

    @property
    def role(self) -> Role | None:
        return None if self is Lane.HOUSE else Role(self.value)


class Fault(NamedTuple):
    lane: Lane
    kind: Kind
    moment: Moment

    def __str__(self) -> str:
        return f"{self.kind.value} [{self.lane.value}] when {self.moment.value}"


DEATHS = (Kind.KILL_WORKER, Kind.KILL_ENGINE)
OF_THE_HOUSE = (Kind.KILL_ROUTER, Kind.KILL_BOOTSTRAP)
OF_WORKERS = tuple(kind for kind in Kind if kind not in OF_THE_HOUSE)


def plan_faults(seed: int, count: int, kinds: Collection[Kind] = tuple(Kind)) -> dict[Lane, list[Fault]]:
    """`count` faults, by lane and in the order in which they are to come. With all kinds, the first 112 are the whole
    table; those beyond repeat it."""
    draw = random.Random(seed)
    table = [fault for fault in _table() if fault.kind in kinds]
    faults: list[Fault] = []
    while len(faults) < count:
        faults += draw.sample(table, len(table))
    return {lane: [fault for fault in faults[:count] if fault.lane is lane] for lane in Lane}


def _table() -> Iterable[Fault]:
    for kind, lane, moment in product(OF_WORKERS, (Lane.PREFILL, Lane.DECODE), Moment):
        yield Fault(lane, kind, moment)
    for kind, moment in product(OF_THE_HOUSE, Moment):
        yield Fault(Lane.HOUSE, kind, moment)

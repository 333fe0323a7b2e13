"""The state tables of ARCHITECTURE.md, drawn from the code's own tables. `make docs` writes them, a test compares."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from bootstrap.roster_state import MemberMachine
from cluster.health_state import WorkerHealth
from cluster.state_machine import StateMachine
from decode_worker.decode_state import DecodeMachine
from decode_worker.quarantine_state import QuarantineWatch
from kv_transfer.receiver_state import ReceiverLease
from kv_transfer.sender_state import SenderHandoff
from prefill_worker.prefill_state import PrefillMachine
from router.breaker_state import BreakerMachine
from router.request_state import RequestMachine

ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"
MACHINES: tuple[type[StateMachine], ...] = (
    RequestMachine,
    BreakerMachine,
    PrefillMachine,
    SenderHandoff,
    ReceiverLease,
    DecodeMachine,
    QuarantineWatch,
    MemberMachine,
    WorkerHealth,
)
_BLOCK = re.compile(r"(<!-- state tables: begin -->\n).*(<!-- state tables: end -->)", re.DOTALL)


def table(machine: type[StateMachine]) -> str:
    """One machine as markdown: each state with the events that it takes."""
    events = defaultdict(list)
    for state, event in machine.TABLE:
        events[state].append(event.__name__)
    path = machine.__module__.replace(".", "/") + ".py"
    rows = [f"| {state.name} | {', '.join(sorted(events[state])) or '(the end)'} |" for state in _states(machine)]
    return "\n".join([f"**`{path}`**", "", "| state | takes |", "|---|---|", *rows, ""])


def _states(machine: type[StateMachine]) -> list:
    first = next(iter(machine.TABLE))[0]
    return list(type(first))


def render() -> str:
    return "\n".join(table(machine) for machine in MACHINES)


def written() -> str:
    """What ARCHITECTURE.md has between its marks."""
    match = _BLOCK.search(ARCHITECTURE.read_text())
    assert match is not None, "ARCHITECTURE.md has lost the marks of its state tables"
    return match.group(0)


def replaced(text: str) -> str:
    return _BLOCK.sub(lambda match: f"{match.group(1)}{render()}{match.group(2)}", text)


if __name__ == "__main__":
    ARCHITECTURE.write_text(replaced(ARCHITECTURE.read_text()))

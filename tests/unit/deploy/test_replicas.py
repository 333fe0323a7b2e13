"""What is known of a process from four sides is one state, and a reason where it can't work."""

import msgspec
import pytest

from deploy.launchers.base import ProcessKind, ReplicaState
from deploy.launchers.processes import ProcessStatus
from deploy.plan import worker
from deploy.replicas import Seen, replicas
from tests.unit.deploy.example_members import member_status

READY = member_status("decode-0")
EPOCH = READY.member.epoch
SPEC = worker(READY.member.role, 0)
RUNS = ProcessStatus("decode-0", True, "log", "41@1", "here", started_ns=EPOCH - 1)
SUCCESSOR = RUNS._replace(started_ns=EPOCH + 1)
WAITS = RUNS._replace(instance="", node="", waiting_for="a node with 1 GPU free")
DRAINS = ("draining", "")


@pytest.mark.parametrize(
    ("process", "leaving", "roster", "state", "reason"),
    [
        (RUNS, False, [READY], "ready", ""),
        (RUNS, False, [], "starting", "bootstrap does not know it"),
        (RUNS, False, None, "starting", "bootstrap does not answer"),
        (RUNS, False, [member_status("decode-0", ready=False)], "starting", "it takes no work now"),
        (RUNS, False, [member_status("decode-0", ready=False, stalled="no step")], "starting", "no step"),
        (SUCCESSOR, False, [READY], "starting", "bootstrap does not know it"),  # it still knows the former life
        (WAITS, False, [], "waiting", "waits for a node with 1 GPU free"),
        (RUNS._replace(running=False), False, [], "waiting", "it is started anew"),
        (RUNS, True, [READY], *DRAINS),
        (RUNS._replace(running=False), True, [], "draining", "it has ended"),
    ],
)
def test_a_worker(process, leaving, roster, state, reason):
    (found,) = replicas([SPEC], {"decode-0": process}, {"decode-0"} if leaving else set(), Seen(roster, True))
    assert (found.state, found.reason) == (ReplicaState(state), reason)
    assert bool(found.instance) == (state in ("ready", "starting", "draining") and process.running)
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


def test_router_and_bootstrap_are_known_by_their_answers():
    for kind, roster, healthy, state in (
        (ProcessKind.ROUTER, None, True, "ready"),
        (ProcessKind.ROUTER, [], False, "starting"),
        (ProcessKind.BOOTSTRAP, [], False, "ready"),
        (ProcessKind.BOOTSTRAP, None, True, "starting"),
    ):
        spec = SPEC._replace(kind=kind)
        (found,) = replicas([spec], {"decode-0": RUNS}, set(), Seen(roster, healthy))
        assert found.state.value == state

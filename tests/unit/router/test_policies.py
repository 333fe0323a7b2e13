"""Who serves a request: by load, in turn, and never workers that can't hand over to each other."""

import pytest

from cluster.config import PolicyName
from cluster.errors import NoWorker, PromptTooLong
from cluster.layout import KVLayout
from cluster.messages import Fence, Heartbeat, Load, Member, ModelCard, Role
from router.fleet_view import FleetView, Stall
from router.policies import POLICIES, LeastLoad, Need, RoundRobin, Snapshot
from router.request_state import WorkerKey

LAYOUT = KVLayout(model="m", dtype="float32", page_size=16, layers=1, kv_heads=1, head_dim=8)
OTHER = KVLayout(model="m", dtype="bfloat16", page_size=16, layers=1, kv_heads=1, head_dim=8)
NEED = Need(prompt=100, output=50)
LEASE = 3.0


def member(name: str, epoch: int = 1, **changes) -> Member:
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    settings = {"layout": LAYOUT, "transfer": "nixl", "pool_pages": 64, "max_running": 8, **changes}
    return Member(name, role, epoch, f"http://{name}", model=ModelCard("m", 512, 1000), **settings)


def fleet(*members: Member, unified: bool = False) -> FleetView:
    view = FleetView(LEASE, unified=unified)
    for each in members:
        view.linked(view.joined(each), now=0.0)
    return view


def fence(name: str) -> Fence:
    return Fence(name, 1, 1, 1)


def chosen(policy, view: FleetView, need: Need = NEED, turn: int = 0) -> tuple[str | None, str | None]:
    placement = policy.place(view.snapshot(1.0), need, turn)
    return tuple(side.member.worker if side else None for side in placement)


def beat(view: FleetView, name: str, now: float = 1.0, **load) -> None:
    assert view.heartbeat(Heartbeat(name, 1, Load(**load)), now)


def test_least_load_takes_the_shortest_queue_and_the_emptiest_pool():
    view = fleet(member("p0"), member("p1"), member("d0"), member("d1"))
    beat(view, "p0", queued=1, queued_tokens=900)
    beat(view, "p1", queued=5, queued_tokens=400)
    beat(view, "d0", running=2, pages_used=60)
    beat(view, "d1", running=3, pages_used=10)
    assert chosen(LeastLoad(), view) == ("p1", "d1"), "tokens, not requests; pages, where they are scarcer than slots"


def test_a_burst_spreads_before_the_next_heartbeat_and_what_ends_counts_no_more():
    view = fleet(member("p0"), member("p1"), member("d0"), member("d1"))
    counts = {}
    for number in range(8):
        placement = LeastLoad().place(view.snapshot(1.0), NEED, number)
        for side in placement:
            view.commit(
                side.key, fence(str(number)), NEED.prompt, NEED.output, prefills=side.member.role is Role.PREFILL
            )
            counts[side.member.worker] = counts.get(side.member.worker, 0) + 1
    assert counts == {"p0": 4, "p1": 4, "d0": 4, "d1": 4}
    for number in range(8):
        view.release(WorkerKey("d0", 1), fence(str(number)))
    assert chosen(LeastLoad(), view)[1] == "d0"
    assert view.integrity_errors() == []


def test_our_own_work_is_not_counted_twice_when_a_heartbeat_reports_it():
    view = fleet(member("p0"), member("d0"))
    view.commit(WorkerKey("p0", 1), fence("a"), 100, 50, prefills=True)
    beat(view, "p0", queued=3, queued_tokens=250)
    (candidate,) = view.snapshot(1.0).prefill
    assert (candidate.tokens, candidate.attempts) == (250, 3)
    view.release(WorkerKey("p0", 1), fence("a"))
    (candidate,) = view.snapshot(1.0).prefill
    assert (candidate.tokens, candidate.attempts) == (150, 2), "what another router put there stays"


def test_equals_take_turns():
    view = fleet(member("p0"), member("p1"), member("d0"), member("d1"), member("d2"))
    assert {chosen(LeastLoad(), view, turn=turn) for turn in range(6)} == {
        (f"p{turn % 2}", f"d{turn % 3}") for turn in range(6)
    }


@pytest.mark.parametrize(("prefills", "decodes"), [(2, 2), (2, 3), (1, 3)])
def test_round_robin_uses_every_pair(prefills, decodes):
    view = fleet(*(member(f"p{n}") for n in range(prefills)), *(member(f"d{n}") for n in range(decodes)))
    turns = prefills * decodes * max(prefills, decodes)
    pairs = [chosen(RoundRobin(), view, turn=turn) for turn in range(turns)]
    assert len(set(pairs)) == prefills * decodes
    assert {side: pairs.count(side) for side in set(pairs)}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=[name.value for name in POLICIES])
def test_only_workers_that_can_hand_over_are_paired(policy):
    view = fleet(
        member("p0"), member("p1", layout=OTHER), member("d0", layout=OTHER), member("d1", transfer="mooncake")
    )
    assert {chosen(policy, view, turn=turn) for turn in range(8)} == {("p1", "d0")}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=[name.value for name in POLICIES])
def test_what_is_missing_is_said(policy):
    for members, words in (
        ([], "no prefill worker is live"),
        ([member("p0")], "no decode worker is live"),
        ([member("p0"), member("d0", layout=OTHER)], "bfloat16"),
        ([member("p0"), member("d0", transfer="mooncake")], "transfer mooncake"),
    ):
        with pytest.raises(NoWorker, match=words):
            chosen(policy, fleet(*members))
    with pytest.raises(NoWorker, match="no decode worker is live"):
        chosen(policy, fleet(unified=True))


def test_one_token_needs_no_decode_and_unified_no_prefill():
    assert chosen(LeastLoad(), fleet(member("p0")), Need(100, 1)) == ("p0", None)
    assert chosen(LeastLoad(), fleet(member("d0"), unified=True)) == (None, "d0")
    assert chosen(LeastLoad(), fleet(member("d0"), unified=True), Need(100, 1)) == (None, "d0")


def test_a_pool_must_hold_the_request():
    view = fleet(member("p0"), member("d0", pool_pages=4), member("d1", pool_pages=10))
    assert {chosen(LeastLoad(), view, turn=turn)[1] for turn in range(4)} == {"d1"}
    with pytest.raises(PromptTooLong, match=r"100 tokens.*61 more.*1024"):
        chosen(LeastLoad(), view, Need(100, 61))


def test_a_worker_is_live_while_linked_fresh_ready_and_staying():
    view = fleet(member("p0"), member("d0"), member("d1"), member("d2"), member("d3"))
    for name in ("p0", "d0", "d1", "d2"):
        beat(view, name, now=5.0, ready=name != "d1")
    view.left(WorkerKey("d2", 1))
    assert [candidate.member.worker for candidate in view.snapshot(5.0 + LEASE).decode] == ["d0"]
    assert view.snapshot(5.1 + LEASE).decode == []
    beat(view, "d0", now=9.0)
    view.unlinked(WorkerKey("d0", 1))
    assert view.snapshot(9.0).decode == []
    assert view.joined(member("d2")) == WorkerKey("d2", 1)
    assert [candidate.member.worker for candidate in view.snapshot(6.0).decode] == ["d2"], "back in the roster"


def test_another_life_of_a_worker_is_another_worker():
    view = fleet(member("p0"), member("d0"))
    view.left(WorkerKey("d0", 1))
    view.linked(view.joined(member("d0", epoch=2)), now=1.0)
    assert view.snapshot(1.0).decode[0].key == WorkerKey("d0", 2)
    assert not view.heartbeat(Heartbeat("d0", 3, Load()), 1.0)
    view.gone(WorkerKey("d0", 1))
    view.release(WorkerKey("d0", 1), fence("late"))


def test_limits_are_what_the_live_workers_can_take():
    view = fleet(member("p0"), member("d0", pool_pages=4), member("d1"))
    limits = view.limits(1.0)
    assert (limits.context_length, limits.vocab_size, limits.pool_tokens) == (512, 1000, 64 * 16)
    assert fleet(member("p0")).limits(1.0) is None


def test_every_policy_of_the_configuration_exists():
    assert set(POLICIES) == set(PolicyName)
    assert Snapshot([], [], unified=False).unified is False


def test_a_worker_stalls_when_it_is_silent_or_says_so_while_it_has_work_of_ours():
    view = fleet(member("p0"), member("d0"), member("d1"), member("d2"))
    for name in ("p0", "d0", "d1"):
        view.commit(WorkerKey(name, 1), fence("a"), 100, 50, prefills=False)
    beat(view, "d0", now=1.0, ready=False, stalled="the transfer thread has stopped")
    beat(view, "d1", now=2.0, ready=False)
    assert view.stalled(1.0 + LEASE) == {
        WorkerKey("p0", 1): Stall("it has been silent for 4.0 s", silent=True),
        WorkerKey("d0", 1): Stall("the transfer thread has stopped", silent=False),
    }, "d1 is not ready, but gets on; d2 has nothing to do"
    view.release(WorkerKey("p0", 1), fence("a"))
    view.unlinked(WorkerKey("d0", 1))
    assert view.stalled(1.0 + LEASE) == {}, "nothing to take away; and a broken link tells by itself"


def test_a_router_that_was_stuck_itself_takes_nobody_for_silent():
    view = fleet(member("p0"), member("d0"))
    view.commit(WorkerKey("d0", 1), fence("a"), 100, 50, prefills=False)
    view.slept(100.0)
    assert view.stalled(100.0 + LEASE) == {}
    assert len(view.snapshot(100.0 + LEASE).decode) == 1
    assert list(view.stalled(100.1 + LEASE)) == [WorkerKey("d0", 1)], "but from then on it has to speak"

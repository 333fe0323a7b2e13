"""Whom a placement avoids: those who failed, as long as there is another."""

import pytest

from cluster.messages import Role
from router.hints import Hints, narrowed
from router.policies import Candidate, LeastLoad, Need
from router.request_state import WorkerKey
from tests.unit.router.test_policies import fleet, member


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.member.worker for candidate in candidates]


def keys(*names: str) -> frozenset[WorkerKey]:
    return frozenset(WorkerKey(name, 1) for name in names)


@pytest.mark.parametrize(
    ("hints", "prefill", "decode"),
    [
        (Hints(), ["p0", "p1"], ["d0", "d1", "d2"]),
        (Hints(avoid=keys("d1")), ["p0", "p1"], ["d0", "d2"]),
        (Hints(avoid=keys("p0", "p1", "d0")), ["p0", "p1"], ["d1", "d2"]),
        (Hints(avoid=keys("d0"), keep=keys("d0", "p1")), ["p1"], ["d1", "d2"]),
        (Hints(shut=frozenset({("d2", Role.DECODE)}), keep=keys("d2")), ["p0", "p1"], ["d0", "d1"]),
        (Hints(shut=frozenset({("d0", Role.PREFILL)})), ["p0", "p1"], ["d0", "d1", "d2"]),
        (
            Hints(avoid=keys("d0", "d1"), shut=frozenset({("d2", Role.DECODE), ("p0", Role.PREFILL)})),
            ["p1"],
            ["d0", "d1"],
        ),
    ],
    ids=["none", "avoid", "nobody-else", "not-kept-if-avoided", "not-kept-if-shut", "by-leg", "shut-before-avoided"],
)
def test_a_side_is_narrowed_but_never_emptied(hints, prefill, decode):
    view = fleet(*(member(name) for name in ("p0", "p1", "d0", "d1", "d2")))
    found = narrowed(view.snapshot(1.0), hints)
    assert (names(found.prefill), names(found.decode)) == (prefill, decode)
    assert found.unified is False


def test_another_life_of_the_one_to_blame_is_not_to_blame():
    view = fleet(member("p0"), member("d0", epoch=2), member("d1"))
    found = narrowed(view.snapshot(1.0), Hints(avoid=keys("d0", "d1")))
    assert names(found.decode) == ["d0"]


def test_what_is_kept_is_where_the_policy_goes():
    view = fleet(member("p0"), member("p1"), member("d0"))
    placed = {
        LeastLoad().place(narrowed(view.snapshot(1.0), Hints(keep=keys("p1"))), Need(5, 5), turn).prefill.key.worker
        for turn in range(4)
    }
    assert placed == {"p1"}

"""The ledger: no page is lost, shared, or handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.pages import LedgerBroken, OutOfPages, Owner, OwnerKind, PageLedger

ALICE = Owner(OwnerKind.SEQUENCE, "alice")
BOB = Owner(OwnerKind.LEASE, "bob")


def test_pages_are_given_all_or_none():
    ledger = PageLedger(4)
    ledger.allocate(ALICE, 3)
    with pytest.raises(OutOfPages, match=r"lease bob needs 2 pages, 1 of 4 are free \(owned: sequence 3\)"):
        ledger.allocate(BOB, 2)
    assert (ledger.free, ledger.used, ledger.pages_of(BOB)) == (1, 3, [])


def test_moved_pages_keep_their_order_behind_those_that_are_there():
    ledger = PageLedger(6)
    first, second = ledger.allocate(ALICE, 2), ledger.allocate(BOB, 3)
    ledger.move(BOB, ALICE)
    assert ledger.pages_of(ALICE) == first + second
    assert ledger.counts()["lease"] == 0
    ledger.move(BOB, ALICE)
    ledger.move(ALICE, ALICE)
    assert ledger.pages_of(ALICE) == first + second


def test_counts_name_every_kind_so_that_gauges_return_to_zero():
    ledger = PageLedger(2)
    ledger.allocate(BOB, 2)
    assert ledger.counts() == {kind.value: 2 if kind is OwnerKind.LEASE else 0 for kind in OwnerKind}
    assert ledger.release(BOB) == 2
    assert ledger.release(BOB) == 0
    assert sum(ledger.counts().values()) == 0


def test_a_caller_can_not_change_the_ledger_through_what_it_returns():
    ledger = PageLedger(2)
    ledger.allocate(ALICE, 1).clear()
    ledger.pages_of(ALICE).clear()
    assert len(ledger.pages_of(ALICE)) == 1


def test_check_tells_which_page_has_two_owners_and_which_is_lost():
    ledger = PageLedger(3)
    (page,) = ledger.allocate(ALICE, 1)
    ledger._owned[BOB] = [page]
    lost = ledger._free.pop()
    with pytest.raises(LedgerBroken) as broken:
        ledger.check()
    assert f"page {page}: sequence alice and lease bob" in str(broken.value)
    assert f"page {lost}: lost" in str(broken.value)


class LedgerModel(RuleBasedStateMachine):
    """The ledger against a plain dictionary."""

    PAGES = 12
    owners = st.builds(Owner, st.sampled_from(OwnerKind), st.integers(0, 2))

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(self.PAGES)
        self.model: dict[Owner, list[int]] = {}

    @rule(owner=owners, count=st.integers(0, 6))
    def allocate(self, owner, count):
        free = self.PAGES - sum(map(len, self.model.values()))
        if count > free:
            with pytest.raises(OutOfPages):
                self.ledger.allocate(owner, count)
        else:
            self.model[owner] = self.model.get(owner, []) + self.ledger.allocate(owner, count)

    @rule(owner=owners, to=owners)
    def move(self, owner, to):
        self.ledger.move(owner, to)
        self.model[to] = self.model.get(to, []) + self.model.pop(owner, []) if owner != to else self.model.get(to, [])

    @rule(owner=owners)
    def release(self, owner):
        assert self.ledger.release(owner) == len(self.model.pop(owner, []))

    @invariant()
    def agrees(self):
        self.ledger.check()
        assert all(self.ledger.pages_of(owner) == pages for owner, pages in self.model.items())
        assert self.ledger.used == sum(map(len, self.model.values())) == sum(self.ledger.counts().values())


TestLedgerModel = LedgerModel.TestCase
TestLedgerModel.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)

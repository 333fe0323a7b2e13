"""Membership: who counts as alive, and what the watchers hear."""

from __future__ import annotations

import itertools

import pytest

from bootstrap.roster_state import MemberMachine, MemberState, RosterState, Tick
from cluster.errors import IllegalTransition, StaleFence
from cluster.layout import KVLayout
from cluster.messages import Heartbeat, Joined, Leave, Left, Load, Member, ModelCard, Register, Role

LAYOUT = KVLayout("model", "float32", 16, 2, 1, 8)
CARD = ModelCard("m", 512, 100)


def member(worker: str = "decode-0", epoch: int = 7) -> Member:
    return Member(worker, Role.DECODE, epoch, "http://127.0.0.1:1", LAYOUT, CARD, "nixl", 10, 4)


@pytest.fixture
def roster() -> RosterState:
    return RosterState(lease_seconds=3.0)


def test_a_new_member_is_announced_once(roster):
    assert roster.register(Register(member()), 0.0)[0].message == Joined(member())
    assert roster.register(Register(member()), 1.0) == []


def test_a_restarted_worker_replaces_its_former_life(roster):
    roster.register(Register(member(epoch=7)), 0.0)
    assert roster.register(Register(member(epoch=8)), 1.0)[0].message == Joined(member(epoch=8))
    assert [status.member.epoch for status in roster.roster(1.0).members] == [8]


def test_a_former_life_is_refused_whatever_it_says(roster):
    roster.register(Register(member(epoch=8)), 0.0)
    with pytest.raises(StaleFence, match="epoch 8"):
        roster.register(Register(member(epoch=7)), 1.0)
    with pytest.raises(StaleFence):
        roster.handle(Heartbeat("decode-0", 7, Load()), 1.0)
    with pytest.raises(StaleFence):
        roster.handle(Leave("decode-0", 7, "bye"), 1.0)
    assert len(roster.roster(1.0).members) == 1


def test_a_former_life_is_refused_even_after_the_lease_of_the_later_one(roster):
    roster.register(Register(member(epoch=8)), 0.0)
    roster.tick(10.0)
    with pytest.raises(StaleFence):
        roster.register(Register(member(epoch=7)), 11.0)


def test_a_lease_ends_just_after_its_time_and_a_heartbeat_renews_it(roster):
    roster.register(Register(member()), 0.0)
    roster.handle(Heartbeat("decode-0", 7, Load(running=3)), 2.0)
    assert roster.tick(5.0) == []
    (announce,) = roster.tick(5.01)
    assert isinstance(announce.message, Left)
    assert "no heartbeat" in announce.message.reason
    assert roster.roster(5.01).members == []
    assert roster.tick(6.0) == []


def test_while_bootstrap_was_stuck_nobody_was_silent(roster):
    roster.register(Register(member()), 0.0)
    roster.slept(60.0)
    assert roster.tick(62.9) == []
    assert len(roster.tick(63.1)) == 1, "but from then on it is"


def test_the_roster_carries_the_last_load_and_its_age(roster):
    roster.register(Register(member()), 0.0)
    roster.handle(Heartbeat("decode-0", 7, Load(running=3)), 2.0)
    (status,) = roster.roster(2.5).members
    assert (status.load.running, status.age_seconds) == (3, 0.5)


def test_a_heartbeat_is_no_news_to_anybody_else(roster):
    """Or each of n workers would hear n heartbeats in each interval."""
    roster.register(Register(member()), 0.0)
    assert roster.handle(Heartbeat("decode-0", 7, Load(running=3)), 2.0) == []


def test_leaving_is_announced_and_coming_back_is_joining(roster):
    roster.register(Register(member()), 0.0)
    assert isinstance(roster.handle(Leave("decode-0", 7, "stopped"), 1.0)[0].message, Left)
    assert isinstance(roster.register(Register(member()), 2.0)[0].message, Joined)


def test_heartbeats_of_strangers_are_ignored(roster):
    assert roster.handle(Heartbeat("nobody", 1, Load()), 0.0) == []


def test_who_was_only_silent_comes_back_with_its_next_heartbeat(roster):
    """A worker that was stopped, or cut off: its connection stands, so it does not register again."""
    roster.register(Register(member()), 0.0)
    roster.tick(5.0)
    beat = Heartbeat("decode-0", 7, Load(running=1))
    assert [announce.message for announce in roster.handle(beat, 9.0)] == [Joined(member())]
    assert [status.load.running for status in roster.roster(9.0).members] == [1]


def test_who_has_said_goodbye_does_not_come_back_by_a_late_heartbeat(roster):
    roster.register(Register(member()), 0.0)
    roster.tick(5.0)
    assert roster.handle(Leave("decode-0", 7, "stopped"), 6.0) == [], "they know already"
    assert roster.handle(Heartbeat("decode-0", 7, Load()), 6.1) == []
    assert roster.roster(6.1).members == []


ABSENT, LIVE, SILENT = MemberState.ABSENT, MemberState.LIVE, MemberState.SILENT
AFTERWARDS = {
    (ABSENT, Register): LIVE,
    (ABSENT, Heartbeat): ABSENT,
    (ABSENT, Leave): ABSENT,
    (ABSENT, Tick): ABSENT,
    (LIVE, Register): LIVE,
    (LIVE, Heartbeat): LIVE,
    (LIVE, Leave): ABSENT,
    (LIVE, Tick): SILENT,
    (SILENT, Register): LIVE,
    (SILENT, Heartbeat): LIVE,
    (SILENT, Leave): ABSENT,
    (SILENT, Tick): SILENT,
}
EVENTS = [Register(member()), Heartbeat("decode-0", 7, Load()), Leave("decode-0", 7, "x"), Tick()]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(MemberState, EVENTS)), ids=str)
def test_where_every_event_leads_from_every_state(state, event):
    machine = MemberMachine("decode-0", 3.0)
    machine.handle(Register(member()), 0.0)
    if state is ABSENT:
        machine.handle(Leave("decode-0", 7, "x"), 0.5)
    elif state is SILENT:
        machine.handle(Tick(), 50.0)
    machine.handle(event, 100.0)
    assert machine.state is AFTERWARDS[state, type(event)]


def test_an_event_that_is_not_in_the_table_raises_with_the_story():
    machine = MemberMachine("decode-0", 3.0)
    machine.handle(Register(member()), 0.0)
    with pytest.raises(IllegalTransition, match=r"no transition for Joined in LIVE.*Register--> LIVE"):
        machine.handle(Joined(member()), 1.0)

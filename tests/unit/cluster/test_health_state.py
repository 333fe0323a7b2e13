"""Stalled is not busy, a death is not the end, and who was away himself judges nobody."""

from __future__ import annotations

import os

import pytest

from cluster.config import Restarts
from cluster.errors import IllegalTransition
from cluster.health_state import (
    Cause,
    DrainAsked,
    EngineDied,
    EngineUp,
    GiveUp,
    HealthState,
    KillEngine,
    Looked,
    Part,
    Stalled,
    StartEngine,
    Tell,
    WorkerHealth,
)
from cluster.progress_board import Progress, ProgressBoard
from cluster.restarts import RestartBudget

HEARTBEAT = 1.0
LOOK = HEARTBEAT / 4
LIMIT = 60.0
TRANSFER_LIMIT = 15.0


class Watched:
    """A worker's health, and the figures on its board."""

    def __init__(self) -> None:
        self.health = WorkerHealth("w", HEARTBEAT, LIMIT, TRANSFER_LIMIT, RestartBudget(Restarts(most=2)))
        self.now = 100.0
        self.engine = 0
        self.transfers = 0
        self.step_began: float | None = None
        self.silent_until = 0.0
        self.actions = self.health.handle(EngineUp(), self.now)

    def look(self, *, engine: bool = True, transfers: bool = True, after: float = LOOK) -> None:
        """Looks again; whether the parts have moved meanwhile."""
        self.now += after
        self.engine += engine
        self.transfers += transfers
        progress = Progress(self.engine, self.transfers, self.step_began, None, self.silent_until)
        self.actions += self.health.handle(Looked(progress), self.now)

    def looks(self, seconds: float, **moves: bool) -> None:
        for _ in range(round(seconds / LOOK)):
            self.look(**moves)


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    watched.looks(2.0)
    assert watched.actions == [Tell()]
    return watched


@pytest.mark.parametrize(
    ("still", "part", "words"),
    [
        ("engine", Part.ENGINE, "the engine process has made no progress for"),
        ("transfers", Part.TRANSFERS, "the transfer thread has made no progress for"),
    ],
)
def test_what_stands_still_makes_the_worker_unready_before_the_third_heartbeat(watched, still, part, words):
    begun = watched.now
    while watched.health.ready:
        watched.look(**{still: False})
        assert watched.now - begun < 3 * HEARTBEAT
    assert watched.health.state is HealthState.STALLED
    assert watched.health.reason.startswith(f"stalled: {words}")
    _, stalled, tell = watched.actions
    assert (stalled.part, tell) == (part, Tell())


def test_a_step_of_half_a_minute_that_computes_its_layers_is_busy_and_not_stalled(watched):
    watched.step_began = watched.now
    for second in range(30):
        watched.looks(1.0, engine=False)
        watched.engine += 1
        assert watched.health.ready, f"after {second} s"


def test_a_stalled_step_tells_since_when_it_is_under_way(watched):
    watched.step_began = watched.now - 10.0
    watched.looks(3.0, engine=False)
    assert "(in a step that began 13.0 s ago)" in watched.health.reason


def test_what_moves_again_is_ready_again_and_is_told_once_each_time(watched):
    watched.looks(5.0, engine=False)
    watched.look()
    assert watched.health.ready and watched.health.reason == watched.health.stalled == ""
    assert [type(action) for action in watched.actions] == [Tell, Stalled, Tell, Tell]


def test_a_stall_without_end_is_no_life_and_the_engine_is_killed_once(watched):
    watched.looks(LIMIT - 1.0, engine=False)
    assert watched.health.live
    watched.looks(5.0, engine=False)
    assert not watched.health.live
    assert [type(action) for action in watched.actions].count(KillEngine) == 1
    watched.actions = watched.health.handle(EngineDied("killed"), watched.now)
    assert watched.actions == [StartEngine(0.0, Cause.STALL)]
    assert watched.health.live
    assert watched.health.reason.startswith("restarting: killed, as the engine process has made no progress for 6")


def test_a_transfer_engine_that_holds_its_thread_alone_costs_the_process_after_the_writes_deadline(watched):
    watched.looks(TRANSFER_LIMIT - 1.0, transfers=False)
    assert watched.health.live
    watched.looks(2.0, transfers=False)
    assert not watched.health.live
    (kill,) = [action for action in watched.actions if isinstance(action, KillEngine)]
    assert kill.reason.startswith("the transfer thread has made no progress for 15")


def test_a_process_that_stands_still_as_a_whole_gets_the_time_of_a_stall(watched):
    watched.looks(LIMIT - 1.0, engine=False, transfers=False)
    assert watched.health.live
    watched.looks(2.0, engine=False, transfers=False)
    assert not watched.health.live


def test_nobody_is_judged_for_the_time_in_which_we_did_not_run_ourselves(watched):
    watched.look(engine=False, transfers=False, after=30.0)
    watched.looks(2.0, engine=False, transfers=False)
    assert watched.health.ready, "they get as much time as after a start"
    watched.looks(1.0, engine=False)
    assert watched.health.state is HealthState.STALLED


def test_a_silence_that_was_announced_is_no_stall_until_it_is_over(watched):
    watched.silent_until = watched.now + 20.0
    watched.looks(19.0, engine=False, transfers=False)
    assert watched.health.ready
    watched.looks(4.0, engine=False)
    assert watched.health.state is HealthState.STALLED


def test_the_counters_of_a_new_engine_are_not_compared_with_those_of_the_old_one(watched):
    watched.health.handle(EngineDied("signal SIGKILL"), watched.now)
    assert watched.health.state is HealthState.RESTARTING
    watched.now += 20.0
    watched.health.handle(EngineUp(), watched.now)
    watched.look(engine=False, transfers=False)
    assert watched.health.ready


def test_too_many_deaths_end_the_worker(watched):
    actions = [action for _ in range(3) for action in watched.health.handle(EngineDied("again"), watched.now)]
    assert actions == [StartEngine(0.0), StartEngine(0.5), GiveUp("it has died 3 times within 300 s")]
    with pytest.raises(IllegalTransition):
        watched.health.handle(EngineUp(), watched.now)


def test_what_could_not_start_is_not_tried_again():
    health = WorkerHealth("w", HEARTBEAT, LIMIT, TRANSFER_LIMIT, RestartBudget(Restarts()))
    assert health.reason == "starting"
    assert health.handle(EngineDied("no such model"), 1.0) == [GiveUp("it could not start")]


def test_a_draining_worker_is_not_ready_and_its_engine_is_not_started_anew(watched):
    assert watched.health.handle(DrainAsked(), watched.now) == [Tell()]
    assert (watched.health.ready, watched.health.reason) == (False, "draining")
    watched.looks(3.0, engine=False)
    assert watched.health.stalled
    assert watched.health.state is HealthState.DRAINING
    assert watched.health.handle(EngineDied("killed"), watched.now) == []


def test_patience_covers_the_naps_of_idle_threads_however_fast_the_heartbeats_are():
    health = WorkerHealth("w", 0.05, LIMIT, TRANSFER_LIMIT, RestartBudget(Restarts()))
    health.handle(EngineUp(), 0.0)
    for look in range(1, 100):
        now = look * 0.0125
        health.handle(Looked(Progress(int(now / 0.5), int(now / 0.5))), now)
        assert health.ready


def test_a_board_shows_in_one_process_what_another_marks():
    ours = ProgressBoard.create()
    theirs = ProgressBoard.attach(os.dup(ours.descriptor))
    assert ours.read() == Progress()
    theirs.advance()
    theirs.advance()
    theirs.step_begins(5.0)
    theirs.transfers_seen(4.0)
    assert ours.read() == Progress(2, 1, 5.0, 4.0)
    theirs.step_ends()
    theirs.transfers_seen(None)
    theirs.expect_silence(6.0)
    assert ours.read() == Progress(2, 2, silent_until=6.0)
    theirs.close()
    ours.close()

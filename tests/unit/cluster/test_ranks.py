"""What the ranks of one worker share out among them, say to each other, and show together."""

from __future__ import annotations

import socket

import pytest

from cluster.progress_board import DistantBoard, GroupBoard, ProgressBoard
from cluster.ranks import ALONE, Frames, Rank, RankGone


def test_ranks_divide_a_workers_cores_and_share_what_is_too_little():
    assert ALONE.share_of([4, 5, 6]) == [4, 5, 6]
    assert [Rank(number, 2).share_of([4, 5, 6]) for number in range(2)] == [[4, 6], [5]]
    assert [Rank(number, 3).share_of([4, 5]) for number in range(3)] == [[4], [5], [4]]
    spread = [Rank(number, 4, hosts=2) for number in range(4)]
    assert [(rank.place, rank.share_of([4, 5])) for rank in spread] == [(0, [4]), (1, [5])] * 2, "of each host's own"
    assert ALONE.leads and not Rank(1, 2).leads


def test_frames_arrive_whole_and_in_order_until_the_other_end_hangs_up():
    ours, theirs = (Frames(end) for end in socket.socketpair())
    frames = [b"", b"x" * 100_000, b"last"]
    for frame in frames:
        ours.send(frame)
    ours.hang_up()
    assert [theirs.receive() for _ in frames] == frames
    with pytest.raises(RankGone):
        theirs.receive()
    ours.close()
    with pytest.raises(RankGone):
        theirs.send(b"anybody there?")
    theirs.close()


def test_a_step_gets_on_when_any_rank_does():
    """Rank 0 waits for the last stage."""
    boards = [ProgressBoard.create() for _ in range(2)]
    group = GroupBoard(boards)
    before = group.read()
    boards[1].advance()
    assert group.read().engine > before.engine
    group.close()


def test_transfers_get_on_when_those_of_all_ranks_do():
    boards = [ProgressBoard.create() for _ in range(2)]
    group = GroupBoard(boards)
    before = group.read()
    boards[0].transfers_seen(7.0)
    boards[0].advance()
    seen = group.read()
    assert (seen.engine, seen.transfers, seen.oldest_transfer) == (before.engine + 1, before.transfers, 7.0)
    boards[1].transfers_seen(3.0)
    assert (group.read().transfers, group.read().oldest_transfer) == (before.transfers + 1, 3.0)
    boards[1].transfers_seen(None)
    assert group.read().transfers == before.transfers + 1, "the first rank's have not been looked after since"
    group.close()


def test_what_is_heard_of_a_rank_on_another_host_counts_like_what_is_seen():
    here, elsewhere = ProgressBoard.create(), DistantBoard()
    group = GroupBoard([here, elsewhere])
    before = group.read()
    here.transfers_seen(None)
    elsewhere.heard(engine=4, transfers=1, oldest_transfer=2.0)
    seen = group.read()
    assert (seen.engine, seen.transfers, seen.oldest_transfer) == (before.engine + 4, before.transfers + 1, 2.0)
    group.close()

"""The channel between a worker's two processes, and the loop that reads it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from cluster.clock import ManualClock
from cluster.engine_messages import EngineLoad, RouterGone, Stop
from cluster.errors import UnknownMessage
from cluster.ipc import ControlChannel, ControlGone, EngineChannel, Unframer, frame
from cluster.messages import Load
from cluster.progress_board import ProgressBoard
from cluster.step_loop import StepLoop

MESSAGES = [RouterGone("a"), RouterGone("b" * 100_000), Stop()]


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_survive_any_cut_of_the_stream():
    stream = b"".join(frame(message) for message in MESSAGES)
    for size in (1, 3, 4, 5, 4096, len(stream)):
        unframer = Unframer()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [message for piece in pieces for message in unframer.feed(piece)] == MESSAGES


def test_a_frame_that_is_no_message_is_refused():
    with pytest.raises(UnknownMessage):
        list(Unframer().feed(b"\0\0\0\3abc"))


def test_receive_takes_what_is_there_and_does_not_wait(ends):
    ours, theirs = ends
    channel = EngineChannel(theirs)
    assert channel.receive() == []
    ours.sendall(frame(MESSAGES[0]) + frame(MESSAGES[2])[:5])
    assert channel.receive() == [MESSAGES[0]]
    ours.sendall(frame(MESSAGES[2])[5:])
    assert channel.receive() == [MESSAGES[2]]


def test_messages_of_one_kind_can_be_taken_ahead_of_the_others(ends):
    ours, theirs = ends
    channel = EngineChannel(theirs)
    ours.sendall(b"".join(frame(message) for message in (RouterGone("a"), Stop(), RouterGone("b"))))
    assert channel.receive_only((Stop,)) == [Stop()]
    channel.wait(30.0)  # returns at once: there is something to receive
    ours.sendall(frame(RouterGone("c")))
    assert channel.receive_only((Stop,)) == []
    assert channel.receive() == [RouterGone("a"), RouterGone("b"), RouterGone("c")]
    assert channel.receive() == []


def test_send_never_blocks_and_loses_nothing_when_the_reader_is_slow(ends):
    ours, theirs = ends
    channel = EngineChannel(theirs)
    sent = [RouterGone(f"{number}-" + "x" * 50_000) for number in range(40)]
    for message in sent:
        channel.send(message)
        channel.flush()
    unframer, received = Unframer(), []
    ours.settimeout(5)
    while len(received) < len(sent):
        received += unframer.feed(ours.recv(1 << 20))
        channel.flush()
    assert received == sent


def test_the_end_of_the_control_process_is_noticed(ends):
    ours, theirs = ends
    channel = EngineChannel(theirs)
    ours.close()
    with pytest.raises(ControlGone):
        channel.receive()


def test_wake_ends_a_wait_from_another_thread_even_if_it_came_before(ends):
    _, theirs = ends
    channel = EngineChannel(theirs)
    started = time.monotonic()
    channel.wake()
    channel.wait(30.0)
    thread = threading.Thread(target=channel.wake)
    thread.start()
    channel.wait(30.0)
    thread.join()
    assert time.monotonic() - started < 10.0


async def test_the_control_side_gets_messages_in_order_and_then_the_end(ends):
    ours, theirs = ends
    control = await ControlChannel.open(ours)
    channel = EngineChannel(theirs)
    for message in (MESSAGES[0], MESSAGES[2]):
        channel.send(message)
    channel.drain()
    received = await control.receive()
    while len(received) < 2:
        received += await control.receive()
    assert received == [MESSAGES[0], MESSAGES[2]]
    control.post(MESSAGES[1])
    while not (got := channel.receive()):
        await asyncio.to_thread(channel.wait, 5.0)
    assert got == [MESSAGES[1]]
    theirs.shutdown(socket.SHUT_RDWR)
    assert await control.receive() == []
    await control.close()


@pytest.fixture
def board():
    board = ProgressBoard.create()
    yield board
    board.close()


class CountingHandler:
    """Has `work` steps to do."""

    def __init__(self, work: int) -> None:
        self.work = work
        self.handled: list[object] = []
        self.closed = 0

    def handle(self, message, now):
        self.handled.append(message)
        self.work += 1

    def step(self, now):
        busy = self.work > 0
        self.work -= busy
        return busy

    def load(self):
        return Load(running=self.work)

    def close(self):
        self.closed += 1


def test_the_loop_works_reports_when_idle_and_stops_on_demand(ends, board):
    ours, theirs = ends
    handler = CountingHandler(work=2)
    ours.sendall(frame(RouterGone("r")) + frame(Stop()))
    StepLoop(handler, EngineChannel(theirs), ManualClock(), board).run()
    assert handler.handled == [RouterGone("r")]
    assert handler.closed == 1


def test_an_idle_loop_says_so_at_once(ends, board):
    ours, theirs = ends
    handler = CountingHandler(work=3)
    loop = threading.Thread(target=StepLoop(handler, EngineChannel(theirs), ManualClock(), board).run)
    loop.start()
    ours.settimeout(10)
    unframer, loads = Unframer(), []
    while not loads or loads[-1].load.running:
        loads += unframer.feed(ours.recv(4096))
    ours.close()
    loop.join(10)
    assert loads[-1] == EngineLoad(Load(running=0))
    assert handler.closed == 1, "the end of the control process ends the loop"


def test_each_turn_is_marked_and_so_is_the_step_under_way(ends, board):
    ours, theirs = ends
    seen = []

    class Looking(CountingHandler):
        def step(self, now):
            seen.append(board.read())
            if len(seen) == 3:
                ours.sendall(frame(Stop()))
            return super().step(now)

    StepLoop(Looking(work=1), EngineChannel(theirs), ManualClock(start=7.0), board).run()
    assert [(progress.engine, progress.step_began) for progress in seen] == [(0, 7.0), (1, 7.0), (2, 7.0)]
    assert board.read().step_began is None

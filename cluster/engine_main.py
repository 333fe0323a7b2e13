"""Starting an engine process: arguments, logs, pinning, the channel; then its step loop, or where it is a follower
(`cluster.ranks`) what rank 0 says; every end has a last word."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.engine_host import failure
from cluster.engine_messages import EngineReady, RankReady, ToPeer
from cluster.errors import BatonError
from cluster.ipc import ControlGone, EngineChannel
from cluster.logging import configure, get_logger
from cluster.messages import EngineRank, Message, PeerMessage
from cluster.process import die_with_parent, forget_garbage, leave_interrupts_to_parent, pin
from cluster.progress_board import ProgressBoard
from cluster.ranks import ALONE, Meeting, MeetingFile, MeetingPort, Rank, RankGone
from cluster.section import Cores
from cluster.step_loop import StepHandler, StepLoop
from cluster.topology import load_topology

log = get_logger(__name__)


@dataclass(frozen=True)
class EngineContext:
    """What a role needs to build its engine process."""

    topology: Topology
    name: str
    host: str
    epoch: int
    """Nanoseconds since 1970 at this process's start: of two lives of one worker, the later has the higher one."""
    cores: list[int]
    """What this process may run on, one compute thread each."""
    channel: EngineChannel
    board: ProgressBoard
    clock: MonotonicClock
    rank: Rank = ALONE

    def send(self, message: Message) -> None:
        """To the control process, now if the socket takes it."""
        self.channel.send(message)
        self.channel.flush()

    def expect_silence(self, seconds: float) -> None:
        """For so long at most the step loop will show no progress, and that is as it should be; 0: it goes on."""
        self.board.expect_silence(self.clock.now() + seconds)

    def send_to_peer(self, worker: str, epoch: int, message: PeerMessage) -> None:
        self.send(ToPeer(worker, epoch, message))


Build = Callable[[EngineContext], tuple[StepHandler, EngineReady]]
Follow = Callable[[EngineContext], tuple[Callable[[], None], EngineRank]]
"""A follower's work, which ends by `RankGone` and nothing else, and what peers have to know of it."""


def main(program: str, cores_of: Callable[[Topology], Cores], build: Build, follow: Follow) -> int:
    """Runs one engine process to its end and returns its exit status. Called by the process's `__main__` only."""
    epoch = time.time_ns()
    die_with_parent()
    leave_interrupts_to_parent()
    arguments = _parse(program)
    channel = EngineChannel(socket.socket(fileno=arguments.channel))
    board = ProgressBoard.attach(arguments.board)
    try:
        topology = load_topology(arguments.topology, arguments.set)
        configure(arguments.name, topology.logging)
        cpus = cores_of(topology)
        rank = Rank.inherited(arguments.rank, arguments.ranks, arguments.hosts, _meeting(arguments), arguments.links)
        cores = _place(cpus[arguments.index % len(cpus)] if cpus else [], rank)
        context = EngineContext(
            topology, arguments.name, arguments.host, epoch, cores, channel, board, MonotonicClock(), rank
        )
        if rank.leads:
            _lead(context, build)
        else:
            _follow(context, follow)
    except ControlGone:
        return 0
    except RankGone as gone:
        log.warning("the engine process stops", reason=str(gone))
        return 0
    except Exception as error:
        if isinstance(error, BatonError):
            log.error("the engine process stops", error=str(error))
        else:
            log.exception("the engine process stops by a defect", error=f"{type(error).__name__}: {error}")
        channel.send(failure(error))
        with contextlib.suppress(OSError):
            channel.drain()
        return 1
    return 0


def _lead(context: EngineContext, build: Build) -> None:
    handler, ready = build(context)
    forget_garbage()
    context.channel.send(ready)
    StepLoop(handler, context.channel, context.clock, context.board).run()


def _follow(context: EngineContext, follow: Follow) -> None:
    work, rank = follow(context)
    forget_garbage()
    context.send(RankReady(rank))
    work()


def _place(cores: Sequence[int], rank: Rank) -> list[int]:
    """Pins this process to its rank's share of `cores`, if any; returns its cores."""
    if not cores:
        return rank.share_of(pin([]))
    return pin(rank.share_of(cores))


def _meeting(arguments: argparse.Namespace) -> Meeting | None:
    if arguments.meet_at is not None:
        host, port = arguments.meet_at
        return MeetingPort(host, int(port), arguments.host, arguments.meeting)
    if arguments.meeting is not None:
        return MeetingFile(f"/proc/{os.getpid()}/fd/{arguments.meeting}")
    return None


def _parse(program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--channel", type=int, required=True, help="file descriptor of the control process's socket")
    parser.add_argument("--board", type=int, required=True, help="file descriptor of the shared progress board")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=1, help="that the ranks are spread over")
    parser.add_argument("--links", type=int, nargs="*", default=[], help="see cluster.ranks.Rank.inherited")
    parser.add_argument("--meeting", type=int, help="file descriptor of what the ranks meet by: a file, or a listener")
    parser.add_argument("--meet-at", nargs=2, metavar=("HOST", "PORT"), help="where, if they are on several hosts")
    parser.add_argument("--topology", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--host", required=True)
    return parser.parse_args()

"""An engine of several ranks, all of them in this process: the followers are threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from unittest import mock

from cluster.ranks import Frames, Rank, RankGone
from engine import loaded_model
from engine.engine import Engine
from engine.followers import Follower
from engine.group import ThreadGroup, ThreadMeeting
from engine.joining import Parts
from engine.line import ThreadLine, ThreadPipes
from engine.shard import Shard
from engine.stage import Stage

LATE = 60.0


class _Meeting:
    """In place of `join_ranks`."""

    def __init__(self, grid):
        self._pipes = ThreadPipes(grid)
        self._everyone = ThreadMeeting(grid.ranks)
        self._stages = [ThreadMeeting(grid.shards) for _ in range(grid.stages)]

    def join(self, config, grid, rank, device, *settings):
        stage = Stage(config, ThreadLine(self._pipes, rank.number))
        shard = None
        if grid.shards > 1:
            together = self._stages[grid.stage_of(rank.number)]
            shard = Shard(stage.config, ThreadGroup(together, grid.shard_of(rank.number)))
        return Parts(ThreadGroup(self._everyone, rank.number), stage, shard)


class ThreadRanks:
    """`engine` is rank 0's, `caches` are the others' KV pools. `close` ends their threads."""

    def __init__(self, config):
        ranks = config.grid.ranks
        self.caches = [None] * (ranks - 1)
        self._threads = []
        self._leaders = []
        loaded = threading.Barrier(ranks)
        with mock.patch.object(loaded_model, "join_ranks", _Meeting(config.grid).join):
            for number in range(1, ranks):
                ours, theirs = (Frames(end) for end in socket.socketpair())
                self._leaders.append(ours)
                follow = (config, Rank(number, ranks, steps=(theirs,)), loaded)
                self._threads.append(threading.Thread(target=self._follow, args=follow, daemon=True))
                self._threads[-1].start()
            try:
                self.engine = Engine(config, rank=Rank(0, ranks, steps=tuple(self._leaders)))
                loaded.wait(LATE)
            except BaseException:
                loaded.abort()
                self.close()
                raise

    def close(self):
        for leader in self._leaders:
            leader.close()
        for thread in self._threads:
            thread.join(LATE)
            assert not thread.is_alive()

    def _follow(self, config, rank, loaded):
        with contextlib.suppress(RankGone), contextlib.closing(rank.steps[0]):
            model = loaded_model.load_model(config, rank)
            self.caches[rank.number - 1] = model.cache
            loaded.wait(LATE)
            Follower(model.decoder, rank.steps[0], model.line).run()

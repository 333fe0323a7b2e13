"""What the stages of a model say to each other: hidden states go down the line, logits from its end back to rank 0.

Each shard has a line of its own, from stage to stage; logits come from the last stage's first shard. All methods are
called on the step loop's thread. Whatever is sent arrives in order, and each stage computes its steps in that order: so
the answer to one step says that all stages have computed it, and all before it. When a rank dies, whoever waits for it
is ended from outside (`cluster.engine_host`), or finds that it has gone.
"""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as distributed
from torch import Tensor

from cluster.shards import Grid
from engine.group import ranks_gone

NO_LOGITS = 1
"""Values in the answer to a step that sampled nothing."""


class Line(Protocol):
    stage: int
    stages: int

    def send(self, hidden: Tensor) -> None:
        """To the next stage. Returns at once; `hidden` may change afterwards."""

    def receive(self, hidden: Tensor) -> None:
        """What the stage before sent, into `hidden`, which is contiguous and of the same shape."""

    def answer(self, logits: Tensor) -> None:
        """By each rank, after each step: those of the last stage's first shard go to rank 0, [rows, vocabulary]."""

    def receive_answer(self, rows: int) -> Tensor:
        """On rank 0: the float32 logits of the oldest step that was not asked for, in memory of their own. Waits for
        them."""


class TorchLine:
    """Implements `Line` by torch.distributed, once this process has joined it: gloo on CPU, NCCL on CUDA."""

    def __init__(self, grid: Grid, rank: int, vocabulary: int, device: torch.device) -> None:
        """All ranks must make theirs, and all together. `vocabulary`: how many logits a row has."""
        self._vocabulary = vocabulary
        self._device = device
        self.stage, self.stages = grid.stage_of(rank), grid.stages
        self._before, self._next = rank - grid.shards, rank + grid.shards
        self._last = grid.rank(grid.stages - 1, 0)
        self._answers_itself = rank == self._last
        # With NCCL what goes from a rank to another, and back, is one queue: an answer must not wait there behind the
        # next step's hidden states, which are received when it has gone.
        self._answers = distributed.new_group([0, self._last])
        self._sent: deque[tuple[Any, Tensor]] = deque()
        """Under way, with the memory that they are sent from."""

    def send(self, hidden: Tensor) -> None:
        self._post(hidden.clone(), self._next)

    def receive(self, hidden: Tensor) -> None:
        with ranks_gone():
            distributed.recv(hidden, self._before)

    def answer(self, logits: Tensor) -> None:
        if self._answers_itself:
            self._post(logits.clone() if len(logits) else logits.new_zeros(NO_LOGITS), 0, self._answers)

    def receive_answer(self, rows: int) -> Tensor:
        logits = torch.empty(rows * self._vocabulary or NO_LOGITS, dtype=torch.float32, device=self._device)
        with ranks_gone():
            distributed.recv(logits, self._last, self._answers)
        return logits[: rows * self._vocabulary].view(rows, self._vocabulary)

    def _post(self, tensor: Tensor, to: int, group: distributed.ProcessGroup | None = None) -> None:
        """Rank 0 has no more steps under way than there are stages: so what was sent as many steps ago has arrived."""
        with ranks_gone():
            self._sent.append((distributed.isend(tensor, to, group), tensor))
            if len(self._sent) > self.stages:
                self._sent.popleft()[0].wait()


class ThreadPipes:
    """What the `ThreadLine`s of one process have in common."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hidden: list[SimpleQueue[Tensor]] = [SimpleQueue() for _ in range(grid.ranks)]
        """To each rank."""
        self.answers: SimpleQueue[Tensor] = SimpleQueue()


class ThreadLine:
    """Implements `Line` for ranks that are threads of one process: for tests."""

    def __init__(self, pipes: ThreadPipes, rank: int) -> None:
        self.stage, self.stages = pipes.grid.stage_of(rank), pipes.grid.stages
        self._pipes = pipes
        self._rank = rank

    def send(self, hidden: Tensor) -> None:
        self._pipes.hidden[self._rank + self._pipes.grid.shards].put(hidden.clone())

    def receive(self, hidden: Tensor) -> None:
        hidden.copy_(self._pipes.hidden[self._rank].get())

    def answer(self, logits: Tensor) -> None:
        if self._rank == self._pipes.grid.rank(self.stages - 1, 0):
            self._pipes.answers.put(logits.clone())

    def receive_answer(self, rows: int) -> Tensor:
        logits = self._pipes.answers.get()
        assert len(logits) == rows
        return logits

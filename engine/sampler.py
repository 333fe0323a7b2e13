"""Chooses the next token of each sequence of a batch from its logits.

A row's result depends on its own logits, settings, seed and position only. Each filter (top-k, top-p, min-p) is a
threshold on the row's own probabilities: what ties with the threshold stays. The choice is the inverse of the
cumulative distribution in the order of the vocabulary, not of the probabilities, so that two nearly equal tokens that
change places don't change what is drawn.

`draw` leaves the tokens on the device that has the logits, and waits for nothing there: who asks a GPU for a number
gets it when all before is done. `Drawn.read` waits. (Of flashinfer's samplers only the filters serve, see
`engine.operators.nucleus`: their noise depends on a row's place in the batch, and ours may not.)
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster.messages import Logprobs, Sampling
from engine.decoder import Unread
from engine.noise import uniform
from engine.sequence import Sequence
from engine.transit import ToHost, to_device

NUCLEUS_WIDTHS = (64, 1024)
"""How many of the most likely tokens are sorted, until their mass reaches top-p; after these, all."""
PROBABILITY_BITS = 30
"""Of a float32 from 0 to 1, but for those that are always 0."""
ROWS_AT_ONCE = 8
"""Rows that a CPU draws together: their float64 temporaries stay in the cache."""
ROWS_AT_ONCE_ON_DEVICE = 64
"""Rows that a GPU does: their temporaries take some hundred megabytes, with the largest vocabularies."""

LEAST_TEMPERATURE = 1e-6
"""Below it a row is greedy: logits a thousandth apart are e^1000 apart in odds, and float32 soon divides by zero."""


Nucleus = Callable[[Tensor, Tensor], Tensor]
"""(probabilities [rows, vocabulary], mass [rows, 1]) -> of each row, the least probability [rows, 1] of the fewest most
likely tokens that hold `mass`; that of the first one if it holds it alone."""


class Choice(NamedTuple):
    token: int
    logprobs: Logprobs | None


class Drawn:
    """The next token of each sequence of a step, and what is to be told of it."""

    def __init__(self, tokens: Tensor, reported: list[int], counts: list[int], report: list[Tensor]) -> None:
        """`report`, see `_report`, is of the rows `reported`, each of which is told its `counts` best."""
        self.tokens = tokens
        """int64 [rows], where they were drawn."""
        self._reported = reported
        self._counts = counts
        self._on_the_way = ToHost([tokens, *report], tokens.device)

    def read(self) -> list[Choice]:
        """On the host; waits for all that its device was asked for before they were drawn."""
        tokens, *report = (tensor.tolist() for tensor in self._on_the_way.read())
        logprobs: list[Logprobs | None] = [None] * len(tokens)
        if self._reported:
            for row, count, chosen, ids, values in zip(self._reported, self._counts, *report, strict=True):
                logprobs[row] = Logprobs(chosen, list(zip(ids[:count], values[:count], strict=True)))
        return [Choice(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def choose(logits: Tensor, sequences: Rows[Sequence], nucleus: Nucleus | None = None) -> list[Choice]:
    """`draw`, and at once `read`."""
    return draw(logits, sequences, None, nucleus).read()


def draw(
    logits: Tensor, sequences: Rows[Sequence], unread: Unread | None = None, nucleus: Nucleus | None = None
) -> Drawn:
    """The next token of each sequence. `logits` is float32 [len(sequences), vocabulary]; its contents are used up.
    `unread`: the last tokens of those that have an unread one. `nucleus`: by default, one of those here."""
    if nucleus is None:
        nucleus = nucleus_by_sorting if logits.device.type == "cpu" else nucleus_by_bisection
    samplings = [sequence.sampling for sequence in sequences]
    reported = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    log_probabilities = torch.log_softmax(_rows(logits, reported), -1) if reported else None
    _penalize(logits, sequences, unread)
    # One call for all rows: greedy rows are done, and a hot row's is overwritten.
    tokens = logits.argmax(-1)
    hot = [row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE]
    together = ROWS_AT_ONCE if logits.device.type == "cpu" else ROWS_AT_ONCE_ON_DEVICE
    for begin in range(0, len(hot), together):
        rows = hot[begin : begin + together]
        drawn = _draw(_rows(logits, rows), [sequences[row] for row in rows], nucleus)
        tokens.index_copy_(0, _index(rows, logits), drawn)
    counts = [samplings[row].logprobs or 0 for row in reported]
    report = [] if log_probabilities is None else _report(log_probabilities, _rows(tokens, reported), max(counts))
    return Drawn(tokens, reported, counts, report)


def _penalize(logits: Tensor, sequences: Rows[Sequence], unread: Unread | None) -> None:
    """Lowers, in place, the logits of tokens of the output so far: by presence, and by frequency times their number."""
    rows = [
        row
        for row, sequence in enumerate(sequences)
        if (sequence.output or sequence.unread)
        and (sequence.sampling.presence_penalty or sequence.sampling.frequency_penalty)
    ]
    if not rows:
        return
    penalized = [sequences[row] for row in rows]
    if unread is not None and any(sequence.unread for sequence in penalized):
        logits.index_add_(0, _index(rows, logits), _penalties(logits, penalized, unread.at(np.array(rows))), alpha=-1)
        return
    vocabulary = logits.shape[-1]
    output = torch.cat([torch.tensor(sequences[row].output) + row * vocabulary for row in rows])
    flat, times = torch.unique(output, return_counts=True)
    presence = torch.zeros(len(sequences))
    frequency = torch.zeros(len(sequences))
    for row in rows:
        presence[row] = sequences[row].sampling.presence_penalty
        frequency[row] = sequences[row].sampling.frequency_penalty
    penalty = presence[flat // vocabulary] + frequency[flat // vocabulary] * times
    logits.view(-1).index_add_(0, to_device(flat, logits.device), to_device(penalty, logits.device), alpha=-1)


def _penalties(logits: Tensor, sequences: Rows[Sequence], unread: Unread) -> Tensor:
    """Of all tokens, [len(sequences), vocabulary]: the same numbers, where the last token is the device's alone."""
    vocabulary = logits.shape[-1]
    counts = logits.new_zeros(len(sequences), vocabulary)
    known = [torch.tensor(one.output, dtype=torch.int64) + row * vocabulary for row, one in enumerate(sequences)]
    flat = to_device(torch.cat(known), logits.device)
    counts.view(-1).index_add_(0, flat, counts.new_ones(1).expand(len(flat)))
    last = unread.put_into(torch.zeros(len(sequences), dtype=torch.int64, device=logits.device))
    counts.scatter_add_(1, last[:, None], _column(counts, [float(one.unread) for one in sequences]))
    presence = _column(counts, [one.sampling.presence_penalty for one in sequences])
    frequency = _column(counts, [one.sampling.frequency_penalty for one in sequences])
    return torch.where(counts > 0, presence + frequency * counts, 0.0)


def _draw(logits: Tensor, sequences: Rows[Sequence], nucleus: Nucleus) -> Tensor:
    """Tokens of rows with a temperature of at least `LEAST_TEMPERATURE`."""
    samplings = [sequence.sampling for sequence in sequences]
    # Shifted first: a tiny temperature must not overflow the best logit.
    shifted = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(shifted / _column(logits, [sampling.temperature for sampling in samplings]), -1)
    threshold = _threshold(probabilities, samplings, nucleus)
    if threshold is not None:
        probabilities = torch.where(probabilities >= threshold, probabilities, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    noise = uniform([s.sampling.seed for s in sequences], [s.length for s in sequences])
    target = to_device(torch.from_numpy(noise), logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _threshold(probabilities: Tensor, samplings: Rows[Sampling], nucleus: Nucleus) -> Tensor | None:
    """The least probability that passes the filters, [rows, 1]; None if there is no filter."""
    bounds = []
    if any(sampling.top_k for sampling in samplings):
        bounds.append(_top_k(probabilities, samplings))
    if any(sampling.top_p < 1 for sampling in samplings):
        bounds.append(_top_p(probabilities, samplings, nucleus, bounds[0] if bounds else None))
    if any(sampling.min_p for sampling in samplings):
        share = _column(probabilities, [sampling.min_p for sampling in samplings])
        bounds.append(probabilities.amax(-1, keepdim=True) * share)
    return torch.stack(bounds).amax(0) if bounds else None


def _top_k(probabilities: Tensor, samplings: Rows[Sampling]) -> Tensor:
    """The k-th greatest probability of each row; 0 where the row has no such filter."""
    vocabulary = probabilities.shape[-1]
    ranks = [min(sampling.top_k, vocabulary) for sampling in samplings]
    best = probabilities.topk(max(ranks), -1).values
    chosen = best.gather(-1, _index([max(rank - 1, 0) for rank in ranks], best)[:, None])
    return chosen * _column(best, [float(rank > 0) for rank in ranks])


def _top_p(probabilities: Tensor, samplings: Rows[Sampling], nucleus: Nucleus, floor: Tensor | None) -> Tensor:
    """The least probability of each row's nucleus: the fewest most likely tokens that hold top_p of the mass.

    `floor` is the bound of an earlier filter: the mass is that of what it leaves.
    """
    filtered = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    index = _index(filtered, probabilities)
    rows = probabilities.index_select(0, index)
    if floor is not None:
        rows = torch.where(rows >= floor.index_select(0, index), rows, 0.0)
    share = _column(rows, [samplings[row].top_p for row in filtered]).double()
    mass = share * rows.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(probabilities[:, :1]).index_copy_(0, index, nucleus(rows, mass))


def nucleus_by_sorting(probabilities: Tensor, mass: Tensor) -> Tensor:
    """A `Nucleus` for a CPU: sorts a few, and asks whether they were enough."""
    vocabulary = probabilities.shape[-1]
    bound = torch.zeros_like(probabilities[:, :1])
    left = torch.arange(len(probabilities))
    for width in (*(width for width in NUCLEUS_WIDTHS if width < vocabulary), vocabulary):
        best = probabilities[left].topk(width, -1).values
        before = best.cumsum(-1, dtype=torch.float64) - best
        inside = before < mass[left]
        # The nucleus ends within these if a token of them is outside; the first token is always inside.
        last = inside.sum(-1, keepdim=True).clamp_min(1) - 1
        bound[left] = best.gather(-1, last)
        left = left[inside[:, -1]]
        if not len(left):
            break
    return bound


def nucleus_by_bisection(probabilities: Tensor, mass: Tensor) -> Tensor:
    """A `Nucleus` for a GPU, which must not be asked, and sorts row by row: the least number such that all above it
    hold less than `mass`. Floats that are not negative are in the order of their bits."""
    low = torch.zeros_like(probabilities[:, :1]).view(torch.int32)
    high = probabilities.amax(-1, keepdim=True).view(torch.int32)
    for _ in range(PROBABILITY_BITS):
        middle = (low + high) // 2
        above = torch.where(probabilities > middle.view(torch.float32), probabilities, 0.0)
        enough = above.sum(-1, keepdim=True, dtype=torch.float64) < mass
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.view(torch.float32)


def _report(log_probabilities: Tensor, tokens: Tensor, count: int) -> list[Tensor]:
    """Of each row, the log probability of its token, and of its `count` best the ids and the values."""
    chosen = log_probabilities.gather(-1, tokens[:, None])[:, 0]
    best = log_probabilities.topk(min(count, log_probabilities.shape[-1]), -1)
    return [chosen, best.indices, best.values]


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """A copy of these rows."""
    return values.index_select(0, _index(rows, values))


def _index(rows: list[int], like: Tensor) -> Tensor:
    """int64 [len(rows)], on `like`'s device."""
    return to_device(torch.tensor(rows, dtype=torch.int64), like.device)


def _column(like: Tensor, values: list[float]) -> Tensor:
    """[rows, 1], of `like`'s dtype and device."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None]

"""Chooses the next token of each sequence of a batch from its logits.

A row's result depends on its own logits, settings, seed and position only. Each filter (top-k, top-p, min-p) is a
threshold on the row's own probabilities: what ties with the threshold stays. The choice is the inverse of the
cumulative distribution in the order of the vocabulary, not of the probabilities, so that two nearly equal tokens that
change places don't change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.messages import Logprobs, Sampling
from engine.noise import uniform
from engine.sequence import Sequence

NUCLEUS_WIDTHS = (64, 1024)
"""How many of the most likely tokens are sorted, until their mass reaches top-p; after these, all."""
ROWS_AT_ONCE = 8
"""Rows that are drawn together: their float64 temporaries stay in the cache."""

LEAST_TEMPERATURE = 1e-6
"""Below it a row is greedy: logits a thousandth apart are e^1000 apart in odds, and float32 soon divides by zero."""


class Choice(NamedTuple):
    token: int
    logprobs: Logprobs | None


def choose(logits: Tensor, sequences: Rows[Sequence]) -> list[Choice]:
    """The next token of each sequence. `logits` is float32 [len(sequences), vocabulary]; its contents are used up."""
    samplings = [sequence.sampling for sequence in sequences]
    wanted = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    log_probabilities = torch.log_softmax(logits[wanted], -1) if wanted else None
    _penalize(logits, sequences)
    # One call for all rows: greedy rows are done, and a hot row's is overwritten.
    tokens = logits.argmax(-1).tolist()
    hot = [row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE]
    for begin in range(0, len(hot), ROWS_AT_ONCE):
        rows = hot[begin : begin + ROWS_AT_ONCE]
        for row, token in zip(rows, _draw(logits[rows], [sequences[row] for row in rows]), strict=True):
            tokens[row] = token
    logprobs: list[Logprobs | None] = [None] * len(tokens)
    if log_probabilities is not None:
        counts = [samplings[row].logprobs or 0 for row in wanted]
        for row, report in zip(
            wanted, _report(log_probabilities, [tokens[row] for row in wanted], counts), strict=True
        ):
            logprobs[row] = report
    return [Choice(token, report) for token, report in zip(tokens, logprobs, strict=True)]


def _penalize(logits: Tensor, sequences: Rows[Sequence]) -> None:
    """Lowers, in place, the logits of tokens of the output so far: by presence, and by frequency times their number."""
    rows = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.output and (sequence.sampling.presence_penalty or sequence.sampling.frequency_penalty)
    ]
    if not rows:
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
    logits.view(-1).index_add_(0, flat.to(logits.device), penalty.to(logits.device), alpha=-1)


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Tokens of rows with a temperature of at least `LEAST_TEMPERATURE`."""
    samplings = [sequence.sampling for sequence in sequences]
    # Shifted first: a tiny temperature must not overflow the best logit.
    shifted = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(shifted / _column(logits, [sampling.temperature for sampling in samplings]), -1)
    threshold = _threshold(probabilities, samplings)
    if threshold is not None:
        probabilities = torch.where(probabilities >= threshold, probabilities, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    noise = uniform([s.sampling.seed for s in sequences], [s.length for s in sequences])
    target = torch.from_numpy(noise).to(logits.device)[:, None] * cumulative[:, -1:]
    tokens: list[int] = torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()
    return tokens


def _threshold(probabilities: Tensor, samplings: Rows[Sampling]) -> Tensor | None:
    """The least probability that passes the filters, [rows, 1]; None if there is no filter."""
    bounds = []
    if any(sampling.top_k for sampling in samplings):
        bounds.append(_top_k(probabilities, samplings))
    if any(sampling.top_p < 1 for sampling in samplings):
        bounds.append(_top_p(probabilities, samplings, bounds[0] if bounds else None))
    if any(sampling.min_p for sampling in samplings):
        share = _column(probabilities, [sampling.min_p for sampling in samplings])
        bounds.append(probabilities.amax(-1, keepdim=True) * share)
    return torch.stack(bounds).amax(0) if bounds else None


def _top_k(probabilities: Tensor, samplings: Rows[Sampling]) -> Tensor:
    """The k-th greatest probability of each row; 0 where the row has no such filter."""
    vocabulary = probabilities.shape[-1]
    ranks = [min(sampling.top_k, vocabulary) for sampling in samplings]
    best = probabilities.topk(max(ranks), -1).values
    chosen = best.gather(-1, torch.tensor([[max(rank - 1, 0)] for rank in ranks], device=best.device))
    return chosen * _column(best, [float(rank > 0) for rank in ranks])


def _top_p(probabilities: Tensor, samplings: Rows[Sampling], floor: Tensor | None) -> Tensor:
    """The least probability of each row's nucleus: the fewest most likely tokens that hold top_p of the mass.

    `floor` is the bound of an earlier filter: the mass is that of what it leaves.
    """
    bound = torch.zeros_like(probabilities[:, :1])
    left = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    for width in (*NUCLEUS_WIDTHS, probabilities.shape[-1]):
        if not left:
            break
        rows = probabilities[left]
        if floor is not None:
            rows = torch.where(rows >= floor[left], rows, 0.0)
        best = rows.topk(min(width, rows.shape[-1]), -1).values
        share = _column(rows, [samplings[row].top_p for row in left]).double()
        before = best.cumsum(-1, dtype=torch.float64) - best
        inside = before < share * rows.sum(-1, keepdim=True, dtype=torch.float64)
        # The nucleus ends within these if a token of them is outside; the first token is always inside.
        last = inside.sum(-1, keepdim=True).clamp_min(1) - 1
        bound[left] = best.gather(-1, last)
        ended = (~inside[:, -1]).tolist()
        left = [row for row, done in zip(left, ended, strict=True) if not done]
    return bound


def _report(log_probabilities: Tensor, tokens: list[int], counts: list[int]) -> list[Logprobs]:
    chosen = log_probabilities.gather(-1, torch.tensor(tokens, device=log_probabilities.device)[:, None])[:, 0].tolist()
    best = log_probabilities.topk(min(max(counts), log_probabilities.shape[-1]), -1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        Logprobs(chosen[row], list(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, count in enumerate(counts)
    ]


def _column(like: Tensor, values: list[float]) -> Tensor:
    """[rows, 1], of `like`'s dtype and device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

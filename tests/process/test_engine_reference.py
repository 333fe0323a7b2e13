"""The engine alone, on the demo model, against what transformers answered to the same prompts."""

from __future__ import annotations

import pytest
import torch

from cluster.config import Dtype
from cluster.messages import Fence, Sampling
from cluster.model_files import resolve_model
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from tests.process.reference.cases import load_reference
from tests.process.reference.oracle import DEMO_MODEL, END_OF_SEQUENCE

NEW_TOKENS = 12
"""Of each case: enough for decode steps on both sides of a page boundary."""
LONGEST_PROMPT = 1100


def make_engine(dtype: Dtype, **settings: int) -> Engine:
    sizes = {"page_size": 16, "pool_pages": 512, "max_running": 16, "chunk_tokens": 512, **settings}
    # Without the prefix cache: what is asked a second time is to be computed a second time.
    model = resolve_model(DEMO_MODEL)
    return Engine(EngineConfig(model_path=model, model_name="demo", dtype=dtype, prefix_cache=False, **sizes))


@pytest.fixture(scope="module")
def full_precision():
    return make_engine(Dtype.FLOAT32)


def answers(engine, cases, *, together, temperature=0.0):
    """For each case its (token, logprob) pairs."""
    found = {case.name: [] for case in cases}

    def run():
        while result := engine.step():
            for sampled in result.sampled:
                found[sampled.key.request].append((sampled.token, sampled.logprobs.chosen))
                if sampled.finished:
                    engine.release(sampled.key)

    for case in cases:
        sampling = Sampling(
            max_tokens=min(NEW_TOKENS, case.new_tokens),
            seed=len(case.name),
            temperature=temperature,
            top_p=0.95,
            logprobs=0,
            stop_token_ids=[END_OF_SEQUENCE],
        )
        engine.submit(Sequence(Fence(case.name, 1, 0, 0), case.prompt, [], sampling))
        if not together:
            run()
    run()
    engine.ledger.check()
    assert engine.ledger.used == 0
    return found


def test_greedy_tokens_and_logprobs_are_transformers_own(full_precision):
    cases = [case for case in load_reference().cases if len(case.prompt) <= LONGEST_PROMPT]
    assert len(cases) >= 30
    found = answers(full_precision, cases, together=True)
    for case in cases:
        tokens, logprobs = zip(*found[case.name], strict=True)
        assert list(tokens) == case.expected[:NEW_TOKENS], case.name
        assert list(logprobs) == pytest.approx(case.logprobs[:NEW_TOKENS], abs=1e-3), case.name


def test_sampled_tokens_are_the_same_alone_as_in_a_batch(full_precision):
    cases = [case for case in load_reference().cases if len(case.prompt) < 200][:16]
    together = answers(full_precision, cases, together=True, temperature=1.0)
    alone = answers(full_precision, cases[::4], together=False, temperature=1.0)
    tokens = {name: [token for token, _ in pairs] for name, pairs in together.items()}
    for name, pairs in alone.items():
        assert [token for token, _ in pairs] == tokens[name]


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN's bfloat16 kernels need a processor with AVX-512"
)
def test_in_bfloat16_neither_batch_nor_chunks_change_a_bit():
    """Rounding is coarse there: had it another order in a batch, tokens would differ under load."""
    cases = [case for case in load_reference().cases if len(case.prompt) < 200][:16]
    together = answers(make_engine(Dtype.BFLOAT16), cases, together=True, temperature=1.0)
    alone = answers(make_engine(Dtype.BFLOAT16, chunk_tokens=64), cases[::4], together=False, temperature=1.0)
    assert alone == {name: together[name] for name in alone}

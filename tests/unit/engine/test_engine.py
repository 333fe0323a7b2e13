"""The engine as workers drive it: what steps report, who owns pages when, and that KV can move between two engines."""

from __future__ import annotations

import ctypes

import pytest

from cluster.config import WeightsFrom
from cluster.errors import ConfigError, InvalidRequest, PromptTooLong
from cluster.messages import FinishReason
from engine.engine import TRIAL_PAGES, Progress
from engine.pages import Owner, OwnerKind
from tests.unit.engine.tiny import MODELS, make_engine, prompts, run, sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    MODELS["llama"].save_pretrained(path)
    return path


@pytest.fixture
def make(folder):
    return lambda **settings: make_engine(folder, weights=WeightsFrom.DUMMY, **settings)


def test_steps_report_starts_progress_tokens_and_ends(make):
    engine = make()
    (long, short) = prompts(20, 5)
    engine.submit(sequence("long", long, 2))
    engine.submit(sequence("short", short, 1))
    assert (engine.queued, engine.queued_tokens, engine.running) == (2, 25, 0)

    first = engine.step()
    assert (first.started, first.progress, first.sampled) == (["long"], [Progress("long", 16, 20)], [])
    assert (first.batch_size, first.prefill_tokens, engine.queued) == (1, 16, 1)

    second = engine.step()
    assert second.started == ["short"]
    assert second.progress == [Progress("long", 20, 20), Progress("short", 5, 5)]
    assert [(s.key, s.offset, s.finished) for s in second.sampled] == [
        ("long", 0, None),
        ("short", 0, FinishReason.LENGTH),
    ]
    third = engine.step()
    assert (third.progress, third.prefill_tokens, third.batch_size) == ([], 0, 1)
    assert [(s.offset, s.finished) for s in third.sampled] == [(1, FinishReason.LENGTH)]
    assert engine.step() is None
    assert engine.steps == 3


def test_a_plan_says_what_starts_before_it_is_computed(make):
    engine = make()
    engine.submit(sequence("a", *prompts(3), 1))
    plan = engine.plan()
    assert [one.key for one in plan.started] == ["a"]
    assert engine.steps == 0
    assert engine.execute(plan).started == ["a"]


def test_a_stop_token_is_given_and_ends_the_sequence(make):
    (prompt,) = prompts(6)
    tokens = run(make(), sequence("a", prompt, 10))["a"]
    engine = make()
    engine.submit(sequence("a", prompt, 10, stop_token_ids=[tokens[3]]))
    sampled = []
    while result := engine.step():
        sampled += result.sampled
    stopped = tokens.index(tokens[3])
    assert [one.token for one in sampled] == tokens[: stopped + 1]
    assert sampled[-1].finished is FinishReason.STOP


def test_pages_stay_with_a_finished_sequence_until_they_are_released(make):
    engine = make()
    engine.submit(sequence("a", *prompts(9), 1))
    assert engine.step().sampled[0].finished
    assert engine.owners() == dict.fromkeys(engine.owners(), 0) | {"sequence": 1, "cached": 2}
    engine.release("a")
    assert engine.pages_used == 0


def test_a_cancelled_sequence_leaves_at_once_and_keeps_its_pages(make):
    engine = make()
    engine.submit(sequence("a", *prompts(30), 5))
    engine.step()
    assert engine.cancel("a")
    assert not engine.cancel("a")
    assert engine.step() is None
    assert engine.pages_used > 0
    engine.release("a")
    assert engine.pages_used == 0


def test_warm_up_leaves_nothing_behind(make):
    engine = make(pool_pages=3, chunk_tokens=4096, max_running=100)
    engine.warm_up()
    engine.ledger.check()
    assert (engine.ledger.used, engine.steps, engine.queued, engine.running) == (0, 0, 0, 0)


def test_output_does_not_depend_on_batch_chunks_or_pages(make):
    asked = prompts(1, 2, 7, 8, 9, 31, 32, 33, 64, 90)

    def answers(engine):
        return run(engine, *(sequence(i, p, 20, temperature=i % 2 * 0.9, top_p=0.9) for i, p in enumerate(asked)))

    expected = answers(make())
    assert answers(make(max_running=1)) == expected
    assert answers(make(chunk_tokens=5, max_running=3)) == expected
    assert answers(make(page_size=16, pool_pages=30, chunk_tokens=200)) == expected
    assert answers(make(page_size=1, pool_pages=200)) == expected


def test_a_resumed_request_goes_on_with_the_tokens_it_would_have_had(make):
    for temperature in (0.0, 1.0):
        (prompt,) = prompts(11)
        whole = run(make(), sequence("a", prompt, 12, temperature=temperature))["a"]
        rest = run(make(), sequence("a", prompt, 12, temperature=temperature, output=whole[:5]))["a"]
        assert rest == whole[5:]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 40])
def test_kv_written_into_another_engines_pool_decodes_the_same(make, length):
    """What a transfer does: whole pages, by address."""
    (prompt,) = prompts(length)
    expected = run(make(), sequence("a", prompt, 10))["a"]
    prefill, decode = make(prefix_cache=False), make(pool_pages=64)
    assert prefill.page_bytes == decode.page_bytes
    assert decode.pool_bytes == (64 + TRIAL_PAGES) * decode.page_bytes
    decode.ledger.allocate(Owner(OwnerKind.WARMUP, "so that page numbers differ"), 7)

    prefill.submit(sequence("a", prompt, 1))
    while not (result := prefill.step()).sampled:
        pass
    lease, owner = Owner(OwnerKind.LEASE, "a"), Owner(OwnerKind.SEQUENCE, "a")
    sources = prefill.ledger.pages_of(owner)
    for source, target in zip(sources, decode.ledger.allocate(lease, len(sources)), strict=True):
        ctypes.memmove(
            decode.pool_address + target * decode.page_bytes,
            prefill.pool_address + source * prefill.page_bytes,
            prefill.page_bytes,
        )
    decode.ledger.allocate(lease, decode.layout.pages_for(length + 9) - len(sources))
    decode.ledger.move(lease, owner)
    first = result.sampled[0].token
    assert [first, *run(decode, sequence("a", prompt, 10, output=[first], computed=length))["a"]] == expected


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "said"),
    [
        ([], 1, InvalidRequest, "the prompt is empty"),
        ([1, 128], 1, InvalidRequest, r"token ids must be in \[0, 128\)"),
        ([-1], 1, InvalidRequest, "token ids must be in"),
        ([1] * 200, 58, PromptTooLong, "200 prompt tokens and up to 58 new ones don't fit: the context is 256"),
    ],
)
def test_what_can_not_be_computed_is_refused_before_it_costs_anything(make, prompt, max_tokens, error, said):
    engine = make()
    with pytest.raises(error, match=said):
        engine.submit(sequence("a", prompt, max_tokens))
    assert engine.plan() is None
    assert engine.ledger.used == 0


def test_more_than_the_pool_is_refused(make):
    with pytest.raises(PromptTooLong, match="the KV pool 80"):
        make(pool_pages=20).submit(sequence("a", *prompts(80), 2))
    make(pool_pages=20).submit(sequence("a", *prompts(80), 1))


def test_the_context_can_be_shortened_and_not_lengthened(make):
    assert make(context_length=100).model.context_length == 100
    with pytest.raises(ConfigError, match="257 is more than the model's 256"):
        make(context_length=257)


def test_the_layout_tells_what_another_worker_must_share(make):
    engine = make()
    layout = engine.layout
    assert (layout.layers, layout.kv_heads, layout.head_dim, layout.page_size, layout.dtype) == (3, 2, 8, 4, "float32")
    assert make().layout == layout
    assert engine.model.vocab_size == 128


@pytest.mark.parametrize("chunk_tokens", [3, 4, 16, 64])
def test_a_cached_beginning_changes_no_token_and_is_not_computed_again(make, chunk_tokens):
    (prompt,) = prompts(40)
    expected = run(make(prefix_cache=False), sequence("a", prompt, 10))["a"]
    engine = make(chunk_tokens=chunk_tokens)
    assert run(engine, sequence("a", prompt, 10))["a"] == expected
    again = sequence("b", prompt, 10)
    assert run(engine, again)["b"] == expected
    assert again.cached == 36, "all full pages before the last token"


def test_the_next_turn_of_a_chat_finds_the_answer_too(make):
    (prompt, more) = prompts(20, 7)
    engine = make()
    answer = run(engine, sequence("a", prompt, 12))["a"]
    following = [*prompt, *answer, *more]
    second = sequence("b", following, 6)
    found = run(engine, second)["b"]
    assert second.cached == 28, "prompt and answer but its last token, whole pages"
    assert found == run(make(prefix_cache=False), sequence("b", following, 6))["b"]


def test_cached_pages_never_keep_a_request_waiting(make):
    engine = make(pool_pages=12)
    for number, prompt in enumerate(prompts(30, 31, 32, 33)):
        assert len(run(engine, sequence(number, prompt, 8))[number]) == 8
    assert engine.pages_used == 0
    engine.prefixes.check()
    engine.ledger.check()

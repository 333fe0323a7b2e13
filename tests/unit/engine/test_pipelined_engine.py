"""An engine whose layers are divided among stages: chunks and batches follow each other through them, and the answers
are those of one that has all layers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cluster.config import SchedulingPolicy
from cluster.messages import FinishReason
from cluster.shards import Grid
from tests.unit.engine.thread_ranks import ThreadRanks
from tests.unit.engine.tiny import MODELS, VOCABULARY, config_of, make_engine, make_model, prompts, sequence

WHOLE = Grid()
LENGTHS = (1, 4, 15, 17, 70)
MANY_STOPS = list(range(0, VOCABULARY, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(MODELS["llama"]).save_pretrained(path)
    return path


@pytest.fixture
def make(folder):
    """Makes an engine of a grid of ranks; its followers end with the test."""
    made = []

    def engine(grid=WHOLE, **settings):
        if grid == WHOLE:
            return make_engine(folder, **settings)
        made.append(ThreadRanks(config_of(folder, grid=grid, **settings)))
        return made[-1].engine

    yield engine
    for ranks in made:
        ranks.close()


def asked():
    """Answers that end by their limits and by stop tokens, greedy and sampled, with all that sampling may look at."""
    for number, prompt in enumerate(prompts(*LENGTHS)):
        yield sequence(("stops", number), prompt, 12, stop_token_ids=MANY_STOPS)
        yield sequence(
            ("sampled", number), prompt, 1 + number, temperature=1.0, top_p=0.9, presence_penalty=0.7, logprobs=2
        )


def answers(engine):
    """Of each request (offset, token, end), in the order in which they come. Whoever is retracted comes back."""
    found, most = {}, 0
    waiting = {one.key: one for one in asked()}
    for one in waiting.values():
        found[one.key] = []
        engine.submit(one)
    while True:
        while (retracted := engine.retract()) is not None:
            engine.release(retracted)
            left = waiting[retracted]
            waiting[retracted] = again = sequence(retracted, left.prompt, 1, output=left.output)
            again.sampling, again.attempt = left.sampling, left.attempt + 1
            engine.submit(again)
        plan = engine.plan()
        result = engine.compute(plan)
        most = max(most, engine.under_way)
        for sampled in result.sampled if result else ():
            found[sampled.key].append((sampled.offset, sampled.token, sampled.finished))
            if sampled.finished:
                engine.release(sampled.key)
        if result is None and plan is None:
            break
    engine.ledger.check()
    engine.prefixes.check()
    assert engine.pages_used == 0
    assert {answer[-1][-1] for answer in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    return found, most


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        (Grid(stages=2), {}),
        (Grid(shards=2, stages=2), {"prefix_cache": False}),
        (Grid(stages=2), {"pool_pages": 40, "commit_quantile": 0.0}),
        (Grid(stages=2), {"retract_every_steps": 3}),
    ],
    ids=["stages", "stages of shards", "too few pages", "forced retraction"],
)
def test_answers_are_those_of_one_stage(grid, settings, make):
    expected, _ = answers(make(**settings))
    found, most = answers(make(grid, **settings))
    assert found == expected
    assert most == grid.stages - 1, "there is always a step for each of the other stages"


def test_the_chunks_of_a_prompt_follow_each_other(make):
    """Rank 0 is at the second chunk before it asks for the end of the first: the last stage may take its time."""
    engine = make(Grid(stages=2))
    (prompt,) = prompts(70)
    engine.submit(sequence("long", prompt, 1))
    assert engine.compute(engine.plan()) is None
    stops = []
    while result := engine.compute(engine.plan()):
        stops += [progress.computed for progress in result.progress]
    assert stops == [16, 32, 48, 64, 70]
    assert engine.steps == 5


def test_decodes_are_divided_among_the_stages(make):
    engine = make(Grid(stages=2))
    for number, prompt in enumerate(prompts(3, 3, 3, 3)):
        engine.submit(sequence(number, prompt, 9))
    results = []
    while (result := engine.step()) is not None:
        results.append(result)
    decodes = [result for result in results if not result.prefill_tokens]
    assert {result.batch_size for result in decodes} == {2}
    keys = [frozenset(sampled.key for sampled in result.sampled) for result in decodes]
    assert all(one.isdisjoint(other) for one, other in pairwise(keys)), "they take turns"


def test_who_leaves_keeps_its_pages_until_all_its_steps_are_read(make):
    engine = make(Grid(stages=2), prefix_cache=False)
    for key, prompt in zip("ab", prompts(60, 6), strict=True):
        engine.submit(sequence(key, prompt, 4))
    assert engine.compute(engine.plan()) is None
    held = engine.pages_used
    assert engine.cancel("a")
    engine.release("a")
    assert engine.pages_used >= held
    result = engine.compute(engine.plan())
    assert result.progress == [] and result.sampled == [], "what it computed is nobody's"
    assert 0 < engine.pages_used < held
    engine.ledger.check()


def test_nothing_overtakes_a_step_on_its_way(make):
    engine = make(Grid(stages=2), policy=SchedulingPolicy.SHORTEST_FIRST)
    long, short = prompts(60, 3)
    engine.submit(sequence("long", long, 1))
    overtaking = []

    def between_layers():
        if not overtaking:
            engine.submit(sequence("short", short, 1))
            overtaking.append(engine.overtake(plan, 0.0))

    plan = engine.plan()
    engine.compute(plan, between_layers)
    assert overtaking == [None]
    following = engine.plan()
    assert following.chunks[0].sequence.key == "short", "but it is in the next step"
    engine.compute(following)

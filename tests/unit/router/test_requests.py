"""Seeds, records, names and the document: what needs no worker to be checked."""

import pytest

from cluster.timings import PrefillTimings
from router.api.identity import sanitised, unique_id
from router.api.openapi import document
from router.api.plan import choice_seed
from router.fleet_view import FleetLimits
from router.records import ChoiceTrace, RecordStore


def test_seeds_differ_by_choice_and_stay_the_same_by_request():
    seeds = [choice_seed(7, index) for index in range(128)]
    assert seeds[0] == 7 and len(set(seeds)) == 128
    assert seeds == [choice_seed(7, index) for index in range(128)]
    assert choice_seed(8, 1) != seeds[1]
    assert all(0 <= choice_seed(seed, index) < 2**63 for seed in (-(2**63), -1, 2**63 - 1) for index in (0, 1))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_X", "abc-1.2_X"), ("a b\n<c>", "a-b-c"), ("é", ""), ("x" * 99, "x" * 64), ("", "")],
)
def test_a_clients_id_is_made_harmless(given, kept):
    assert sanitised(given) == kept


def test_an_id_is_never_given_twice():
    assert unique_id("cmpl", "mine") != unique_id("cmpl", "mine")
    assert unique_id("cmpl", "mine").startswith("cmpl-mine-")


# --- records ---------------------------------------------------------------------------------------------------------


def trace(name: str = "r-0") -> ChoiceTrace:
    return ChoiceTrace(name, prompt_tokens=5, arrived=10.0)


def test_a_record_tells_times_from_arrival_and_percentiles_by_nearest_rank():
    choice = trace()
    choice.placed_at, choice.started_at = 10.5, 11.0
    now = 12.0
    assert choice.tokens(1, now) == []
    for gap in range(1, 101):
        now += gap / 1000
        choice.tokens(1, now)
    choice.ended_at, choice.finish_reason = now, "length"
    choice.prefill = PrefillTimings(0.1, 0.2, 5, 0, 1)
    for _ in range(2):
        record = choice.record()
        assert (record.queue_seconds, record.first_token_seconds) == (0.5, 2.0)
        assert record.total_seconds == pytest.approx(2.0 + 5.05)
        assert record.inter_token_seconds.p50 == pytest.approx(0.050)
        assert record.inter_token_seconds.p99 == pytest.approx(0.099)
        assert record.output_tokens == 101
        choice.seal()


def test_the_first_tokens_time_is_the_sum_of_its_parts_without_comparing_clocks():
    """The worker says 0.1 s of queue and 0.2 s of prefill; 0.4 s until its first word: 0.3 s of way, there and back."""
    choice = trace()
    choice.tokenize_seconds, choice.placed_at, choice.started_at = 0.02, 10.1, 10.5
    choice.tokens(1, 10.75)
    choice.tokens(1, 10.85)
    assert choice.record().first_token is None, "the worker's word is still to come"
    choice.prefill = PrefillTimings(0.1, 0.2, 5, 0, 1)
    record = choice.record()
    parts = record.first_token
    found = (parts.router, parts.tokenize, parts.network, parts.queue, parts.prefill, parts.rest)
    assert found == pytest.approx((0.1, 0.02, 0.3, 0.1, 0.2, 0.05))
    whole = parts.router + parts.network + parts.queue + parts.prefill + parts.rest
    assert whole == pytest.approx(record.first_token_seconds) == 0.75
    assert record.second_token_seconds == pytest.approx(0.1)


def test_tokens_that_come_together_have_no_time_between_them():
    choice = trace()
    assert choice.tokens(3, 11.0) == [0.0, 0.0]
    assert choice.record().second_token_seconds == 0.0
    assert choice.tokens(2, 12.0) == [1.0, 0.0]


def test_the_store_keeps_the_latest_and_knows_both_names():
    store = RecordStore(capacity=2)
    for number in range(3):
        store.add(f"cmpl-{number}", "mine" if number else "first", [trace(f"cmpl-{number}-0")])
    assert store.get("cmpl-0") is None and store.get("first") is None
    assert store.get("mine").id == "cmpl-2"
    assert store.get("cmpl-1").choices[0].id == "cmpl-1-0"
    store.add("cmpl-3", "other", [trace("cmpl-3-0")])
    assert store.get("mine").id == "cmpl-2", "the alias went on to a newer request, and stays with it"


# --- the document ----------------------------------------------------------------------------------------------------


def test_every_reference_of_the_document_leads_somewhere():
    found = document("m", FleetLimits(128, 1000, 64))
    schemas = found["components"]["schemas"]

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(found)}
    assert names <= set(schemas)
    assert schemas["TokenId"]["maximum"] == 999
    assert schemas["ChatCompletionRequest"]["properties"]["model"]["enum"] == ["m"]


def test_the_document_is_valid_json_schema():
    validator = pytest.importorskip("jsonschema_rs")
    for name, schema in document("m", FleetLimits(128, 1000, 64))["components"]["schemas"].items():
        assert validator.meta.is_valid({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}), name

"""What a client of the router sees when all is well: its answers, streamed or not, through fake workers."""

import asyncio
import json

import pytest

from cluster.messages import PrefillAttempt, Role
from tests.process.fake_worker import Behaviour, FakeWorker
from tests.process.router_house import MODEL, House, demo_text, pair

END_OF_TURN = 2


@pytest.fixture(scope="module")
def text():
    return demo_text()


@pytest.fixture
async def house(text):
    async with House(text, pair()) as found:
        yield found
        await found.until_idle()


def tokens_of(text, words: str) -> list[int]:
    return text.encode(words, add_special_tokens=False)


def says(text, words: str) -> list:
    """A pair of workers that answer `words` and end their turn."""
    behaviour = Behaviour(answer=[*tokens_of(text, words), END_OF_TURN])
    return pair(behaviour, behaviour)


async def test_a_completion_is_put_together_from_both_legs(text):
    async with House(text, says(text, " Paris, of course.")) as house:
        answer = await house.complete(prompt="The capital of France is", return_token_ids=True)
        prompt = tokens_of(text, "The capital of France is")
        (choice,) = answer["choices"]
        assert choice["text"] == " Paris, of course."
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == [*tokens_of(text, " Paris, of course."), END_OF_TURN]
        assert choice["prompt_token_ids"] == prompt
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(choice["token_ids"]),
            "total_tokens": len(prompt) + len(choice["token_ids"]),
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
        prefill, decode = house.workers["prefill-0"].attempts[0], house.workers["decode-0"].attempts[0]
        assert (prefill.prompt, decode.prompt) == (prompt, prompt)
        assert (prefill.decode, decode.prefill) == ("decode-0", "prefill-0")
        assert prefill.fence == decode.fence
        assert (prefill.fence.prefill_epoch, prefill.fence.decode_epoch) == (11, 21)


async def test_a_streamed_chat_has_role_pieces_reason_usage_and_an_end(text):
    async with House(text, says(text, "Grüße 👩‍🚀!")) as house:
        messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        *events, usage, done = await house.events(
            "/v1/chat/completions", messages=messages, stream_options={"include_usage": True}
        )
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["id"].startswith("chatcmpl-")
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [delta["delta"].get("content", "") for delta in deltas]
    assert "".join(pieces) == "Grüße 👩‍🚀!"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    last = json.loads(usage)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(tokens_of(text, "Grüße 👩‍🚀!")) + 1


async def test_the_prompt_of_a_chat_is_the_models_template(text, house):
    await house.chat(max_tokens=4, messages=[{"role": "user", "content": "hello"}])
    attempt = house.workers["prefill-0"].attempts[0]
    assert attempt.prompt == tokens_of(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    )
    assert attempt.sampling.stop_token_ids == [END_OF_TURN]


async def test_the_limit_ends_with_length_and_one_token_needs_no_decode_leg(house):
    answer = await house.complete(max_tokens=5)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 5)
    assert len(house.workers["decode-0"].attempts) == 1
    answer = await house.complete(max_tokens=1)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 1)
    assert len(house.workers["decode-0"].attempts) == 1
    last = house.workers["prefill-0"].attempts[-1]
    assert (last.decode, last.fence.decode_epoch) == (None, 0)


async def test_a_first_token_that_ends_the_request_frees_the_decode_leg(text):
    async with House(text, says(text, "")) as house:
        answer = await house.complete()
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
        assert answer["usage"]["completion_tokens"] == 1
        await house.until(lambda: len(house.workers["decode-0"].cancelled) == 1)


async def test_ignore_eos_goes_on(text):
    async with House(text, says(text, "a")) as house:
        await house.complete(ignore_eos=True, max_tokens=2)
        assert house.workers["prefill-0"].attempts[0].sampling.stop_token_ids == []


async def test_choices_and_prompts_come_back_in_order_with_their_own_seeds(house):
    answer = await house.complete(prompt=["one", "two"], n=2, seed=7, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    attempts = sorted(house.workers["prefill-0"].attempts, key=lambda attempt: attempt.fence.request)
    prompts, seeds = [attempt.prompt for attempt in attempts], [attempt.sampling.seed for attempt in attempts]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert seeds[0] == seeds[2] == 7 != seeds[1] == seeds[3], "as if each prompt had been sent alone"
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
    assert answer["usage"]["completion_tokens"] == 12


async def test_streamed_choices_interleave_and_each_ends(house):
    *events, done = await house.events(n=3, max_tokens=4)
    chunks = [json.loads(event)["choices"][0] for event in events]
    assert done == "[DONE]"
    for index in range(3):
        reasons = [chunk["finish_reason"] for chunk in chunks if chunk["index"] == index]
        assert reasons[-1] == "length" and set(reasons[:-1]) <= {None}


async def test_a_stop_string_is_cut_and_cancels_what_is_under_way(text):
    answer = Behaviour(answer=tokens_of(text, "one two three four five six"), silent_from=5)
    async with House(text, pair(answer, answer)) as house:
        got = await house.complete(stop=["three f", "nowhere"])
        assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("one two ", "stop")
        await house.until(lambda: len(house.workers["decode-0"].cancelled) == 1)
        *events, _ = await house.events(stop="three f")
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "one two "
        await house.until_idle()


async def test_logprobs_of_a_chat_carry_tokens_and_bytes(text):
    async with House(text, says(text, "é!")) as house:
        answer = await house.chat(logprobs=True, top_logprobs=2)
        content = answer["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).startswith("é!".encode())
        assert [entry["logprob"] for entry in content] == [-0.5] * len(content)
        assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
        assert len(content) == answer["usage"]["completion_tokens"]


async def test_logprobs_of_completions_are_parallel_lists(text):
    async with House(text, says(text, "one two")) as house:
        answer = await house.complete(logprobs=0)
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["one", " two", "<|im_end|>"]
        assert logprobs["text_offset"] == [0, 3, 7]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        assert logprobs["top_logprobs"][0] == {"one": -0.5}
        streamed = [json.loads(event)["choices"][0] for event in (await house.events(logprobs=0))[:-1]]
        assert [token for chunk in streamed for token in chunk["logprobs"]["tokens"]] == logprobs["tokens"]


async def test_tokens_may_arrive_out_of_order_and_twice(text):
    gate = asyncio.Event()
    late = Behaviour(gate=gate, repeats=True)
    async with House(text, pair(late, Behaviour(repeats=True))) as house:
        asking = asyncio.create_task(house.complete(max_tokens=6, return_token_ids=True))
        await house.until(lambda: len(house.workers["decode-0"].attempts) == 1)
        await house.until(lambda: not house.workers["decode-0"].running)
        assert not asking.done(), "the decode leg is done, but the first token is not here"
        gate.set()
        answer = await asking
        assert answer["choices"][0]["token_ids"] == Behaviour().answer[:6]
        await house.until_idle()


async def test_a_unified_cluster_has_one_leg(text):
    workers = [FakeWorker("decode-0", Role.DECODE, 21)]
    async with House(text, workers, unified=True) as house:
        answer = await house.complete(max_tokens=3)
        assert answer["usage"]["completion_tokens"] == 3
        attempt = workers[0].attempts[0]
        assert (attempt.prefill, attempt.fence.prefill_epoch) == (None, 0)
        assert not isinstance(attempt, PrefillAttempt)
        assert (await house.get("/health"))[0] == 200


async def test_the_record_says_where_the_time_went(house):
    answer = await house.complete(max_tokens=4)
    await house.until_idle()
    status, record = await house.get(f"/v1/requests/{answer['id']}")
    assert status == 200
    assert (record["prompt_tokens"], record["output_tokens"]) == (answer["usage"]["prompt_tokens"], 4)
    assert (record["prefill_worker"], record["decode_worker"]) == ("prefill-0", "decode-0")
    assert record["prefill"]["cached_tokens"] == 3 and record["handoff"]["bytes"] == 1024
    assert record["decode"]["steps"] == 4 and record["finish_reason"] == "length"
    assert 0 <= record["queue_seconds"] <= record["first_token_seconds"] <= record["total_seconds"]
    assert 0 <= record["inter_token_seconds"]["p50"] <= record["inter_token_seconds"]["p99"]
    parts = record["first_token"]
    assert parts["queue"] == 0.001 and parts["prefill"] == 0.002 and 0 < parts["tokenize"] < parts["router"]
    whole = sum(parts[name] for name in ("router", "network", "queue", "prefill", "rest"))
    assert whole == pytest.approx(record["first_token_seconds"])
    assert 0 <= record["second_token_seconds"] <= record["total_seconds"]
    assert len(record["choices"]) == 1


async def test_a_request_keeps_the_name_its_client_gave(house):
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
    ids = []
    for _ in range(2):
        headers = {"X-Request-Id": "order 66\t<b>"}
        async with house.session.post(f"{house.url}/v1/completions", json=body, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "order-66-b"
            ids.append((await response.json())["id"])
    assert ids[0] != ids[1] and all("order-66-b" in name for name in ids), "a name used twice is still two requests"
    fences = {attempt.fence.request for attempt in house.workers["prefill-0"].attempts}
    assert fences == {f"{name}-0" for name in ids}
    await house.until_idle()
    status, record = await house.get("/v1/requests/order-66-b")
    assert status == 200 and record["choices"][0]["id"] == f"{ids[1]}-0"


async def test_models_status_and_metrics(house):
    assert (await house.get("/v1/models"))[1]["data"][0]["id"] == MODEL
    assert (await house.get(f"/v1/models/{MODEL}"))[1]["max_model_len"] == 8192
    assert (await house.get("/v1/models/other"))[0] == 404
    await house.complete(max_tokens=2)
    await house.until_idle()
    _, status = await house.get("/status")
    assert [(worker["worker"], worker["live"]) for worker in status["workers"]] == [
        ("decode-0", True),
        ("prefill-0", True),
    ]
    assert (status["in_flight"], status["integrity_errors"]) == (0, [])
    async with house.session.get(f"{house.url}/metrics") as response:
        metrics = await response.text()
    assert 'baton_requests_total{outcome="finished",route="completions"} 1.0' in metrics
    assert 'baton_workers{role="prefill"} 1.0' in metrics
    assert "baton_time_to_first_token_seconds_count 1.0" in metrics


async def test_load_spreads_within_a_burst(text):
    workers = [FakeWorker(f"prefill-{i}", Role.PREFILL, 10 + i) for i in range(2)]
    workers += [FakeWorker(f"decode-{i}", Role.DECODE, 20 + i) for i in range(2)]
    async with House(text, workers) as house:
        await house.complete(n=8, max_tokens=4)
        assert [len(worker.attempts) for worker in workers] == [4, 4, 4, 4]
        await house.until_idle()

"""The router's API as a whole: what it refuses and how, the official SDK, and requests that no one would write."""

import asyncio
import json
import sys
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from cluster.errors import ErrorInfo
from cluster.messages import Role
from tests.process.fake_worker import Behaviour
from tests.process.router_house import MODEL, House, demo_text, pair

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def text():
    return demo_text()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def house(text):
    async with House(text, pair(), max_body_bytes=200_000, max_choices=4) as found:
        yield found
        await found.until_idle()


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "words"),
    [
        (CHAT, {}, 400, "InvalidRequest", "messages", "missing"),
        (CHAT, {"messages": []}, 400, "InvalidRequest", "messages", "length >= 1"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "InvalidRequest", "messages[0].role", "robot"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "InvalidRequest", "messages[0].content", "missing"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "InvalidRequest",
            "messages[0].content[0].type",
            "image_url",
        ),
        (CHAT, {"messages": HELLO, "model": "gpt-9"}, 404, "ModelNotFound", "model", "gpt-9"),
        (CHAT, {"messages": HELLO, "temperature": 2.5}, 400, "InvalidRequest", "temperature", "<= 2"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "InvalidRequest", "temperature", "float"),
        (CHAT, {"messages": HELLO, "top_p": 0}, 400, "InvalidRequest", "top_p", "> 0"),
        (CHAT, {"messages": HELLO, "n": 0}, 400, "InvalidRequest", "n", ">= 1"),
        (CHAT, {"messages": HELLO, "n": 5}, 400, "InvalidRequest", "n", "limit is 4"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "InvalidRequest", "max_tokens", ">= 1"),
        (
            CHAT,
            {"messages": HELLO, "max_completion_tokens": 8192},
            400,
            "PromptTooLong",
            "max_completion_tokens",
            "8192",
        ),
        (
            CHAT,
            {"messages": HELLO, "max_tokens": 9000, "max_completion_tokens": 5},
            400,
            "InvalidRequest",
            "max_tokens",
            "give one",
        ),
        (CHAT, {"messages": HELLO, "presence_penalty": -3}, 400, "InvalidRequest", "presence_penalty", ">= -2"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "InvalidRequest", "top_logprobs", "logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "InvalidRequest", "top_logprobs", "20"),
        (CHAT, {"messages": HELLO, "stop": [""]}, 400, "InvalidRequest", "stop[0]", "length >= 1"),
        (CHAT, {"messages": HELLO, "tools": [{}]}, 400, "InvalidRequest", "tools", "not supported"),
        (
            CHAT,
            {"messages": HELLO, "response_format": {"type": "json_object"}},
            400,
            "InvalidRequest",
            "response_format.type",
            "not supported",
        ),
        (CHAT, {"messages": HELLO, "logit_bias": {"50": -100}}, 400, "InvalidRequest", "logit_bias", "not supported"),
        (COMPLETIONS, {"prompt": ""}, 400, "InvalidRequest", "prompt", "empty"),
        (COMPLETIONS, {"prompt": []}, 400, "InvalidRequest", "prompt", "empty"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "InvalidRequest", "prompt", "empty"),
        (COMPLETIONS, {"prompt": ["a", 1]}, 400, "InvalidRequest", "prompt", "mixed"),
        (COMPLETIONS, {"prompt": [49152]}, 400, "InvalidRequest", "prompt", "49152"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "InvalidRequest", "prompt", "-1"),
        (COMPLETIONS, {"prompt": [5] * 8192}, 400, "PromptTooLong", "prompt", "8192"),
        (COMPLETIONS, {"prompt": [5] * 8000, "max_tokens": 193}, 400, "PromptTooLong", "max_tokens", "8193"),
        (COMPLETIONS, {"prompt": "a " * 9000}, 400, "PromptTooLong", "prompt", "9001 tokens"),
        (COMPLETIONS, {"prompt": ["a"] * 5}, 400, "InvalidRequest", "prompt", "limit is 4"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 6}, 400, "InvalidRequest", "logprobs", "<= 5"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, 400, "InvalidRequest", "echo", "not supported"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "InvalidRequest", "best_of", "not supported"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "InvalidRequest", "suffix", "not supported"),
    ],
)
async def test_a_mistake_is_named(house, path, body, status, code, param, words):
    got, answer = await house.post(path, **body)
    error = answer["error"]
    assert (got, error["code"], error["param"], error["type"]) == (status, code, param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("data", "content_type", "status", "code", "words"),
    [
        (b"{", "application/json", 400, "InvalidRequest", "JSON"),
        (b"", "application/json", 400, "InvalidRequest", "JSON"),
        (b"[]", "application/json", 400, "InvalidRequest", "object"),
        (b'"\xff"', "application/json", 400, "InvalidRequest", ""),
        (b'{"model": "fake", "prompt": "\\ud800"}', "application/json", 400, "InvalidRequest", ""),
        (b"[" * 100_000, "application/json", 400, "InvalidRequest", ""),
        (b'{"a":' * 30_000, "application/json", 400, "InvalidRequest", ""),
        (b"x" * 200_001, "application/json", 413, "BodyTooLarge", "200000"),
        (b"{}", "text/plain", 415, "UnsupportedMediaType", "application/json"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(house, data, content_type, status, code, words):
    headers = {"Content-Type": content_type}
    async with house.session.post(house.url + COMPLETIONS, data=data, headers=headers) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, code)
        assert words in error["message"]


async def test_unknown_places_and_methods(house):
    status, answer = await house.get("/v2/completions")
    assert (status, answer["error"]["code"]) == (404, "NotFound")
    assert "/v2/completions" in answer["error"]["message"]
    assert (await house.get("/v1/requests/nobody"))[0] == 404
    async with house.session.get(house.url + COMPLETIONS) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert (await response.json())["error"]["code"] == "MethodNotAllowed"


async def test_harmless_and_unknown_fields_are_let_through(house):
    await house.chat(max_tokens=2, user="me", priority=3, tools=[], response_format={"type": "text"}, metadata={"a": 1})
    await house.complete(max_tokens=2, prompt="a", echo=False, best_of=1, suffix=None, logit_bias={})


async def test_the_four_forms_of_a_prompt(house):
    for prompt, choices in (("one", 1), (["one", "two"], 2), ([5, 6], 1), ([[5, 6], [7]], 2)):
        assert len((await house.complete(prompt=prompt, max_tokens=2))["choices"]) == choices
    assert [attempt.prompt for attempt in house.workers["prefill-0"].attempts[-2:]] == [[5, 6], [7]]


async def test_a_long_prompt_is_tokenized_beside_the_event_loop(house):
    words = "word " * 5000
    asking = asyncio.create_task(house.complete(prompt=words, max_tokens=2))
    assert (await house.get("/v1/models"))[0] == 200
    assert (await asking)["usage"]["prompt_tokens"] > 4000


# --- the official SDK ------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(house):
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_the_sdk_reads_whole_and_streamed_answers(sdk, house):
    whole = await sdk.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=6, logprobs=True)
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()
    assert len(whole.choices[0].logprobs.content) == 6
    assert [model.id for model in (await sdk.models.list()).data] == [MODEL]


async def test_the_sdk_reads_a_stream_with_ids_that_was_recovered(sdk, house):
    workers = [worker for worker in house.workers.values() if worker.role is Role.DECODE]
    for worker in workers:
        worker.behaviour = Behaviour(fails_at=3)
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, stream=True, extra_headers={"X-Request-Id": "named"}
    )
    chunks = [chunk async for chunk in stream]
    for worker in workers:
        worker.behaviour = Behaviour()
    whole = await sdk.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=6)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_the_sdk_raises_its_own_exceptions(sdk, house):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        await sdk.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await sdk.completions.create(model=MODEL, prompt="a", max_tokens=-1)
    gate = asyncio.Event()
    damaged = ErrorInfo("InvalidRequest", "a word that was damaged")
    house.workers["decode-0"].behaviour = Behaviour(gate=gate, fails_at=2, error=damaged)
    stream = await sdk.completions.create(model=MODEL, prompt="a", max_tokens=8, stream=True)

    async def read():
        async for _ in stream:
            gate.set()

    with pytest.raises(openai.APIError, match="damaged"):
        await read()
    house.workers["decode-0"].behaviour = Behaviour()


# --- the OpenAPI document --------------------------------------------------------------------------------------------


async def test_schemathesis_finds_nothing(text):
    async with House(text, pair(), default_max_tokens=4, max_choices=128) as house:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{house.url}/openapi.json",
            "--checks=all",
            # A schema can't say that prompt and max_tokens must fit the context together.
            "--exclude-checks=positive_data_acceptance",
            "--max-time=15",
            "--max-examples=25",
            "--seed=1",
            "--no-color",
            "--continue-on-failure",
            "--request-timeout=20",
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()[:8000]
        await house.until_idle()


async def test_the_document_names_every_route(house):
    _, document = await house.get("/openapi.json")
    routes = {resource.canonical for resource in house.server.application.router.resources()}
    assert set(document["paths"]) == routes
    assert document["components"]["schemas"]["TokenId"]["maximum"] == 49151
    assert json.dumps(document).count("#/components/schemas/") > 10

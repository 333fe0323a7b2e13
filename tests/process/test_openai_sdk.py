"""The official SDK against the whole cluster: what an application that moves to Baton would notice."""

import openai
import pytest

from tests.process.api import MODEL

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
async def client(demo_cluster):
    async with openai.AsyncOpenAI(base_url=f"{demo_cluster.url}/v1", api_key="none", max_retries=0) as found:
        yield found


async def test_models_are_listed(client):
    assert [model.id for model in (await client.models.list()).data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_a_streamed_chat_is_the_whole_chat_in_pieces(client):
    whole = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=24, temperature=0)
    pieces, usage, reasons = [], None, []
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert reasons == [whole.choices[0].finish_reason]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_n_choices_differ_and_the_first_is_reproducible(client):
    async def ask():
        answer = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=16, n=3, seed=5, temperature=1.2
        )
        assert answer.usage.completion_tokens <= 3 * 16
        return [choice.message.content for choice in sorted(answer.choices, key=lambda each: each.index)]

    first, again = await ask(), await ask()
    assert first == again
    assert len(set(first)) > 1


async def test_a_stop_string_is_cut_exactly(client):
    free = await client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=24, temperature=0)
    text = free.choices[0].text
    assert "7, 8" in text
    cut = await client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=24, temperature=0, stop="7, 8")
    assert cut.choices[0].text == text[: text.index("7, 8")]
    assert cut.choices[0].finish_reason == "stop"


async def test_penalties_change_what_is_repeated(client):
    async def ask(**penalties):
        answer = await client.completions.create(
            model=MODEL, prompt="1, 2, 3, 4,", max_tokens=24, temperature=0, **penalties
        )
        return answer.choices[0].text.count(",")

    assert await ask(frequency_penalty=2, presence_penalty=2) < await ask()


async def test_the_least_temperature_that_a_double_holds_is_greedy(client):
    async def ask(temperature):
        answer = await client.completions.create(
            model=MODEL, prompt="1, 2, 3, 4,", max_tokens=8, temperature=temperature, seed=1
        )
        return answer.choices[0].text

    assert await ask(5e-324) == await ask(0)


async def test_logprobs_name_their_tokens(client):
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content).startswith(answer.choices[0].message.content[:8])
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob), "greedy takes the most likely"


async def test_mistakes_are_the_sdks_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        await client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="8192"):
        await client.completions.create(model=MODEL, prompt=[1000] * 9000, max_tokens=8)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model=MODEL, prompt="hello", temperature=-1)

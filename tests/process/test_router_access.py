"""API keys at the router: who shows one is served, who does not is told so before anything of the request is read."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.process.api import eventually
from tests.process.router_house import MODEL, House, demo_text, pair

KEY = "sk-of-the-web-team"
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def text():
    return demo_text()


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the web team\n{KEY}\n")
    return file


async def post(house: House, authorization: str | None) -> tuple[int, dict, str | None]:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with house.session.post(f"{house.url}/v1/completions", json=BODY, headers=headers) as response:
        return response.status, await response.json(), response.headers.get("WWW-Authenticate")


async def test_only_a_known_key_is_served_and_the_error_is_openais(text, keys):
    async with House(text, pair(), api_keys_file=str(keys)) as house:
        assert (await post(house, f"Bearer {KEY}"))[0] == 200
        assert (await post(house, f"bearer  {KEY} "))[0] == 200
        for wrong in (
            None,
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            KEY,
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            "Bearer é",
        ):
            status, answer, challenge = await post(house, wrong)
            assert (status, challenge) == (401, "Bearer"), wrong
            assert (answer["error"]["type"], answer["error"]["code"]) == ("invalid_request_error", "Unauthorized")
            assert KEY not in str(answer)
        async with house.session.get(f"{house.url}/metrics") as response:
            metrics = await response.text()
        assert 'baton_request_errors_total{error="Unauthorized"} 9.0' in metrics and KEY not in metrics


async def test_probes_are_open_unless_they_are_not_to_be_and_all_else_is_closed(text, keys):
    for open_probes in (True, False):
        async with House(text, pair(), api_keys_file=str(keys), open_probes=open_probes) as house:
            for path in ("/health", "/ready", "/live", "/metrics"):
                async with house.session.get(house.url + path) as response:
                    assert response.status == (200 if open_probes else 401)
            for path in ("/v1/models", "/status", "/openapi.json", "/v1/requests/x", "/nowhere"):
                async with house.session.get(house.url + path) as response:
                    assert response.status == 401, path


async def test_a_stranger_is_refused_before_the_body_has_come(text, keys):
    async with House(text, pair(), api_keys_file=str(keys)) as house:
        host, port = house.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert b" 401 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()


async def test_the_sdk_understands(text, keys):
    async with House(text, pair(), api_keys_file=str(keys)) as house:
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=KEY, max_retries=0) as client:
            assert (await client.completions.create(**BODY)).usage.completion_tokens == 2
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="sk-wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="no API key of this cluster"):
                await client.completions.create(**BODY)


async def test_a_key_is_taken_away_without_a_stop(text, keys):
    async with House(text, pair(), api_keys_file=str(keys)) as house:
        keys.write_text("sk-the-next-one\n")

        async def refused() -> bool:
            return (await post(house, f"Bearer {KEY}"))[0] == 401

        await eventually(refused, "the former key is of no use", seconds=5)
        assert (await post(house, "Bearer sk-the-next-one"))[0] == 200

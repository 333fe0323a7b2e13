"""Traces of what a worker computes, asked for over HTTP while it serves."""

import gzip
import json
from pathlib import Path

import pytest

from cluster.messages import Role
from tests.process.api import eventually

STEPS = 3
LAYERS = 30


@pytest.fixture
def workers(demo_cluster):
    return {role: demo_cluster.worker_urls(role)[0] for role in Role}


async def post(http, url, body=None):
    async with http.post(url, json=body) as response:
        return response.status, await response.json()


def there(file):
    return Path(file).exists()


def read_trace(file):
    """For each step the names of what ran in it, operators and our own kernels; the file is gone then."""
    events = json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]
    Path(file).unlink()
    ran = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    steps = [event for event in ran if event["name"].startswith("step ")]
    return {
        step["name"]: [each["name"] for each in ran if 0 <= each["ts"] - step["ts"] < step["dur"]] for step in steps
    }


def has_products(names):
    """At least one for each layer, whoever computes it."""
    return sum("linear" in name or name == "native layer" for name in names) >= LAYERS


async def test_a_profile_ends_by_itself_after_its_steps(http, api, workers, reference):
    status, begun = await post(http, f"{workers[Role.DECODE]}/profile/start", {"steps": STEPS})
    assert status == 200
    case = reference.named("raw-100")
    answer = await api.stream(case.prompt, max_tokens=3 * STEPS, temperature=0)
    assert answer.tokens == case.expected[: 3 * STEPS], "being looked at changes nothing"

    async def written():
        return there(begun["file"])

    await eventually(written, "the trace is there")
    steps = read_trace(begun["file"])
    assert sum(has_products(names) for names in steps.values()) == STEPS
    status, refused = await post(http, f"{workers[Role.DECODE]}/profile/stop")
    assert (status, refused["error"]["code"]) == (409, "Conflict")


async def test_a_profile_ends_when_asked_to(http, api, workers, reference):
    start, stop = (f"{workers[Role.PREFILL]}/profile/{word}" for word in ("start", "stop"))
    assert (await post(http, stop))[0] == 409
    status, begun = await post(http, start)
    assert status == 200
    status, refused = await post(http, start)
    assert (status, refused["error"]["code"]) == (409, "Conflict") and begun["file"] in refused["error"]["message"]
    await api.complete(reference.named("raw-33").prompt, max_tokens=1)
    assert not there(begun["file"])
    assert await post(http, stop) == (200, begun)
    assert any(has_products(names) for names in read_trace(begun["file"]).values())


@pytest.mark.parametrize("body", [{"steps": 0}, {"steps": 10**6}, {"steps": "many"}, {"directory": "/etc"}, []])
async def test_a_profile_that_makes_no_sense_is_refused(http, workers, body):
    status, refused = await post(http, f"{workers[Role.PREFILL]}/profile/start", body)
    assert (status, refused["error"]["code"]) == (400, "InvalidRequest")

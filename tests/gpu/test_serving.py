"""Two workers on one GPU: what they hand over through its memory changes no token, and they share that memory."""

from __future__ import annotations

import aiohttp
import pytest
import torch

from bench.cluster import Cluster
from bench.contenders import SPLIT, UNIFIED
from cluster.messages import Role
from tests.process.api import Api
from tests.process.reference.cases import load_reference

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(1800)]

ON_GPU = ("model.device=cuda", "prefill.cpus=[]", "decode.cpus=[]")
EXACT = ("model.dtype=float32", "model.attention=torch", "model.graphs=never", "kv.pool_tokens=24576")
"""torch's attention in float32: near enough to transformers on a CPU to give the reference's tokens."""
LONGEST = 600
SAMPLED = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}


@pytest.fixture
async def http():
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


def cases():
    return [case for case in load_reference().cases if case.messages is None and len(case.prompt) <= LONGEST]


async def answers(http, url):
    """One after the other, so that steps are of the same sizes wherever they are computed."""
    api = Api(http, url)
    greedy = [await api.stream(case.prompt, max_tokens=24, temperature=0, ignore_eos=True) for case in cases()]
    sampled = [await api.complete(case.prompt, seed=number, **SAMPLED) for number, case in enumerate(cases()[:5])]
    return [answer.tokens for answer in (*greedy, *sampled)]


async def test_handed_over_requests_give_the_tokens_of_unified_ones(http, tmp_path):
    """In bfloat16, by the kernels and graphs that a GPU is used with."""
    same_steps = "prefill.chunk_tokens=256", "decode.chunk_tokens=256", "kv.prefix_cache=false"
    with Cluster(SPLIT, (*ON_GPU, *same_steps), tmp_path / "split") as split:
        handed_over = await answers(http, split.url)
        split.wait_idle()
    with Cluster(UNIFIED, (*ON_GPU, *same_steps), tmp_path / "unified") as unified:
        assert await answers(http, unified.url) == handed_over


async def test_in_float32_they_are_the_references(http, tmp_path):
    with Cluster(SPLIT, (*ON_GPU, *EXACT), tmp_path / "exact") as cluster:
        api = Api(http, cluster.url)
        for case in cases():
            answer = await api.stream(case.prompt, max_tokens=case.new_tokens, temperature=0)
            assert answer.tokens == case.expected, case.name


async def test_two_workers_share_a_gpus_memory_and_say_what_went_where(http, tmp_path):
    with Cluster(SPLIT, (*ON_GPU, "kv.memory_fraction=0.2"), tmp_path / "shared") as cluster:
        assert "GPU 0: prefill-0, decode-0, who share it" in cluster.output.read_text()
        for role in Role:
            (url,) = cluster.worker_urls(role)
            async with http.get(f"{url}/server_info") as answer:
                info = await answer.json()
            memory, pages = info["memory"], info["member"]["pool_pages"]
            assert memory["device"] == "cuda:0"
            assert memory["pool"] > 0.1 * memory["total"]
            assert pages == info["load"]["pages_total"]
        (case, *_) = cases()
        answer = await Api(http, cluster.url).complete(case.prompt, max_tokens=8, temperature=0)
        assert len(answer.tokens) <= 8

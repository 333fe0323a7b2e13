"""`baton plan-memory`: what is asked of the engine, and what people are told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.config import Dtype, Topology
from cluster.errors import ConfigError
from cluster.memory_plan import Capacity, MemoryPlan, RankMemory
from cluster.model_files import DEMO_MODEL
from cluster.settings import build, read_override
from deploy.memory import Wanted, ask_engine, parse_size, requests, show

NOTHING = Wanted(None, None, None, None, None, None, None)
GIB = 1 << 30


def topology(*overrides) -> Topology:
    settings = {}
    for override in (f"model.path={DEMO_MODEL}", *overrides):
        settings |= read_override(override, Topology)
    return build(Topology, settings, "test")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("512MiB", 512 << 20), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 giga", "-1GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="is not a size: expected a number and one of B, KiB"):
        parse_size(text)


def test_a_topology_is_a_worker_of_each_pool_with_its_pool():
    prefill, decode = requests(
        None, topology("kv.pool_tokens=4096", "decode.max_running=7", "prefill.tensor_parallel=3"), NOTHING
    )
    assert (prefill.tensor_parallel, decode.tensor_parallel) == (3, 1)
    assert (prefill.pool, prefill.pool_tokens, decode.pool, decode.max_running) == ("prefill", 4096, "decode", 7)
    (unified,) = requests(None, topology("prefill.replicas=0"), NOTHING)
    assert unified.pool == "decode"


@pytest.mark.parametrize(
    ("settings", "fills", "fraction"),
    [((), True, 0.9), (("kv.memory_fraction=0.4",), True, 0.4), (("kv.pool_tokens=4096",), False, 1.0)],
)
def test_on_a_gpu_the_pool_fills_what_is_the_workers(settings, fills, fraction):
    (worker,) = requests(None, topology("prefill.replicas=0", *settings), NOTHING._replace(gpu_bytes=80 * GIB))
    assert (worker.fills, worker.memory_fraction) == (fills, fraction)
    (asked,) = requests(None, topology("prefill.replicas=0"), NOTHING._replace(gpu_bytes=80 * GIB, concurrency=2))
    assert (asked.fills, asked.pool_tokens, asked.concurrency) == (False, None, 2)


def test_requests_asked_for_decide_on_the_pool():
    wanted = NOTHING._replace(concurrency=8, dtype=Dtype.FLOAT16, gpu_bytes=GIB)
    prefill, _ = requests(None, topology(), wanted)
    assert (prefill.pool_tokens, prefill.concurrency, prefill.dtype) == (None, 8, Dtype.FLOAT16)
    (alone,) = requests(DEMO_MODEL, None, wanted)
    assert (alone.pool, alone.gpu_bytes) == ("worker", GIB)
    with pytest.raises(ConfigError, match="name a model, or a topology"):
        requests(None, None, NOTHING)


def test_the_engine_says_what_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match=r"^model_type 'mixtral' is not supported"):
        ask_engine(requests(str(tmp_path), None, NOTHING))


def told(capacity, pool):
    rank = RankMemory({"embedding": GIB, "mlp": 3 * GIB}, page=1 << 20, pool=pool, activations=GIB, runtime=GIB)
    plan = MemoryPlan(
        pool="decode", family="llama", layers=2, parameters=2_000_000_000, precision="awq, 4 bits", stored={"mlp": GIB},
        dtype="bfloat16", kv_dtype="bfloat16", kernels="torch", page_size=16, context=8192, concurrency=1,
        pool_tokens=8192, token=65536, gpu_bytes=8 * GIB, ranks=[rank, rank], capacity=capacity,
    )  # fmt: skip
    out = io.StringIO()
    show(plan, Console(file=out, width=120))
    return out.getvalue()


def test_what_people_are_told():
    text = told(Capacity(2 * GIB, 32752, 3), GIB)
    assert "2,000.0 million parameters; on disk 1.00 GiB (awq, 4 bits)" in text
    assert ["total", "7.00", "GiB", "7.00", "GiB"] in [line.split() for line in text.splitlines()]
    assert "\nfits in 8.00 GiB: room for 32,752 tokens of KV, 3 requests of 8,192 tokens" in text
    assert "does not fit in 8.00 GiB: room for" in told(Capacity(2 * GIB, 32752, 3), 3 * GIB)
    assert "does not fit: without any KV it takes 512.00 MiB more than 8.00 GiB" in told(Capacity(-GIB // 2, 0, 0), GIB)

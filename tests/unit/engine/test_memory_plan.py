"""What is planned is what a real load takes, to the byte; and what is told of it is true."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from cluster.config import Dtype, Kernels, KVDtype, WeightsFrom
from cluster.errors import ConfigError
from cluster.layout import KVLayout
from cluster.memory_plan import MemoryRequest
from cluster.model_files import DEMO_MODEL, resolve_model
from cluster.shards import Grid
from engine.decoders import make_decoder
from engine.group import ThreadGroup, ThreadMeeting
from engine.kv_cache import KVCache
from engine.line import ThreadLine, ThreadPipes
from engine.memory_plan import open_headers, plan_memory
from engine.shard import Shard
from engine.stage import Stage
from engine.weights import open_model
from tests.unit.engine.quantized_folders import FORMATS, write
from tests.unit.engine.tiny import MODELS, SIZES, make_engine, make_model

GIB = 1 << 30


def request(path, **settings):
    return MemoryRequest(pool="decode", model_path=str(path), **settings)


def planned(path, **settings):
    asked = request(path, **settings)
    return plan_memory(asked, open_headers(asked))


def test_the_demo_model_takes_what_was_planned():
    path = resolve_model(DEMO_MODEL)
    config, weights = files = open_model(path, WeightsFrom.FILES)
    plan = plan_memory(request(path, dtype=Dtype.BFLOAT16, kernels=Kernels.NATIVE, pool_tokens=1000), files)
    layout = KVLayout("m", "bfloat16", 16, config.layers, config.kv_heads, config.head_dim)
    # 1000 tokens are 62.5 pages; one more is for trying connections.
    cache = KVCache(layout, 64, torch.device("cpu"))
    decoder = make_decoder(Kernels.NATIVE, config, weights, cache, 1)
    (rank,) = plan.ranks
    assert sum(rank.weights.values()) == decoder.weight_bytes
    assert rank.pool == cache.nbytes
    assert plan.parameters == 134_515_008
    stored = path.stat().st_size
    assert 0.98 * stored < sum(plan.stored.values()) < stored


@pytest.mark.parametrize("tied", [False, True])
def test_torch_takes_what_was_planned(tied, tmp_path):
    """Sizes are such that oneDNN pads nothing."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 512}
    LlamaConfig(**SIZES | sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).save_pretrained(tmp_path)
    plan = planned(tmp_path, dtype=Dtype.BFLOAT16, kernels=Kernels.TORCH)
    config, weights = open_model(tmp_path, WeightsFrom.DUMMY)
    layout = KVLayout("m", "bfloat16", 16, config.layers, config.kv_heads, config.head_dim)
    decoder = make_decoder(Kernels.TORCH, config, weights, KVCache(layout, 1, torch.device("cpu")), 1)
    assert sum(plan.ranks[0].weights.values()) == decoder.weight_bytes


@pytest.mark.parametrize(("name", "grid"), [(name, Grid(2, 2) if "llama" in name else Grid(4)) for name in MODELS])
def test_each_rank_of_any_family_takes_what_was_planned(name, grid, tmp_path):
    make_model(MODELS[name]).save_pretrained(tmp_path)
    parallel = {"tensor_parallel": grid.shards, "pipeline_parallel": grid.stages}
    plan = planned(tmp_path, dtype=Dtype.FLOAT32, kernels=Kernels.NATIVE, **parallel)
    config, weights = open_model(tmp_path, WeightsFrom.FILES)
    sizes = (config.layers, config.kv_heads, config.head_dim)
    layout = KVLayout("m", "float32", 16, *sizes, shards=grid.shards, stages=grid.stages)
    assert len(plan.ranks) == grid.ranks
    for rank, memory in enumerate(plan.ranks):
        stage = Stage(config, ThreadLine(ThreadPipes(grid), rank))
        shard = Shard(stage.config, ThreadGroup(ThreadMeeting(grid.shards), grid.shard_of(rank)))
        cache = KVCache(layout.of_rank(rank), plan.pool_tokens // 16 + 1, torch.device("cpu"))
        decoder = make_decoder(Kernels.NATIVE, config, weights, cache, 1, shard, stage=stage)
        assert sum(memory.weights.values()) == decoder.weight_bytes
        assert memory.pool == cache.nbytes


def test_an_engine_has_the_pool_that_was_planned_for_its_requests(tmp_path):
    make_model(MODELS["llama"]).save_pretrained(tmp_path)
    plan = planned(tmp_path, dtype=Dtype.FLOAT32, page_size=4, context=50, concurrency=3)
    engine = make_engine(tmp_path, pool_pages=3 * 13)
    assert plan.pool_tokens == 3 * 13 * 4
    assert plan.ranks[0].pool == engine.pool_bytes


def test_kv_of_eight_bits_takes_half_the_room(tmp_path):
    make_model(MODELS["llama"]).save_pretrained(tmp_path)
    plans = [planned(tmp_path, dtype=Dtype.BFLOAT16, kv_dtype=kv_dtype) for kv_dtype in KVDtype]
    assert [plan.kv_dtype for plan in plans] == ["bfloat16", "float8_e4m3fn"]
    assert plans[0].token == 2 * plans[1].token
    engine = make_engine(tmp_path, dtype=Dtype.BFLOAT16, kv_dtype=KVDtype.FLOAT8, page_size=16)
    assert plans[1].ranks[0].page == engine.page_bytes
    assert plans[1].kernels == engine.kernels.value


def test_what_fits_on_a_gpu_and_what_does_not(tmp_path):
    """A model of the shape of Llama-3-8B, of which there is only config.json."""
    shape = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
             "max_position_embeddings": 8192}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    plan = planned(tmp_path, gpu_bytes=80 * GIB)
    (rank,) = plan.ranks
    assert (plan.dtype, plan.kernels, plan.parameters, plan.token) == ("bfloat16", "torch", 8_030_261_248, 131072)
    assert sum(rank.weights.values()) == 2 * plan.parameters
    assert plan.capacity.free == 80 * GIB - (rank.total - rank.pool)
    assert plan.capacity.tokens == (plan.capacity.free // rank.page - 1) * 16
    assert plan.capacity.requests == plan.capacity.tokens // 8192
    halves = planned(tmp_path, gpu_bytes=80 * GIB, tensor_parallel=2)
    assert halves.capacity.tokens > 2 * plan.capacity.tokens
    assert planned(tmp_path, gpu_bytes=8 * GIB).capacity.free < 0
    filled = planned(tmp_path, gpu_bytes=80 * GIB, memory_fraction=0.45, fills=True)
    assert filled.pool_tokens == filled.capacity.tokens < plan.capacity.tokens / 2
    assert 36 * GIB - filled.ranks[0].page < filled.ranks[0].total <= 36 * GIB


@pytest.mark.parametrize(
    ("name", "kept"),
    [("fp8 per tensor", True), ("compressed int8", True), ("awq", False), ("gptq with act-order", False)],
)
def test_quantised_weights_stay_as_small_on_a_gpu_if_a_kernel_takes_them(name, kept, tmp_path):
    """Of int4 in groups of 16 no kernel does, nor of groups that are out of order."""
    model = make_model(MODELS["llama"])
    with torch.no_grad():
        meant = write(model, tmp_path, FORMATS[name])
    plan = planned(tmp_path, gpu_bytes=GIB)
    (rank,) = plan.ranks
    products = rank.weights["attention"] + rank.weights["mlp"]
    assert plan.precision.startswith(name.split()[0])
    if kept:
        assert products == plan.stored["attention"] + plan.stored["mlp"]
    else:
        assert products == sum(weight.numel() for weight in meant.values()) * 2


def test_a_plan_that_cannot_be_is_refused(tmp_path):
    make_model(MODELS["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="7 ranks can't share the model's 6 query heads"):
        planned(tmp_path, tensor_parallel=7)
    with pytest.raises(ConfigError, match=r"99 stages can't share the model's \d layers"):
        planned(tmp_path, pipeline_parallel=99)
    with pytest.raises(ConfigError, match="a context of 257 tokens is more than the model's 256"):
        planned(tmp_path, context=257)

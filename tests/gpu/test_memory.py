"""A GPU's memory: a pool that fills its share and no more, figures that add up, digests that the device computes, and a
step that is too large."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from cluster.config import Device, Dtype, Switch
from cluster.errors import ConfigError
from cluster.layout import KVLayout
from engine.device_memory import GIB, full_is_refused
from engine.kv_cache import KVCache
from engine.page_digests import DevicePageDigests
from kv_transfer.shard_plan import Runs
from tests.unit.engine.tiny import SIZES, make_engine, make_model, prompts, run, sequence

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(900)]

GPU = torch.device("cuda", 0)
HEADS_OF_64 = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(LlamaConfig(**SIZES | HEADS_OF_64)).save_pretrained(path)
    return path


def gpu_engine(folder, **settings):
    return make_engine(folder, device=Device.CUDA, dtype=Dtype.BFLOAT16, page_size=16, **settings)


@pytest.mark.parametrize("graphs", [Switch.NEVER, Switch.AUTO])
def test_the_pool_fills_its_share_and_the_figures_add_up(folder, graphs):
    engine = gpu_engine(folder, pool_pages=None, memory_fraction=0.3, graphs=graphs)
    engine.warm_up()
    use = engine.memory.use()
    whole = torch.cuda.get_device_properties(GPU).total_memory
    assert use.device == "cuda:0"
    assert abs(use.total - whole) < GIB
    held = use.weights + use.pool + use.runtime
    assert 0.3 * use.total - 3 * GIB < held + use.activations < 0.3 * use.total + GIB
    assert use.free < use.total - use.pool
    asked = [sequence(number, prompt, 5) for number, prompt in enumerate(prompts(40, 3, 17))]
    assert all(len(tokens) == 5 for tokens in run(engine, *asked).values())


def test_a_fraction_that_holds_no_page_is_refused(folder):
    with pytest.raises(ConfigError, match=r"kv\.memory_fraction: 1e-06 of .* no page of"):
        gpu_engine(folder, pool_pages=None, memory_fraction=1e-6)


def test_a_pool_that_does_not_fit_is_refused(folder):
    with pytest.raises(ConfigError, match=r"kv\.pool_tokens: .* but cuda:0 has .* GiB left"):
        gpu_engine(folder, pool_pages=1 << 40)


def test_what_torch_has_no_memory_for_names_the_keys_to_turn():
    with pytest.raises(ConfigError, match=r"memory is full: .* lower kv\.memory_fraction"), full_is_refused():
        torch.empty(1 << 50, dtype=torch.uint8, device=GPU)


def test_the_device_finds_the_digests_that_the_host_would():
    layout = KVLayout("m", "bfloat16", page_size=16, layers=3, kv_heads=2, head_dim=64)
    on_gpu, on_host = KVCache(layout, 40, GPU), KVCache(layout, 40, torch.device("cpu"))
    on_host.pool.copy_(torch.randn(on_host.pool.shape, generator=torch.Generator().manual_seed(1)))
    on_gpu.pool.copy_(on_host.pool)
    pages = [39, 0, 17, 17]
    part = Runs(layout.page_bytes // 2, layout.page_bytes // 8, 2, layout.page_bytes // 4)
    for runs in (None, part):
        assert DevicePageDigests(on_gpu).of(pages, runs) == DevicePageDigests(on_host).of(pages, runs)


def test_a_step_without_memory_costs_its_newest_request_alone(folder, monkeypatch):
    engine = gpu_engine(folder, pool_pages=512, chunk_tokens=240, prefix_cache=False)
    engine.warm_up()
    short, long = prompts(5, 200)
    alone = run(gpu_engine(folder, pool_pages=512, prefix_cache=False), sequence("short", short, 20))["short"]
    engine.submit(sequence("short", short, 20))
    tokens = [sampled.token for sampled in engine.step().sampled]
    newest = sequence("long", long, 20)
    newest.arrived = 1.0
    engine.submit(newest)
    compute, refused = engine._decoder.forward, []

    def starved(step, between_layers=lambda: None):
        if len(step.tokens) > 100:
            torch.empty(1 << 50, dtype=torch.uint8, device=GPU)
        return compute(step, between_layers)

    monkeypatch.setattr(engine._decoder, "forward", starved)
    while (result := engine.step()) is not None:
        tokens += [sampled.token for sampled in result.sampled]
        refused += result.refused
    assert refused == ["long"]
    assert tokens == alone

"""Parts of parameters, as ranks read them: the same values as of the whole, and no more than needed of the file."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import save_file

from cluster.config import WeightsFrom
from cluster.model_files import DEMO_MODEL, resolve_model
from engine.weights import open_model
from engine.weights.base import Part, parameter_shapes

ATTENTION = "model.layers.7.self_attn."
MLP = "model.layers.7.mlp."


@pytest.fixture(scope="module")
def demo():
    return open_model(resolve_model(DEMO_MODEL), WeightsFrom.FILES).weights


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", Part(0, 24_576, 24_700)),
        (f"{ATTENTION}q_proj.weight", Part(0, 384, 576)),
        (f"{ATTENTION}k_proj.weight", Part(0, 64, 128)),
        (f"{ATTENTION}v_proj.weight", Part(0, 0, 128)),
        (f"{ATTENTION}o_proj.weight", Part(1, 384, 576)),
        (f"{MLP}up_proj.weight", Part(0, 768, 1536)),
        (f"{MLP}down_proj.weight", Part(1, 512, 1024)),
        (f"{MLP}down_proj.weight", Part(1, 500, 1021)),
    ],
)
def test_a_part_of_a_gguf_file_is_read_as_of_the_whole(demo, monkeypatch, name, part):
    whole = demo.read(name)
    original, dequantized = gguf.dequantize, []

    def dequantize(data, kind):
        dequantized.append(original(data, kind))
        return dequantized[-1]

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    found = demo.read(name, part)
    assert torch.equal(found, part.of(whole))
    rest = 2 * 32 * len(whole) if part.axis == 1 else 0
    assert sum(values.size for values in dequantized) <= found.numel() + rest, "but for blocks that are cut"


def test_a_part_of_a_folder_is_read_as_of_the_whole(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    dummy = open_model(tmp_path, WeightsFrom.DUMMY)
    save_file(
        {name: dummy.weights.read(name) for name in parameter_shapes(dummy.config)}, tmp_path / "model.safetensors"
    )
    stored = open_model(tmp_path, WeightsFrom.FILES).weights
    for name, part in (
        ("model.layers.0.self_attn.q_proj.weight", Part(0, 4, 12)),
        ("model.layers.0.self_attn.q_proj.bias", Part(0, 4, 12)),
        ("model.layers.0.mlp.down_proj.weight", Part(1, 8, 19)),
    ):
        expected = part.of(dummy.weights.read(name))
        assert torch.equal(stored.read(name, part), expected)
        assert torch.equal(dummy.weights.read(name, part), expected)

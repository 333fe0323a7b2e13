"""RoPE's frequencies against transformers', for each scaling; and the rotation against its definition."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model_config import RopeConfig, RopeKind, from_huggingface
from engine.rope import RotaryEmbedding, inverse_frequencies, rotate

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn with factors of its own": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 0.7,
    },
    "yarn with mscale, not truncated": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scalings_are_transformers_own(scaling):
    parameters = {"rope_theta": 500000.0, **scaling}
    theirs = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=dict(parameters)
    )
    config = from_huggingface(theirs.to_dict()).rope
    frequencies, factor = inverse_frequencies(config, 64)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_the_older_spelling_means_the_same():
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}
    base = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 100, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    assert from_huggingface(base | old) == from_huggingface(base | new)
    assert from_huggingface(base | old).context_length == 200


def test_divisors_divide():
    config = RopeConfig(kind=RopeKind.DIVISORS, divisors=(1.0, 2.0, 4.0, 8.0))
    plain, _ = inverse_frequencies(RopeConfig(), 8)
    assert torch.equal(inverse_frequencies(config, 8)[0], plain / torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_rotation_turns_each_pair_by_its_angle():
    rope = RotaryEmbedding(RopeConfig(theta=100.0, kind=RopeKind.PLAIN), 8, torch.device("cpu"))
    heads = torch.randn(3, 2, 8)
    positions = torch.tensor([0, 1, 17])
    rotated = rotate(heads, *rope.tables(positions, torch.float32))
    angles = positions[:, None, None] * 100.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))

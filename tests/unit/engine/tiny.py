"""Random models of a few kilobytes, made by transformers, and an engine over them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cluster.config import Dtype
from cluster.messages import Sampling
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied, biases, head_dim of its own": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama with its third version's rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama without sharing of heads": LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with yarn and windows in its upper layers": Qwen2Config(
        **SIZES, rope_parameters=YARN, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}


def make_model(config: PreTrainedConfig):
    """A transformers model with random weights; biases and norms are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def config_of(path: Path, **settings) -> EngineConfig:
    defaults = {
        "model_path": path, "model_name": "tiny", "dtype": Dtype.FLOAT32, "page_size": 4, "pool_pages": 128,
        "max_running": 8, "chunk_tokens": 16,
    }  # fmt: skip
    return EngineConfig(**defaults | settings)


def make_engine(path: Path, **settings) -> Engine:
    return Engine(config_of(path, **settings))


def sequence(key, prompt, max_tokens, *, output=(), computed=0, temperature=0.0, **sampling) -> Sequence:
    settings = Sampling(max_tokens=max_tokens, seed=1, temperature=temperature, **sampling)
    return Sequence(key, list(prompt), list(output), settings, computed)


def run(engine: Engine, *sequences: Sequence) -> dict[object, list[int]]:
    """Submits all at once, steps until idle, releases: each one's new tokens."""
    found: dict[object, list[int]] = {one.key: [] for one in sequences}
    for one in sequences:
        engine.submit(one)
    while result := engine.step():
        for sampled in result.sampled:
            found[sampled.key].append(sampled.token)
            if sampled.finished:
                engine.release(sampled.key)
    engine.ledger.check()
    return found


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

"""Models of known shapes without their weights: a config.json, and a tokenizer of as many words, are all that a load
test needs. Sizes are those that the models' publishers give; contexts are longer, for long prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTEXT_TOKENS = 65536

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}


def write_model(name: str, folder: Path) -> Path:
    """A folder with the shape of that name, in `folder`; its tokenizer has a word for each token."""
    shape = SHAPES[name]
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    config = {"max_position_embeddings": CONTEXT_TOKENS, "hidden_act": "silu", **shape}
    (model / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(shape["vocab_size"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model

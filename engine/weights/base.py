"""What a checkpoint must offer: parameters by their Hugging Face names, one at a time.

Parameters are read one by one, straight into the form that the model keeps (fused, packed, of its dtype): a model is
never in memory twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from torch import Tensor

from cluster.errors import ModelError
from engine.model_config import ModelConfig
from engine.weights.quantized.matrix import QuantizedMatrix

Shape = tuple[int, ...]

NAMED_IN_ERRORS = 8
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096


class Part(NamedTuple):
    """Of a parameter: indices [start, stop) along `axis`, 0 or 1."""

    axis: int
    start: int
    stop: int

    def of(self, whole: Tensor) -> Tensor:
        """In memory of its own, so that the rest can be given back."""
        return whole.narrow(self.axis, self.start, self.stop - self.start).clone()

    def of_matrix(self, whole: QuantizedMatrix) -> QuantizedMatrix:
        cut = whole.rows if self.axis == 0 else whole.columns
        return cut(self.start, self.stop)

    def shape(self, whole: Shape) -> Shape:
        return (*whole[: self.axis], self.stop - self.start, *whole[self.axis + 1 :])


class Weights(Protocol):
    """A checkpoint's parameters. Used while the model is built; owns open files until it is dropped."""

    identity: str
    """Digest of config and weights: the same for the same files on every machine, other for others."""

    def shapes(self) -> Mapping[str, Shape]:
        """Of all parameters."""

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """One parameter or a part of it, on CPU, in a float dtype: its own, or float32 if it is quantised. Raises
        `ModelError` for a damaged file."""

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """A matrix as it is stored, if it is quantised; else None."""


class Checkpoint(Weights, Protocol):
    """All of a model's parameters, as its files have them."""

    precision: str
    """What its matrices are stored as, in words."""

    def stored_bytes(self) -> Mapping[str, int]:
        """Of each parameter on disk, with the scales that belong to it; empty if nothing is on disk."""

    def kept_bytes(self) -> Mapping[str, int]:
        """The same, of the parameters that stay as they are stored on a GPU."""


class ModelFiles(NamedTuple):
    """A model that was found and opened."""

    config: ModelConfig
    weights: Checkpoint

    def checked(self) -> ModelFiles:
        """Itself. Raises `ModelError` that names what is missing, unexpected or of the wrong shape."""
        expected, found = parameter_shapes(self.config), self.weights.shapes()
        missing = sorted(expected.keys() - found.keys())
        unexpected = sorted(name for name in found.keys() - expected.keys() if not _redundant(name, self.config))
        wrong = [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ]
        problems = [
            f"{what}: {_abbreviated(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
            if names
        ]
        if problems:
            raise ModelError(f"the weights don't fit the model's config; {'; '.join(problems)}")
        return self


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter that a model of this config has, by its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key, hidden, config.qkv_bias),
        "self_attn.v_proj": (key, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.query_key_norm:
            norm = (config.head_dim,)
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = norm
        for name, (outputs, inputs, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes


def identity_of(config: ModelConfig, files: Iterable[Path] = ()) -> str:
    """32 hex digits of the config, and of each file's size, beginning (its header) and evenly spread blocks.

    Reading whole files would take minutes where a model is large; a fine-tuned sibling differs in every block.
    """
    digest = hashlib.sha256(msgspec.json.encode(config))
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BLOCKS * BLOCK_BYTES))
            for block in range(SAMPLED_BLOCKS):
                stream.seek(size * block // SAMPLED_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _redundant(name: str, config: ModelConfig) -> bool:
    """Some checkpoints keep what follows from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings)


def _abbreviated(names: list[str]) -> str:
    more = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")

"""What a decoder of the Llama family looks like, read from a Hugging Face config.json or from GGUF metadata.

Supported: Llama (and SmolLM2), Mistral, Qwen2 / Qwen2.5, Qwen3. All else is refused with a `ModelError` that says so: a
model that runs with a feature ignored answers wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from cluster.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class RopeKind(str, Enum):
    PLAIN = "plain"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    DIVISORS = "divisors"
    """Frequency i is divided by `RopeConfig.divisors[i]` (GGUF keeps Llama 3's scaling in this form)."""


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding: the base frequency, and how it was stretched to a longer context."""

    theta: float = 10000.0
    kind: RopeKind = RopeKind.PLAIN
    factor: float = 1.0
    original_context: int = 0
    """Context before stretching (llama3, yarn)."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""
    attention_factor: float | None = None
    """Multiplies cosine and sine; None: yarn's own rule."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    divisors: tuple[float, ...] = ()


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and switches of one decoder; complete: nothing else is looked up later."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """For each layer, how many positions a token sees, itself included; None: all before it."""

    def __post_init__(self) -> None:
        """Raises `ModelError` for sizes that don't fit together."""
        problems = [
            f"{name} is {getattr(self, name)}"
            for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim")
            if getattr(self, name) < 1
        ]
        if not problems and self.heads % self.kv_heads:
            problems.append(f"{self.heads} heads can't be shared by {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd")
        if problems:
            raise ModelError(f"the model's config is inconsistent: {', '.join(problems)}")


def from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """From a parsed config.json, of transformers 4 or 5. Raises `ModelError`."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    _refuse_unsupported(config)
    try:
        return _huggingface(family, config)
    except KeyError as error:
        raise ModelError(f"config.json lacks {error}") from error


def _huggingface(family: str, config: Mapping[str, Any]) -> ModelConfig:
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    rope, context = _huggingface_rope(config, config["max_position_embeddings"])
    bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        context_length=context,
        norm_epsilon=config["rms_norm_eps"],
        rope=rope,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        query_key_norm=family == "qwen3",
        windows=_huggingface_windows(family, config, layers),
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    parameters = config.get("rope_parameters") or {}
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    refused = {
        f"hidden_act {config.get('hidden_act')!r} (only silu)": config.get("hidden_act", "silu")
        not in ("silu", "swish"),
        f"partial_rotary_factor {partial} (only 1)": partial != 1.0,
    }
    for feature, present in refused.items():
        if present:
            raise ModelError(f"the model's config has what is not supported: {feature}")


def _huggingface_windows(family: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if family == "llama" or window is None:
        return (None,) * layers
    if family == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", layers)
        return tuple(window if layer >= first else None for layer in range(layers))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise ModelError(f"layer_types must name full_attention or sliding_attention {layers} times, not {kinds}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _huggingface_rope(config: Mapping[str, Any], context: int) -> tuple[RopeConfig, int]:
    """The scaling, and the context that it allows. transformers 5 says `rope_parameters`, before it `rope_scaling`."""
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ModelError("rope_parameters by layer type are not supported")
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "dynamic"):
        # Dynamic scaling changes all frequencies once a sequence outgrows the original context, which keys that are
        # in the cache can't follow. Up to there it is the plain embedding, and there we stop.
        return RopeConfig(theta=theta), context
    if kind == "linear":
        factor = float(scaling["factor"])
        return RopeConfig(theta=theta, kind=RopeKind.LINEAR, factor=factor), int(context * factor)
    if kind not in ("llama3", "yarn"):
        raise ModelError(f"rope type {kind!r} is not supported; supported are default, dynamic, linear, llama3, yarn")
    original = int(scaling.get("original_max_position_embeddings") or context)
    factor = float(scaling.get("factor") or context / original)
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        rope = RopeConfig(
            theta=theta, kind=RopeKind.LLAMA3, factor=factor, original_context=original,
            low_frequency_factor=low, high_frequency_factor=high,
        )  # fmt: skip
        return rope, context
    rope = RopeConfig(
        theta=theta, kind=RopeKind.YARN, factor=factor, original_context=original,
        beta_fast=float(scaling.get("beta_fast") or 32.0), beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=bool(scaling.get("truncate", True)), attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"), mscale_all_dim=scaling.get("mscale_all_dim"),
    )  # fmt: skip
    return rope, max(context, int(original * factor))


class GGUFTensors(NamedTuple):
    """What only a GGUF file's tensors tell."""

    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    rope_divisors: tuple[float, ...]


def from_gguf(metadata: Mapping[str, Any], tensors: GGUFTensors) -> ModelConfig:
    """From a GGUF file's metadata. Raises `ModelError`."""
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ModelError(
            f"GGUF architecture {family!r} is not supported; supported are llama (and mistral), qwen2, qwen3"
        )
    if metadata.get(f"{family}.expert_count", 0):
        raise ModelError("mixture-of-experts models are not supported")
    try:
        return _gguf(family, metadata, tensors)
    except KeyError as error:
        raise ModelError(f"the GGUF metadata lack {error}") from error


def _gguf(family: str, metadata: Mapping[str, Any], tensors: GGUFTensors) -> ModelConfig:
    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{family}.{name}", default)
        if found is None:
            raise KeyError(f"{family}.{name}")
        return found

    heads, hidden, layers = value("attention.head_count"), value("embedding_length"), value("block_count")
    head_dim = value("attention.key_length", hidden // heads)
    rotated = value("rope.dimension_count", head_dim)
    if rotated != head_dim or value("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"only whole heads can be rotated: head_dim is {head_dim}, rope.dimension_count {rotated}")
    if isinstance(heads, list) or isinstance(value("feed_forward_length"), list):
        raise ModelError("layers of different sizes are not supported")
    window = metadata.get(f"{family}.attention.sliding_window")
    context = value("context_length")
    return ModelConfig(
        family=family,
        vocab_size=tensors.vocab_size,
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=context,
        norm_epsilon=value("attention.layer_norm_rms_epsilon"),
        rope=_gguf_rope(metadata, family, context, tensors.rope_divisors),
        tied_embeddings=tensors.tied_embeddings,
        qkv_bias=tensors.qkv_bias,
        query_key_norm=family == "qwen3",
        windows=(window or None,) * layers,
    )


def _gguf_rope(metadata: Mapping[str, Any], family: str, context: int, divisors: tuple[float, ...]) -> RopeConfig:
    theta = float(metadata.get(f"{family}.rope.freq_base", 10000.0))
    if divisors:
        return RopeConfig(theta=theta, kind=RopeKind.DIVISORS, divisors=divisors)
    scaling = f"{family}.rope.scaling"
    kind = metadata.get(f"{scaling}.type", "none")
    factor = float(metadata.get(f"{scaling}.factor", 1.0))
    if kind == "none" or factor == 1.0:
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=RopeKind.LINEAR, factor=factor)
    if kind != "yarn":
        raise ModelError(f"rope scaling {kind!r} is not supported; supported are none, linear, yarn")
    return RopeConfig(
        theta=theta, kind=RopeKind.YARN, factor=factor,
        original_context=int(metadata.get(f"{scaling}.original_context_length", context)),
        beta_fast=float(metadata.get(f"{scaling}.yarn_beta_fast", 32.0)),
        beta_slow=float(metadata.get(f"{scaling}.yarn_beta_slow", 1.0)),
    )  # fmt: skip

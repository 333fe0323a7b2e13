"""GGUF files: config, and weights dequantized to float32 as they are read.

GGUF orders the rows of the llama architecture's query and key projections for a rotary embedding of neighbouring pairs;
here, as in Hugging Face checkpoints, the pairs are (i, i + head_dim / 2), so the rows are put back into that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from cluster.errors import ModelError
from engine.model_config import GGUFTensors, ModelConfig, from_gguf
from engine.weights.base import ModelFiles, Part, Shape, identity_of

ROPE_DIVISORS = "rope_freqs.weight"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(file: Path) -> ModelFiles:
    """The model in `file`. Raises `ModelError`."""
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        metadata = {name: field.contents() for name, field in fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{file} is not a GGUF file, or damaged: {error}") from error
    if metadata.get("split.count", 1) > 1:
        raise ModelError(f"{file} is one of {metadata['split.count']} parts: merge them with llama-gguf-split first")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{file} has no token_embd.weight")
    divisors = tensors.pop(ROPE_DIVISORS, None)
    facts = GGUFTensors(
        vocab_size=_shape(tensors["token_embd.weight"])[0],
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        rope_divisors=() if divisors is None else tuple(_dequantize(divisors).tolist()),
    )
    config = from_gguf(metadata, facts)
    return ModelFiles(config, GGUFWeights(config, file, tensors))


class GGUFWeights:
    """Implements `Checkpoint`. The file is mapped while this lives."""

    def __init__(self, config: ModelConfig, file: Path, tensors: Mapping[str, gguf.ReaderTensor]) -> None:
        self._tensors = {_huggingface_name(name): tensor for name, tensor in tensors.items()}
        self._rotated_heads = {}
        if config.family == "llama":
            self._rotated_heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
        self.identity = identity_of(config, [file])
        sizes = Counter[str]()
        for tensor in tensors.values():
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
        self.precision = ", ".join(name for name, _ in sizes.most_common())

    def shapes(self) -> Mapping[str, Shape]:
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def stored_bytes(self) -> Mapping[str, int]:
        return {name: int(tensor.n_bytes) for name, tensor in self._tensors.items()}

    def kept_bytes(self) -> Mapping[str, int]:
        return {}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        tensor = self._tensors[name]
        weight = torch.from_numpy(_dequantize(tensor) if part is None else _dequantize_part(tensor, part))
        heads = self._rotated_heads.get(name.split(".")[-2])
        if heads is None:
            return weight
        return _unpermute(weight, heads * weight.shape[0] // _shape(tensor)[0])

    def quantized(self, name: str) -> None:
        return None


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (pair, half) of each head to (half, pair)."""
    paired = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)


def _dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    """float32, in memory of its own."""
    return _values(tensor, tensor.data).reshape(_shape(tensor))


def _dequantize_part(tensor: gguf.ReaderTensor, part: Part) -> np.ndarray:
    """The same, reading no more than that, and where it begins or ends within blocks, the rest of these."""
    if part.axis == 0:
        return _values(tensor, tensor.data[part.start : part.stop]).reshape(part.shape(_shape(tensor)))
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    # A row's values are numbers of their own, or blocks of bytes.
    stride = size if tensor.data.dtype == np.uint8 else block
    first, last = part.start // block, -(-part.stop // block)
    values = _values(tensor, tensor.data[:, first * stride : last * stride]).reshape(len(tensor.data), -1)
    return values[:, part.start - first * block : part.stop - first * block].copy()


def _values(tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
    try:
        values = gguf.dequantize(data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{tensor.name}: {tensor.tensor_type.name} can't be read: {error}") from error
    return np.array(values, dtype=np.float32)


def _shape(tensor: gguf.ReaderTensor) -> Shape:
    """GGUF counts dimensions from the innermost one."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _huggingface_name(name: str) -> str:
    """The parameter's Hugging Face name; unknown names stay as they are, and `ModelFiles.checked` tells of them."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and part in _LAYER:
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    return name

"""Which format a checkpoint is in, by the `quantization_config` of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.errors import ModelError
from engine.weights.quantized.schemes import AWQ, GPTQ, PackedIntegers, ScaledCodes, Scheme

SUPPORTED = (
    "fp8, fbgemm_fp8, awq (gemm), gptq, and compressed-tensors (float-quantized, int-quantized, naive-quantized, "
    "pack-quantized)"
)
INT4_GROUPS = (32, 64, 128, 256)
FLOAT8_BLOCK = 128
"""Of what there are kernels for GPUs, see `engine.quantized_linear`."""
GPTQ_BITS = (2, 4, 8)
PACKED_BITS = (4, 8)
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


class Quantization(NamedTuple):
    """What a config.json says of its weights."""

    name: str
    """In words, for people."""
    scheme: Scheme
    kept: bool
    """Whether a GPU has kernels that compute with such matrices as they are; else they are dequantised there too."""


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Of a parsed config.json; None for plain weights. Raises `ModelError` that names what is not supported."""
    described = config.get("quantization_config")
    if described is None:
        return None
    method = described.get("quant_method")
    readers = {
        "fp8": _fp8, "fbgemm_fp8": _fbgemm, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed,
    }  # fmt: skip
    if method not in readers:
        raise ModelError(f"quantization_config: quant_method {method!r} is not supported; supported are {SUPPORTED}")
    try:
        return readers[method](described)
    except KeyError as error:
        raise ModelError(f"quantization_config of {method} lacks {error}") from error


def _fp8(described: Mapping[str, Any]) -> Quantization | None:
    block = described.get("weight_block_size")
    if block is None:
        return Quantization("fp8", ScaledCodes(), kept=True)
    rows, columns = block
    scheme = ScaledCodes("weight_scale_inv", (rows, columns))
    return Quantization(f"fp8, blocks of {rows} x {columns}", scheme, kept=rows == columns == FLOAT8_BLOCK)


def _fbgemm(described: Mapping[str, Any]) -> Quantization | None:
    return Quantization("fp8, a scale for each output", ScaledCodes(), kept=True)


def _awq(described: Mapping[str, Any]) -> Quantization | None:
    _require("awq", "bits", described.get("bits", described.get("w_bit")), (4,))
    _require("awq", "version", str(described.get("version", "gemm")).lower(), ("gemm",))
    return Quantization("awq, 4 bits", AWQ(), kept=described.get("group_size") in INT4_GROUPS)


def _gptq(described: Mapping[str, Any]) -> Quantization | None:
    bits = described["bits"]
    layout = described.get("checkpoint_format", "gptq")
    _require("gptq", "bits", bits, GPTQ_BITS)
    _require("gptq", "checkpoint_format", layout, tuple(GPTQ_VERSIONS))
    _require("gptq", "is_marlin_format", bool(described.get("is_marlin_format")), (False,))
    _require("gptq", "dynamic", described.get("dynamic") or None, (None,))
    size = described["group_size"]
    kept = bits == 4 and size in INT4_GROUPS and not described.get("desc_act")
    return Quantization(f"gptq, {bits} bits", GPTQ(bits, size, GPTQ_VERSIONS[layout]), kept)


def _compressed(described: Mapping[str, Any]) -> Quantization | None:
    layout = described["format"]
    if layout == "dense":
        return None
    method = "compressed-tensors"
    formats = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    _require(method, "format", layout, formats)
    _require(method, "transform_config", described.get("transform_config") or None, (None,))
    sparsity = (described.get("sparsity_config") or {}).get("format", "dense")
    _require(method, "sparsity_config.format", sparsity, ("dense",))
    weights = [group["weights"] for group in described["config_groups"].values()]
    kinds = {(each["type"], each["num_bits"], each["strategy"], _block(each)) for each in weights}
    if len(kinds) != 1:
        raise ModelError("compressed-tensors: config_groups whose weights differ are not supported")
    ((kind, bits, strategy, block),) = kinds
    name = f"{method}, {kind} of {bits} bits by {strategy}"
    if layout == "pack-quantized":
        _require(method, "num_bits", bits, PACKED_BITS)
        kept = (block or (0, 0))[1] in INT4_GROUPS if bits == 4 else block is None
        return Quantization(name, PackedIntegers(bits), kept)
    _require(method, "num_bits", bits, (8,))
    _require(method, "strategy", strategy, ("tensor", "channel", "group", "block"))
    kept = block is None or (kind == "float" and block == (FLOAT8_BLOCK, FLOAT8_BLOCK))
    return Quantization(name, ScaledCodes(block=block), kept)


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale, where the scales' number does not tell it."""
    if weights["strategy"] == "group":
        return 1, weights["group_size"]
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        return rows, columns
    return None


def _require(method: str, key: str, found: object, supported: tuple[object, ...]) -> None:
    if found not in supported:
        allowed = " or ".join(str(value) for value in supported)
        raise ModelError(f"{method} with {key} {found!r} is not supported, only {allowed}")

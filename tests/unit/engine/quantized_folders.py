"""Model folders quantised by definition, one field and one group at a time; nothing of `engine` is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUP = 16
BLOCK = 32
LARGEST_FLOAT8 = 448.0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output in field 0, 1, ... 7 of a word."""

Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A weight [outputs, inputs] -> the tensors that keep it, by the last part of their names, and what they stand for."""


@dataclass(frozen=True)
class Format:
    quantise: Quantise
    config: dict[str, object]
    ending: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that some writers put beside each matrix and that change nothing."""


def compressed(layout: str, kind: str, bits: int, strategy: str, **more: object) -> dict[str, object]:
    """compressed-tensors' `quantization_config`."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def float8(rows: int | None, columns: int | None, name: str) -> Quantise:
    """Scales for blocks of so many rows and columns; None: all of them."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        height, width = rows or weight.shape[0], columns or weight.shape[1]
        codes, meant, scales = torch.empty_like(weight), torch.empty_like(weight), []
        for top in range(0, weight.shape[0], height):
            for left in range(0, weight.shape[1], width):
                block = (slice(top, top + height), slice(left, left + width))
                scale = weight[block].abs().max() / LARGEST_FLOAT8
                codes[block] = (weight[block] / scale).to(torch.float8_e4m3fn).float()
                meant[block] = codes[block] * scale
                scales.append(scale)
        shape = () if rows is columns is None else (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
        return {"weight": codes.to(torch.float8_e4m3fn), name: torch.stack(scales).view(shape)}, meant

    return quantise


def integers(weight: Tensor, low: int, high: int, group_of: list[int], *, symmetric: bool):
    """codes [outputs, inputs]; zeros and scales [outputs, groups]; what they stand for [outputs, inputs]."""
    groups = max(group_of) + 1
    codes, meant = torch.empty(weight.shape, dtype=torch.int64), torch.empty_like(weight)
    zeros = torch.zeros(len(weight), groups, dtype=torch.int64)
    scales = torch.empty(len(weight), groups)
    for group in range(groups):
        members = [index for index, of in enumerate(group_of) if of == group]
        values = weight[:, members]
        if symmetric:
            scale = values.abs().amax(1) / high
        else:
            scale = (values.amax(1).clamp(min=0) - values.amin(1).clamp(max=0)) / (high - low)
        scale = scale.half().float().clamp(min=1e-4).half().float()
        zero = torch.zeros(len(weight)) if symmetric else (low - values.amin(1).clamp(max=0) / scale).round()
        zero = zero.clamp(low, high)
        code = (values / scale[:, None] + zero[:, None]).round().clamp(low, high)
        codes[:, members], zeros[:, group], scales[:, group] = code.long(), zero.long(), scale
        meant[:, members] = (code - zero[:, None]) * scale[:, None]
    return codes, zeros, scales, meant


def words(fields: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, columns] of values below 2^bits -> int32 [rows, columns * bits / 32]; field i is column order[i]."""
    share = 32 // bits
    packed = torch.zeros(len(fields), fields.shape[1] // share, dtype=torch.int64)
    for position in range(share):
        taken = order[position] if order else position
        packed |= fields[:, taken::share] << (bits * position)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    group_of = [index // GROUP for index in range(weight.shape[1])]
    codes, zeros, scales, meant = integers(weight, 0, 15, group_of, symmetric=False)
    parts = {
        "qweight": words(codes.t(), 4, AWQ_ORDER), "qzeros": words(zeros.t(), 4, AWQ_ORDER),
        "scales": scales.t().contiguous().half(),
    }  # fmt: skip
    return parts, meant


def gptq(bits: int, *, act_order: bool = False, version: int = 1, group: int = GROUP) -> Quantise:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        size = group if group > 0 else inputs
        order = torch.randperm(inputs).tolist() if act_order else range(inputs)
        group_of = [0] * inputs
        for place, index in enumerate(order):
            group_of[index] = place // size
        codes, zeros, scales, meant = integers(weight, 0, 2**bits - 1, group_of, symmetric=False)
        stored = (zeros.clamp(min=1) - 1) if version == 1 else zeros
        if version == 1:
            # The first version can't say that a zero point is 0.
            moved = (zeros == 0).float() * scales
            meant = meant - moved[:, group_of]
        parts = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words(stored.t(), bits), "scales": scales.t().contiguous().half(),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }  # fmt: skip
        return parts, meant

    return quantise


def packed(bits: int, group: int | None, *, symmetric: bool = True) -> Quantise:
    half = 1 << (bits - 1)

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        group_of = [index // (group or weight.shape[1]) for index in range(weight.shape[1])]
        codes, zeros, scales, meant = integers(weight, -half, half - 1, group_of, symmetric=symmetric)
        parts = {
            "weight_packed": words(codes + half, bits), "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        meant = (codes - zeros[:, group_of]) * parts["weight_scale"].float()[:, group_of]
        if not symmetric:
            parts["weight_zero_point"] = words((zeros + half).t(), bits).t().contiguous()
        return parts, meant

    return quantise


def int8(*, symmetric: bool = True, group: int | None = None) -> Quantise:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        group_of = [index // (group or weight.shape[1]) for index in range(weight.shape[1])]
        codes, zeros, scales, meant = integers(weight, -128, 127, group_of, symmetric=symmetric)
        parts = {"weight": codes.to(torch.int8), "weight_scale": scales}
        if not symmetric:
            parts["weight_zero_point"] = zeros.to(torch.int8)
        return parts, meant

    return quantise


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}

FORMATS = {
    "fp8 per tensor": Format(
        float8(None, None, "weight_scale"), {"quant_method": "fp8", "activation_scheme": "static"},
        {"input_scale": torch.tensor(0.1)},
    ),
    "fp8 in blocks": Format(
        float8(BLOCK, BLOCK, "weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    ),
    "fbgemm": Format(float8(1, None, "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "compressed fp8 per output": Format(
        float8(1, None, "weight_scale"), compressed("float-quantized", "float", 8, "channel")
    ),
    "compressed fp8 in blocks": Format(
        float8(BLOCK, GROUP, "weight_scale"),
        compressed("float-quantized", "float", 8, "block", block_structure=[BLOCK, GROUP]),
    ),
    "compressed int8": Format(int8(), compressed("int-quantized", "int", 8, "channel")),
    "compressed int8 in groups, with zero points": Format(
        int8(symmetric=False, group=GROUP), compressed("naive-quantized", "int", 8, "group", group_size=GROUP)
    ),
    "compressed int4": Format(packed(4, GROUP), compressed("pack-quantized", "int", 4, "group", group_size=GROUP)),
    "compressed int4 with zero points": Format(
        packed(4, GROUP, symmetric=False), compressed("pack-quantized", "int", 4, "group", group_size=GROUP)
    ),
    "compressed int8 in words": Format(packed(8, None), compressed("pack-quantized", "int", 8, "channel")),
    "awq": Format(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "GEMM"}),
    "gptq": Format(gptq(4), GPTQ),
    "gptq with act-order": Format(gptq(4, act_order=True), GPTQ | {"desc_act": True}),
    "gptq of the second version": Format(gptq(4, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq of 8 bits in one group": Format(gptq(8, group=-1), GPTQ | {"bits": 8, "group_size": -1}),
}  # fmt: skip


def write(model, folder: Path, form: Format) -> dict[str, Tensor]:
    """Saves `model` with all products of its layers quantised; returns what they stand for, and sets it in `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, meant = {}, {}
    torch.manual_seed(1)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            parts, meant[name] = form.quantise(parameter.detach().clone())
            tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in (parts | form.ending).items()}
            parameter.copy_(meant[name])
        else:
            tensors[name] = parameter.detach().clone().contiguous()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": form.config}
    (folder / "config.json").write_text(json.dumps(config))
    return meant

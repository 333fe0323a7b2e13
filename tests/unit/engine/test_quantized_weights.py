"""Quantised checkpoints: what is read is what their writers meant, format by format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config import WeightsFrom
from cluster.errors import ModelError
from engine.weights import open_model
from engine.weights.quantized.matrix import QuantizedMatrix, grouped, stacked
from engine.weights.quantized.schemes import AWQ, GPTQ, PackedIntegers
from tests.unit.engine.quantized_folders import FORMATS, write
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, run, sequence

RECORDED = json.loads(Path(__file__).with_name("packed_weights.json").read_text())
"""Matrices in packed form, and what the packages that write these forms unpack them to; see "provenance" there."""


def recorded(name):
    return {part: torch.tensor(value) for part, value in RECORDED[name].items()}


def as_words(tensor):
    return tensor.to(torch.int32)


class TestRecorded:
    """Against AutoAWQ, GPTQModel and compressed-tensors themselves."""

    def test_awq(self):
        parts = recorded("awq")
        matrix = AWQ().matrix({name: as_words(parts[name]) if name != "scales" else parts[name] for name in AWQ.parts})
        assert torch.equal(matrix.dequantized(), parts["weight"])
        assert matrix.group_size == RECORDED["group_size"]

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("name", ["gptq", "gptq act-order", "gptq 8 bits"])
    def test_gptq(self, name, version):
        parts = recorded(name)
        given = {"qweight": as_words(parts["qweight"]), "scales": parts["scales"], "g_idx": as_words(parts["g_idx"])}
        given["qzeros"] = as_words(parts["qzeros" if version == 1 else "qzeros v2"])
        matrix = GPTQ(RECORDED[name]["bits"], RECORDED["group_size"], version).matrix(given)
        assert torch.equal(matrix.dequantized(), parts["weight"])
        assert matrix.group_size == (None if name == "gptq act-order" else RECORDED["group_size"])

    @pytest.mark.parametrize("name", ["pack-quantized", "pack-quantized with zero points", "pack-quantized 8 bits"])
    def test_compressed_tensors(self, name):
        parts = recorded(name)
        for word in ("weight_packed", "weight_zero_point"):
            if word in parts:
                parts[word] = as_words(parts[word])
        matrix = PackedIntegers(RECORDED[name]["bits"]).matrix(parts)
        assert torch.equal(matrix.dequantized(), parts["weight"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_folder_is_read_as_it_is_meant(name, tmp_path):
    model = make_model(MODELS["llama"])
    with torch.no_grad():
        meant = write(model, tmp_path, FORMATS[name])
    weights = open_model(tmp_path, WeightsFrom.FILES).weights
    for parameter, values in meant.items():
        torch.testing.assert_close(weights.read(parameter), values, atol=0, rtol=1e-6)
    files = load_file(tmp_path / "model.safetensors")
    stray = sum(tensor.nbytes for part, tensor in files.items() if part.endswith("input_scale"))
    assert sum(weights.stored_bytes().values()) == sum(tensor.nbytes for tensor in files.values()) - stray


@pytest.mark.parametrize("name", ["fp8 in blocks", "awq", "gptq with act-order"])
def test_it_answers_as_transformers_does_with_what_is_meant(name, tmp_path):
    model = make_model(MODELS["qwen2"])
    with torch.no_grad():
        write(model, tmp_path, FORMATS[name])
    (prompt,) = prompts(30)
    engine = make_engine(tmp_path)
    engine.submit(sequence("a", prompt, 1, logprobs=128))
    while not (result := engine.step()).sampled:
        pass
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    found = torch.empty(128)
    for token, logprob in result.sampled[0].logprobs.top:
        found[token] = logprob
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


class TestWhatWritersLeaveBehind:
    @pytest.fixture
    def folder(self, tmp_path):
        with torch.no_grad():
            write(make_model(MODELS["llama"]), tmp_path, FORMATS["gptq"])
        return tmp_path

    def change(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    def configure(self, folder, quantization):
        config = json.loads((folder / "config.json").read_text())
        if quantization is None:
            del config["quantization_config"]
        else:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))

    def refusal(self, folder):
        with pytest.raises(ModelError) as refused:
            open_model(folder, WeightsFrom.FILES).weights.read("model.layers.1.mlp.up_proj.weight")
        return str(refused.value)

    def test_biases_of_zeros_are_none_and_others_are_refused(self, folder):
        self.change(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(80)}))
        asked = prompts(5)
        run(make_engine(folder), sequence("a", asked[0], 2))
        self.change(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.ones(80)}))
        assert "unexpected: model.layers.1.mlp.up_proj.bias" in self.refusal(folder)

    def test_codes_without_scales(self, folder):
        self.change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
        assert "model.layers.1.mlp.up_proj is quantised, but lacks scales" in self.refusal(folder)

    def test_scales_that_do_not_fit(self, folder):
        def shorten(tensors):
            tensors["model.layers.1.mlp.up_proj.g_idx"] = torch.zeros(7, dtype=torch.int32)

        self.change(folder, shorten)
        assert "model.layers.1.mlp.up_proj: its parts don't fit together" in self.refusal(folder)

    def test_codes_that_the_config_says_nothing_of(self, tmp_path):
        with torch.no_grad():
            write(make_model(MODELS["llama"]), tmp_path, FORMATS["fp8 per tensor"])
        self.configure(tmp_path, None)
        assert "is quantised (F8_E4M3), and config.json does not say how" in self.refusal(tmp_path)

    @pytest.mark.parametrize(
        ("quantization", "said"),
        [
            ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported are fp8,"),
            ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq with version 'gemv'"),
            ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "gptq with bits 3 is not supported, only 2 or 4"),
            ({"quant_method": "gptq", "bits": 4}, "quantization_config of gptq lacks 'group_size'"),
            ({"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "marlin"}, "'marlin'"),
            ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ],
    )
    def test_what_we_do_not_read(self, folder, quantization, said):
        self.configure(folder, quantization)
        assert said in self.refusal(folder)


class TestMatrix:
    """Parts of a matrix, for ranks of a group, and matrices above each other, for fused products."""

    def matrix(self, outputs, inputs, block_rows, *, zeros=True, act_order=False, seed=0):
        torch.manual_seed(seed)
        groups = grouped(inputs, 8)
        shape = (-(-outputs // block_rows), -(-inputs // 8))
        return QuantizedMatrix(
            codes=torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8),
            scales=torch.rand(shape),
            zeros=torch.randint(0, 16, shape, dtype=torch.int16) if zeros else None,
            block_rows=block_rows,
            groups=groups[torch.randperm(inputs)] if act_order else groups,
        )

    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("block_rows", [1, 5, 24])
    def test_rows_and_columns(self, block_rows, act_order):
        matrix = self.matrix(24, 32, block_rows, act_order=act_order)
        for start, stop in ((0, 24), (0, 10), (5, 20), (7, 9), (6, 23)):
            assert torch.equal(matrix.rows(start, stop).dequantized(), matrix.dequantized()[start:stop])
        for start, stop in ((0, 32), (8, 24), (5, 20)):
            assert torch.equal(matrix.columns(start, stop).dequantized(), matrix.dequantized()[:, start:stop])

    @pytest.mark.parametrize("heights", [(10, 5, 5), (10, 7, 5)])
    @pytest.mark.parametrize("block_rows", [1, 5])
    def test_above_each_other(self, block_rows, heights):
        matrices = [self.matrix(height, 32, block_rows, seed=height) for height in heights]
        together = stacked(matrices)
        assert torch.equal(together.dequantized(), torch.cat([matrix.dequantized() for matrix in matrices]))

    def test_not_if_their_inputs_are_grouped_differently(self):
        assert stacked([self.matrix(8, 32, 1), self.matrix(8, 32, 1, act_order=True)]) is None

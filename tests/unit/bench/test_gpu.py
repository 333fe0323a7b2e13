"""What bounds a step on a GPU, how that is told, and what a machine without one says. The driver runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from bench.cli import app, main
from bench.contenders import SPLIT
from bench.gpu import shapes
from bench.gpu.measure import Measured, find_model, handoff_settings
from bench.gpu.report import GpuReport
from bench.handoff.measure import Exposed
from bench.machine import describe_setting
from bench.statistics import Repeated
from cluster.config import Device, Dtype, WeightsFrom
from cluster.gpu_speed import DecodePoint, GpuSpeed, PrefillPoint
from cluster.topology import load_topology
from engine import measure_gpu
from engine.measure_gpu import engine_config, idle_share, measure, operations, read_bytes
from engine.weights import open_model

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return find_model("tiny", tmp_path)


def test_the_same_driver_measures_a_tiny_model_on_a_cpu(tiny):
    scale = measure_gpu.Scale((1, 3), (20, 70), context=24, chunk_tokens=64, copy_bytes=1 << 20, product_side=64)
    config = engine_config(tiny.path, tiny.weights, Device.CPU, Dtype.FLOAT32, scale)
    speed = measure(config, scale)
    assert (speed.device, speed.dtype, speed.chunk_tokens) == ("cpu", "float32", 64)
    assert [(point.batch, point.idle_share) for point in speed.decode] == [(1, None), (3, None)]
    assert [point.tokens for point in speed.prefill] == [20, 70]
    assert all(speed.floor_share(point) > 0 for point in speed.decode)
    assert all(speed.rate_share(point) > 0 for point in speed.prefill)
    architecture = open_model(config.model_path, WeightsFrom.DUMMY).config
    kv_token = 2 * 2 * 2 * 8 * 4
    grown = speed.decode[1].read_bytes - speed.decode[0].read_bytes
    assert grown == 2 * kv_token * speed.decode[0].context
    assert speed.decode[0].read_bytes == read_bytes(architecture, speed.decode[0].context, 4, 4)


def test_floors_of_a_model_of_known_size(tmp_path):
    """Llama-3-8B has 8.03 billion parameters, of which a step does not read the embedding; 128 KiB of KV a token."""
    model = find_model("llama-3-8b", tmp_path)
    config = open_model(shapes.Path(model.path), WeightsFrom.DUMMY).config
    weights = read_bytes(config, 0, 2, 2)
    assert weights == pytest.approx(2 * (8.030e9 - 128256 * 4096), rel=1e-3)
    assert read_bytes(config, 1000, 2, 2) - weights == 1000 * 131072
    assert read_bytes(config, 1000, 2, 1) - weights == 1000 * 65536
    assert operations(config, 1) == pytest.approx(weights, rel=1e-3)
    attention = operations(config, 8192) - 8192 * operations(config, 1)
    assert attention == pytest.approx(2 * 32 * 4096 * 8192**2 - 2 * 8191 * 128256 * 4096, rel=1e-2)


@pytest.mark.parametrize(
    ("spans", "idle"),
    [
        ([], None),
        ([(0, 10)], 0.0),
        ([(0, 4), (6, 10)], 0.2),
        ([(6, 10), (0, 7), (1, 2)], 0.0),
        ([(0, 1), (0, 1), (9, 10)], 0.8),
    ],
)
def test_a_device_is_idle_when_none_of_its_work_runs(spans, idle):
    assert idle_share(spans) == (idle if idle is None else pytest.approx(idle))


def speed(**changes):
    fields = {
        "model": "m", "device": "NVIDIA H200", "dtype": "bfloat16", "chunk_tokens": 8192,
        "copied_bytes_per_second": 4e12, "operations_per_second": 8e14,
        "decode": [DecodePoint(1, 1024, 5e-3, 16_000_000_000, 0.02), DecodePoint(64, 1024, 6e-3, 24_000_000_000, 0.07)],
        "prefill": [PrefillPoint(8192, 0.2, 1.2e14)],
    }  # fmt: skip
    return GpuSpeed(**fields | changes)


def test_what_people_read_of_it():
    exposed = Exposed(*([2048] + [Repeated.over([value]) for value in (0.2, 0.004, 0.002, 0.02)]))
    report = GpuReport(describe_setting(), 0, [Measured(speed(), exposed), Measured(speed(model="n"), None)])
    ceilings, decode, prefill, handoff, targets = report.page.tables
    assert ceilings.rows[0] == ["m", "NVIDIA H200", "4,000", "800", "bfloat16"]
    assert decode.rows[0] == ["m", "1", "1,024", "5.00", "4.00", "80%", "2.0%"]
    assert prefill.rows[0] == ["m", "8,192", "8,192", "200", "40,960", "75%"]
    assert handoff.rows == [["m", "2,048", "200", "4.00", "2.00", "2.0%"]]
    verdicts = {row[0]: row[-1] for row in targets.rows}
    assert verdicts["m, batch 1: reading / decode step"] == "met"
    assert verdicts["m, batch 64: device waits for the host"] == "not met"
    assert verdicts["m, 8,192 tokens: exposed handoff / prefill"] == "met"
    assert verdicts["n, 8,192 tokens: exposed handoff / prefill"] == "-"


def test_a_shape_is_a_model_that_a_cluster_can_serve(tiny):
    folder = open_model(shapes.Path(tiny.path), tiny.weights)
    assert folder.config.vocab_size == 128
    assert Tokenizer.from_file(f"{tiny.path}/tokenizer.json").get_vocab_size() == 128
    topology = load_topology(SPLIT, handoff_settings(tiny))
    assert (topology.model.device, topology.model.weights) == (Device.CUDA, WeightsFrom.DUMMY)
    assert topology.prefill.gpus == topology.decode.gpus == [[0]]
    assert find_model("/some/folder", tiny.path).weights is WeightsFrom.FILES


def test_the_command_is_listed():
    result = CliRunner().invoke(app, ["gpu", "--help"])
    assert result.exit_code == 0
    assert "Without a" in result.output


@NO_GPU
def test_without_a_gpu_it_says_so_and_fails(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["bench", "gpu", "--models", "tiny", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "error: no GPU: torch finds no CUDA device on this machine" in capsys.readouterr().out
    assert not out.exists()

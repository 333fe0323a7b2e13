"""Mistakes on the command line are said in words."""

import sys

import pytest

from bench import cli


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--workload", "colossal"], "expected one of mixed, decode, brief"),
        (["compare", "--cores", "first"], "expected numbers with commas"),
        (["compare", "--cores", "100000"], "this process may use"),
        (["compare", "--chunks", "64,none"], "expected numbers with commas"),
        (["compare", "--chunks", "0"], "expected no number below 1"),
        (["load", "--url", "http://127.0.0.1:9", "--workload", "decode", "--options", "[]"], "expected a JSON object"),
    ],
)
def test_a_mistake_is_named(monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 1
    assert words in " ".join(capsys.readouterr().out.split())


def test_memcpy_says_its_rate(monkeypatch, capsys):
    assert run(monkeypatch, "memcpy", "--page-bytes", "4096", "--pages", "8") == 0
    assert "GB/s" in capsys.readouterr().out

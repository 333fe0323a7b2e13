"""The deployment guide: its topologies are right, and what it tells to type is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from cluster.topology import load_topology
from deploy.cli import app

DEPLOY = Path(__file__).parents[3] / "deploy"
GUIDE = (DEPLOY / "README.md").read_text()
TOPOLOGIES = sorted((DEPLOY / "topologies").glob("*.yaml"))
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", GUIDE.replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.stem)
def test_each_topology_is_valid_and_in_the_guide(path):
    load_topology(path)
    assert path.name in GUIDE


def test_all_that_the_guide_names_is_there():
    named = set(re.findall(r"deploy/[\w./-]+\.(?:yaml|json)", GUIDE))
    named |= {f"deploy/{link}" for link in re.findall(r"\]\(([\w./-]+)\)", GUIDE)}
    assert [name for name in sorted(named) if not (DEPLOY.parent / name).exists()] == []


def test_each_command_of_baton_is_one():
    group = typer.main.get_command(app)
    of_baton = [words[1:] for words in COMMANDS if words[0].endswith("/baton")]
    assert len(of_baton) >= 10
    for words in of_baton:
        arguments = words[: words.index("|")] if "|" in words else words
        command = group
        while hasattr(command, "commands"):  # a group
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, list(arguments))  # raises for an option that it does not have


def test_each_target_of_make_and_each_module_is_there():
    makefile = (DEPLOY.parent / "Makefile").read_text()
    targets = {word for words in COMMANDS if words[0] == "make" for word in words[1:]}
    targets |= set(re.findall(r"`make ([\w-]+)`", GUIDE))
    assert targets >= {"setup", "dashboards", "test-rdma"}
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    modules = {words[words.index("-m") + 1] for words in COMMANDS if words[0].endswith("/python")}
    assert modules == {"bootstrap", "decode_worker", "prefill_worker", "router"}
    assert all(importlib.util.find_spec(f"{module}.__main__") for module in modules)

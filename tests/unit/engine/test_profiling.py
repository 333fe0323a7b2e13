"""Recording steps: around any handler, for as long as was asked, never in its way."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from cluster.engine_messages import ProfileEnded, ProfileReply, StartProfile, StopProfile
from cluster.messages import (
    Load,
)
from engine.linear import make_linear
from engine.profiling import LONGEST_SILENCE_SECONDS, ProfiledSteps


class Handler:
    """Each busy turn computes one product."""

    def __init__(self) -> None:
        self.steps = 0
        self.idle = False
        self.heard: list[object] = []
        self.closed = False
        self._product = make_linear(torch.ones(32, 16))

    def handle(self, message, now):
        self.heard.append(message)

    def step(self, now):
        if self.idle:
            return False
        self._product(torch.ones(4, 16))
        self.steps += 1
        return True

    def load(self):
        return Load(steps=self.steps)

    def close(self):
        self.closed = True


@pytest.fixture
def handler():
    return Handler()


@pytest.fixture
def said():
    return []


@pytest.fixture
def silences():
    return []


@pytest.fixture
def profiled(handler, said, silences):
    return ProfiledSteps(handler, lambda: handler.steps, said.append, silences.append)


def names(file):
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("cpu_op", "user_annotation")]


def test_a_trace_has_each_step_and_the_products_in_it(profiled, handler, said, silences, tmp_path):
    file = tmp_path / "new" / "folder" / "one.trace.json.gz"
    profiled.step(0.0)
    profiled.handle(StartProfile(str(file), 3), 0.0)
    for _ in range(5):
        assert profiled.step(0.0)
    assert said == [ProfileReply(str(file)), ProfileEnded(str(file))]
    found = names(file)
    assert [name for name in found if name.startswith("step ")] == ["step 1", "step 2", "step 3"]
    assert sum("linear" in name for name in found) >= 3
    assert list(file.parent.iterdir()) == [file], "nothing half written stays"
    assert handler.steps == 6 and profiled.load() == Load(steps=6)
    silence = [LONGEST_SILENCE_SECONDS, 0.0]
    assert silences == [*silence, *silence], "of the start and of the writing, each announced and over"


def test_turns_without_work_do_not_count(profiled, handler, said, tmp_path):
    profiled.handle(StartProfile(str(tmp_path / "t.json.gz"), 1), 0.0)
    handler.idle = True
    assert not any(profiled.step(0.0) for _ in range(3))
    assert len(said) == 1
    handler.idle = False
    profiled.step(0.0)
    assert isinstance(said[-1], ProfileEnded)


def test_what_does_not_fit_the_moment_is_refused(profiled, said, tmp_path):
    profiled.handle(StopProfile(), 0.0)
    profiled.handle(StartProfile(str(tmp_path / "first.json.gz"), 10), 0.0)
    profiled.handle(StartProfile(str(tmp_path / "second.json.gz"), 10), 0.0)
    profiled.handle(StopProfile(), 0.0)
    profiled.handle(StopProfile(), 0.0)
    assert [reply.error.code if reply.error else "" for reply in said] == ["Conflict", "", "Conflict", "", "Conflict"]
    assert said[2].error.message.endswith("first.json.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["first.json.gz"]


def test_a_folder_that_can_not_be_written_to_is_an_error_and_no_recording(profiled, said, tmp_path):
    (tmp_path / "file").write_text("")
    profiled.handle(StartProfile(str(tmp_path / "file" / "t.json.gz"), 10), 0.0)
    assert said[0].error.code == "ConfigError" and "logging.profile_dir" in said[0].error.message
    profiled.handle(StopProfile(), 0.0)
    assert said[1].error.code == "Conflict"


def test_all_else_is_the_handlers(profiled, handler, tmp_path):
    profiled.handle("something", 0.0)
    profiled.handle(StartProfile(str(tmp_path / "t.json.gz"), 10), 0.0)
    profiled.close()
    assert handler.heard == ["something"] and handler.closed and not list(tmp_path.iterdir())

"""Nobody hears that a chunk is computed, and so no page of it goes out, before the device has come to its end."""

from __future__ import annotations

import pytest

from cluster.config import Switch
from engine.transit import Mark
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, sequence


@pytest.mark.parametrize("ahead", [False, True])
def test_progress_is_told_when_the_device_is_there(tmp_path, monkeypatch, ahead):
    """Of a chunk that samples nothing, too: there is no token that would be waited for."""
    make_model(MODELS["llama"]).save_pretrained(tmp_path)
    settings = {"ahead": Switch.ALWAYS} if ahead else {}
    engine = make_engine(tmp_path, chunk_tokens=16, **settings)
    set_, waited = [], []
    monkeypatch.setattr(Mark, "set", lambda mark: set_.append(mark))
    monkeypatch.setattr(Mark, "wait", lambda mark: waited.append(mark))
    (prompt,) = prompts(60)
    engine.submit(sequence("long", prompt, 1))
    result = engine.step()
    assert [(progress.computed, result.sampled) for progress in result.progress] == [(16, [])]
    assert waited == set_[:1]
    assert len(set_) == (2 if ahead else 1)

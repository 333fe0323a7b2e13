"""Where a model's config and weights come from: a GGUF file, a Hugging Face folder, or nowhere (`dummy`)."""

from __future__ import annotations

from pathlib import Path

from cluster.config import WeightsFrom
from engine.weights.base import ModelFiles
from engine.weights.dummy import DummyWeights
from engine.weights.gguf_file import open_gguf
from engine.weights.huggingface import open_folder

__all__ = ["ModelFiles", "open_model"]


def open_model(path: Path, weights: WeightsFrom) -> ModelFiles:
    """The model at `path`, a folder or a .gguf file, checked to be complete. Raises `ModelError`."""
    model = open_gguf(path) if path.is_file() else open_folder(path, weights)
    if weights is WeightsFrom.DUMMY:
        return ModelFiles(model.config, DummyWeights(model.config))
    return model.checked()

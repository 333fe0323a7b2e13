"""Hugging Face model folders: config.json beside one or many .safetensors files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.config import WeightsFrom
from cluster.errors import ModelError
from engine.model_config import ModelConfig, from_huggingface
from engine.weights.base import ModelFiles, Part, Shape, identity_of, parameter_shapes
from engine.weights.dummy import DummyWeights
from engine.weights.quantized.config import quantization_of
from engine.weights.quantized.weights import QuantizedWeights, refuse_bare_codes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DIGITS = re.compile(r"\d+")
"""The first number in the name of a dtype (BF16, F8_E4M3, I32) is its size in bits."""


def open_folder(folder: Path, weights: WeightsFrom) -> ModelFiles:
    """The model in `folder`, which needs no weights if they are to be dummies. Raises `ModelError`."""
    described = _read_json(folder / "config.json")
    config = from_huggingface(described)
    if weights is WeightsFrom.DUMMY:
        return ModelFiles(config, DummyWeights(config))
    quantization = quantization_of(described)
    files = SafetensorsWeights(config, folder)
    if quantization is None:
        refuse_bare_codes(files, files.shapes())
        return ModelFiles(config, files)
    return ModelFiles(config, QuantizedWeights(files, quantization, parameter_shapes(config)))


class SafetensorsWeights:
    """Implements `Checkpoint` and `StoredTensors`. Files are mapped: a tensor is read when it is asked for."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        files = _files(folder)
        self._handles = {file: _open(file) for file in files}
        self._file_of = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        self.identity = identity_of(config, files)
        sizes = Counter[str]()
        for name, size in self.stored_bytes().items():
            sizes[self.stored_dtype(name)] += size
        self.precision = ", ".join(name for name, _ in sizes.most_common())

    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(self._handles[file].get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def stored_dtype(self, name: str) -> str:
        dtype: str = self._handles[self._file_of[name]].get_slice(name).get_dtype()
        return dtype

    def stored_bytes(self) -> dict[str, int]:
        bits = {name: int(_DIGITS.findall(self.stored_dtype(name))[0]) for name in self._file_of}
        return {name: math.prod(shape) * bits[name] // 8 for name, shape in self.shapes().items()}

    def kept_bytes(self) -> Mapping[str, int]:
        return {}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        file = self._file_of[name]
        handle = self._handles[file]
        try:
            if part is not None:
                return _cut(handle.get_slice(name), part)
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: {name} can't be read: {error}") from error
        return tensor

    def quantized(self, name: str) -> None:
        return None


def _cut(stored: Any, part: Part) -> Tensor:
    """Reads no more than that from the file."""
    cut: Tensor = stored[part.start : part.stop] if part.axis == 0 else stored[:, part.start : part.stop]
    return cut.contiguous()


def _files(folder: Path) -> list[Path]:
    """In an order that does not depend on the machine."""
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map", {}).values()
        files = sorted(folder / name for name in set(names))
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(f"{folder} lacks {', '.join(missing) or 'weights'}: only safetensors files are supported")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object")
    return content

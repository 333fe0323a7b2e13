"""The weights of a quantised Hugging Face folder, under the names and in the shapes that the model asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import ModelError
from engine.weights.base import Part, Shape
from engine.weights.quantized.config import Quantization
from engine.weights.quantized.matrix import QuantizedMatrix

CODE_TYPES = frozenset({"F8_E4M3", "I8", "I32"})
"""Of tensors that hold codes, as safetensors names them."""
OF_ACTIVATIONS = frozenset(
    f"{what}_{kind}" for what in ("input", "output", "q", "k", "v", "prob") for kind in ("scale", "zero_point")
) | {"input_scale_ub"}
"""Parts that say how activations or KV would be quantised; ours are not, or as they come."""


class StoredTensors(Protocol):
    """A folder's tensors as its files have them."""

    identity: str

    def shapes(self) -> Mapping[str, Shape]: ...

    def stored_dtype(self, name: str) -> str:
        """As safetensors names it."""

    def stored_bytes(self) -> Mapping[str, int]: ...

    def read(self, name: str, part: Part | None = None) -> Tensor: ...


class QuantizedWeights:
    """Implements `Checkpoint`: a matrix is dequantised when it is read. `quantized` gives it as it is.

    Which matrices are quantised the files tell, and not the config's lists of those that are not.
    """

    def __init__(self, files: StoredTensors, quantization: Quantization, expected: Collection[str]) -> None:
        """`expected`: the parameters that the model has. Raises `ModelError` for codes without scales."""
        self._files = files
        self._scheme = scheme = quantization.scheme
        self._kept = quantization.kept
        self.precision = quantization.name
        self.identity = files.identity
        stored = files.shapes()
        self._modules = {
            module: frozenset(part for part in scheme.parts if f"{module}.{part}" in stored)
            for module, _, part in (name.rpartition(".") for name in stored)
            if part == scheme.codes and files.stored_dtype(f"{module}.{part}") in CODE_TYPES
        }
        plain = {name: shape for name, shape in stored.items() if self._is_plain(name, expected)}
        refuse_bare_codes(files, [name for name in plain if name in expected])
        self._shapes = plain | {
            f"{module}.weight": self._shape(module, {part: stored[f"{module}.{part}"] for part in parts})
            for module, parts in self._modules.items()
        }

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def stored_bytes(self) -> dict[str, int]:
        sizes = dict.fromkeys(self._shapes, 0)
        for name, size in self._files.stored_bytes().items():
            module, _, part = name.rpartition(".")
            logical = f"{module}.weight" if part in self._modules.get(module, ()) else name
            if logical in sizes:
                sizes[logical] += size
        return sizes

    def kept_bytes(self) -> dict[str, int]:
        kept = {f"{module}.weight" for module in self._modules} if self._kept else set()
        return {name: size for name, size in self.stored_bytes().items() if name in kept}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        matrix = self.quantized(name)
        if matrix is None:
            return self._files.read(name, part)
        return (matrix if part is None else part.of_matrix(matrix)).dequantized()

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """A parameter as it is stored; None if it is a plain one. Raises `ModelError` for a damaged file."""
        module, _, part = name.rpartition(".")
        if part != "weight" or module not in self._modules:
            return None
        parts = {part: self._files.read(f"{module}.{part}") for part in self._modules[module]}
        try:
            return self._scheme.matrix(parts).checked()
        except (ModelError, RuntimeError, IndexError) as error:
            raise ModelError(f"{module}: its parts don't fit together: {error}") from error

    def _is_plain(self, name: str, expected: Collection[str]) -> bool:
        """Whether it is a parameter for itself: neither a part of a quantised matrix, nor without effect here."""
        module, _, part = name.rpartition(".")
        if part in OF_ACTIVATIONS or part in self._modules.get(module, ()):
            return False
        # AutoGPTQ gives every product a bias, of zeros where the model has none.
        superfluous = part == "bias" and module in self._modules and name not in expected
        return not superfluous or bool(torch.count_nonzero(self._files.read(name)))

    def _shape(self, module: str, shapes: Mapping[str, Shape]) -> Shape:
        missing = self._scheme.required - shapes.keys()
        if missing:
            raise ModelError(f"{module} is quantised, but lacks {', '.join(sorted(missing))}")
        return self._scheme.shape(shapes)


def refuse_bare_codes(files: StoredTensors, names: Iterable[str]) -> None:
    """Raises `ModelError` if one of these is quantised: read as plain weights, its codes would mean something else."""
    for name in names:
        if files.stored_dtype(name) in CODE_TYPES:
            raise ModelError(f"{name} is quantised ({files.stored_dtype(name)}), and config.json does not say how")

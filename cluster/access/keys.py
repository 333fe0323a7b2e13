"""Keys and secrets: where they come from, and how they are compared. They are in no log, no metric and no error.

A file has one key per line; empty lines and lines with # are left out. It is read again when it changes, so that keys
are changed without a stop; a change that can't be used is told and left aside.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import NamedTuple

from cluster.access.file_version import FileVersion, version_of
from cluster.clock import Clock
from cluster.errors import ConfigError
from cluster.logging import get_logger

log = get_logger(__name__)

LOOK_SECONDS = 1.0
"""How long a change of the file may go unseen."""


class KeySource(NamedTuple):
    """Where keys are. `setting` is the config key of the file, for errors; `shortest` in characters."""

    setting: str
    file: str | None
    variable: str
    shortest: int = 1


class KeyRing:
    """The keys of one source. `open_ring` makes it; lives on one event loop."""

    def __init__(self, source: KeySource, keys: tuple[bytes, ...], clock: Clock, seen: FileVersion | None) -> None:
        self._source = source
        self._keys = keys
        self._clock = clock
        self._seen = seen
        self._looked_at = clock.now()

    def keys(self) -> tuple[bytes, ...]:
        """Never empty. Looks at the file at most once in `LOOK_SECONDS`."""
        now = self._clock.now()
        if self._source.file is not None and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._look(Path(self._source.file))
        return self._keys

    def accepts(self, shown: bytes) -> bool:
        """Whether `shown` is one of the keys. Takes as long for a wrong key as for a right one: what is compared are
        digests, and all of them."""
        digest = hashlib.sha256(shown).digest()
        found = False
        for key in self.keys():
            found |= hmac.compare_digest(digest, hashlib.sha256(key).digest())
        return found

    def _look(self, file: Path) -> None:
        try:
            seen = version_of(file)
            if seen == self._seen:
                return
            self._seen = seen
            self._keys = _parse(file.read_text(encoding="utf-8"), f"{self._source.setting}: {file}", self._source)
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            log.error("a changed key file can't be used: the former keys stay", file=str(file), error=str(error))
        else:
            log.info("read new keys", file=str(file), keys=len(self._keys))


def open_ring(source: KeySource, clock: Clock) -> KeyRing | None:
    """None if neither file nor variable is set. Raises `ConfigError` for a file that can't be read or has no key."""
    if source.file is None:
        text = os.environ.get(source.variable)
        return None if text is None else KeyRing(source, _parse(text, source.variable, source), clock, None)
    file = Path(source.file)
    try:
        seen, text = version_of(file), file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{source.setting}: {file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source.setting}: {file} is not text in UTF-8") from error
    return KeyRing(source, _parse(text, f"{source.setting}: {file}", source), clock, seen)


def _parse(text: str, place: str, source: KeySource) -> tuple[bytes, ...]:
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{place} has no key; expected one per line")
    if any(len(key) < source.shortest for key in keys):
        raise ConfigError(
            f"{place}: a key is too short; expected at least {source.shortest} characters, as `openssl rand -hex 32` "
            "makes them"
        )
    return tuple(key.encode() for key in keys)

"""TLS contexts of a `Tls` section. A file that does not do is told by its setting, its name and what is wrong.

Files are read again when they change, before the next connection: certificates are renewed without a stop. A change
that can't be used is told and left aside. An authority that is no longer in its file is trusted until a restart.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, NamedTuple

from cluster.access.file_version import FileVersion, version_of
from cluster.config import ClientCertificates, Tls
from cluster.errors import ConfigError
from cluster.logging import get_logger

log = get_logger(__name__)


def server_context(tls: Tls, section: str) -> ssl.SSLContext | None:
    """None where there is no certificate. `section` is the key of `tls`, for errors. Raises `ConfigError`."""
    if tls.certificate is None:
        _require_nothing_else(tls, section)
        return None
    context = _RenewedContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    ca = None
    if tls.client_certificates is ClientCertificates.REQUIRED:
        if tls.ca is None:
            raise ConfigError(f"{section}.ca: missing; client_certificates: required needs to know who may sign them")
        ca = tls.ca
        context.verify_mode = ssl.CERT_REQUIRED
    context.follow(_Files(section, tls.certificate, tls.key, ca))
    return context


def client_context(tls: Tls, section: str) -> ssl.SSLContext | None:
    """How to connect to servers that have `tls`; None where they speak without. Raises `ConfigError`."""
    if tls.certificate is None:
        return None
    context = _RenewedContext(ssl.PROTOCOL_TLS_CLIENT)
    # With an authority of ours, it alone: whom some public authority has signed is no part of the cluster.
    if tls.ca is None:
        context.load_default_certs()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.check_names
    shown = tls.client_certificates is ClientCertificates.REQUIRED
    context.follow(_Files(section, tls.certificate if shown else None, tls.key if shown else None, tls.ca))
    return context


class _Files(NamedTuple):
    """What a context reads. `section` is the key of the settings, for errors."""

    section: str
    certificate: str | None
    key: str | None
    ca: str | None

    def versions(self) -> list[FileVersion]:
        """Raises `OSError` while one can't be looked at."""
        return [version_of(Path(file)) for file in (self.certificate, self.key, self.ca) if file is not None]

    def load_into(self, context: ssl.SSLContext) -> None:
        """Raises `ConfigError`; then the context may hold a part of them."""
        if self.certificate is not None:
            _load_certificate(context, self.certificate, self.key, self.section)
        if self.ca is not None:
            _load_authorities(context, self.ca, self.section)


class _RenewedContext(ssl.SSLContext):
    """Looks at its files whenever a connection begins, on either side."""

    def follow(self, files: _Files) -> None:
        """Reads them for the first time. Raises `ConfigError`."""
        files.load_into(self)
        self._files = files
        self._seen = files.versions()

    def wrap_bio(self, *arguments: Any, **keywords: Any) -> ssl.SSLObject:
        """Called by event loops for each new connection."""
        self._look()
        return super().wrap_bio(*arguments, **keywords)

    def _look(self) -> None:
        try:
            seen = self._files.versions()
            if seen == self._seen:
                return
            self._seen = seen
            # On trial first: a certificate without its key would break what is in use.
            self._files.load_into(ssl.SSLContext(self.protocol))
            self._files.load_into(self)
        except (OSError, ConfigError) as error:
            log.error("changed certificates can't be used: the former ones stay", error=str(error))
        else:
            log.info("read new certificates", section=self._files.section)


def _require_nothing_else(tls: Tls, section: str) -> None:
    if tls.key or tls.ca or tls.client_certificates is ClientCertificates.REQUIRED:
        raise ConfigError(
            f"{section}.certificate: missing; without it nothing is encrypted, and the other keys do nothing"
        )


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str | None, section: str) -> None:
    certificate = _readable(certificate, f"{section}.certificate")
    key = certificate if key is None else _readable(key, f"{section}.key")
    try:
        # A passphrase would be asked for on the terminal: an empty one makes it an error.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{section}: certificate {certificate} and key {key} don't do: {_reason(error)}; expected PEM files that "
            "belong to each other, the key without a passphrase"
        ) from error


def _load_authorities(context: ssl.SSLContext, file: str, section: str) -> None:
    try:
        context.load_verify_locations(_readable(file, f"{section}.ca"))
    except ssl.SSLError as error:
        raise ConfigError(f"{section}.ca: {file} has no certificate in PEM: {_reason(error)}") from error


def _readable(file: str, setting: str) -> str:
    try:
        with Path(file).open("rb"):
            return file
    except OSError as error:
        raise ConfigError(f"{setting}: {file} can't be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)

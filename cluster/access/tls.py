"""TLS contexts of a `Tls` section. A file that does not do is told by its setting, its name and what is wrong."""

from __future__ import annotations

import ssl
from pathlib import Path

from cluster.config import ClientCertificates, Tls
from cluster.errors import ConfigError


def server_context(tls: Tls, section: str) -> ssl.SSLContext | None:
    """None where there is no certificate. `section` is the key of `tls`, for errors. Raises `ConfigError`."""
    if tls.certificate is None:
        _require_nothing_else(tls, section)
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, tls, section)
    if tls.client_certificates is ClientCertificates.REQUIRED:
        if tls.ca is None:
            raise ConfigError(f"{section}.ca: missing; client_certificates: required needs to know who may sign them")
        _load_authorities(context, tls.ca, section)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(tls: Tls, section: str) -> ssl.SSLContext | None:
    """How to connect to servers that have `tls`; None where they speak without. Raises `ConfigError`."""
    if tls.certificate is None:
        return None
    context = ssl.create_default_context()
    if tls.ca is not None:
        # Ours alone: a certificate that some public authority has signed makes nobody a part of the cluster.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_authorities(context, tls.ca, section)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.check_names
    if tls.client_certificates is ClientCertificates.REQUIRED:
        _load_certificate(context, tls, section)
    return context


def _require_nothing_else(tls: Tls, section: str) -> None:
    if tls.key or tls.ca or tls.client_certificates is ClientCertificates.REQUIRED:
        raise ConfigError(
            f"{section}.certificate: missing; without it nothing is encrypted, and the other keys do nothing"
        )


def _load_certificate(context: ssl.SSLContext, tls: Tls, section: str) -> None:
    certificate = _readable(str(tls.certificate), f"{section}.certificate")
    key = certificate if tls.key is None else _readable(tls.key, f"{section}.key")
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

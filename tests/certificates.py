"""Certificates for tests, made by the openssl program: an authority, and whoever it signs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


class Identity(NamedTuple):
    certificate: str
    key: str


class Authority:
    """An authority of its own, whose files are in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self.certificate = str(folder / f"{name}.pem")
        self._key = str(folder / f"{name}.key")
        _openssl("req", "-x509", *_EC, "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.certificate)

    def sign(self, name: str, names: str = "IP:127.0.0.1,DNS:localhost") -> Identity:
        """A certificate for `names`, in the form of subjectAltName."""
        certificate, key, request = (str(self._folder / f"{name}.{kind}") for kind in ("pem", "key", "csr"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        _openssl("req", *_EC, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
                 "-days", "2", "-extfile", str(extensions), "-out", certificate)  # fmt: skip
        return Identity(certificate, key)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)

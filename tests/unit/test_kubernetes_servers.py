"""`make test-kubernetes` where the servers, or namespaces, can't be had: it says so, and fails nobody."""

import pytest

from tests.kubernetes import __main__ as command
from tests.kubernetes import packages


def test_a_missing_program_is_named_and_nothing_is_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert said == "The Kubernetes of the tests lacks the program apt-get: no Kubernetes test was run.\n"


def test_what_a_program_complains_of_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages, "_require_tools", lambda: None)
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'no network' >&2; exit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(packages.Lacking, match="no network"):
        packages.servers()
    assert not packages.cache_folder().exists()

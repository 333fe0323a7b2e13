"""`make test-rdma` on a machine that can't have the emulated one."""

from __future__ import annotations

from tests.rdma import packages
from tests.rdma.__main__ import main


def test_it_says_what_is_lacking_and_is_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(packages, "CACHE", tmp_path / "nothing-fetched-yet")
    monkeypatch.setattr(packages.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 0
    assert "lacks apt-get" in capsys.readouterr().out

    monkeypatch.setattr(packages.platform, "machine", lambda: "aarch64")
    assert main([]) == 0
    assert "this is aarch64" in capsys.readouterr().out

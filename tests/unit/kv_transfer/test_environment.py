"""What the launcher of an engine process gets for the transfer engines."""

import subprocess
import sys

import pytest

from cluster.config import KV, TransferName
from cluster.errors import ConfigError
from kv_transfer.backends import backend_environment, environment, open_backend
from tests.unit.kv_transfer.world import Pool


def test_the_users_own_settings_win(monkeypatch):
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    monkeypatch.delenv("UCX_TCP_USER_TIMEOUT", raising=False)
    found = backend_environment(TransferName.NIXL)
    assert "UCX_LOG_LEVEL" not in found
    assert found["UCX_TCP_USER_TIMEOUT"] == "5s"


def test_mooncake_gets_a_library_folder_in_front_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "library_path", lambda: tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    assert backend_environment(TransferName.MOONCAKE)["LD_LIBRARY_PATH"] == f"{tmp_path}:/opt/lib"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert backend_environment(TransferName.MOONCAKE)["LD_LIBRARY_PATH"] == str(tmp_path)


def test_the_bundled_library_is_linked_once_and_again_when_it_moves(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(environment.sys, "prefix", str(tmp_path))
    bundle = tmp_path / "nixl_cu13.libs"
    bundle.mkdir()
    for name in ("libibverbs-1.so.1", "libnl-3-1.so.200"):
        (bundle / name).touch()
    link = tmp_path / "lib" / "baton" / "libibverbs.so.1"
    link.parent.mkdir(parents=True)
    link.symlink_to("/nowhere")
    monkeypatch.setattr(environment, "_bundled", lambda: bundle / "libibverbs-1.so.1")
    for _ in range(2):
        assert environment.library_path() == link.parent
        assert link.resolve() == bundle / "libibverbs-1.so.1"
        assert (link.parent / "libnl-3-1.so.200").exists()


def test_a_system_that_has_the_library_needs_no_folder(monkeypatch):
    monkeypatch.setattr(environment.ctypes.util, "find_library", lambda name: "libibverbs.so.1")
    assert environment.library_path() is None


@pytest.mark.parametrize(("name", "module"), [(TransferName.NIXL, "nixl"), (TransferName.MOONCAKE, "mooncake")])
def test_a_missing_package_is_a_config_error_that_says_what_to_install(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install"):
        open_backend(KV(transfer=name), "agent", Pool(1).memory, "127.0.0.1")


def test_the_environment_is_known_without_loading_an_engine():
    code = (
        "import sys; from kv_transfer.backends import backend_environment;"
        "from cluster.config import TransferName;"
        "[backend_environment(name) for name in TransferName];"
        "print([name for name in ('torch', 'nixl', 'mooncake', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

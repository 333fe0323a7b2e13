"""A model is found where the user says it is, or the error says where we looked."""

import pytest

from cluster import model_files
from cluster.errors import ModelError
from cluster.model_files import resolve_model


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_found_from_the_home_and_from_here(home):
    (home / "llama").mkdir()
    (home / "llama/config.json").write_text("{}")
    assert resolve_model("~/llama") == resolve_model("llama/") == resolve_model(str(home / "llama")) == home / "llama"


def test_a_gguf_file_is_known_by_its_first_bytes(home):
    (home / "real.gguf").write_bytes(b"GGUF\x03")
    assert resolve_model("real.gguf") == home / "real.gguf"
    (home / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"pointer.gguf is not a GGUF file: it begins with b'vers'"):
        resolve_model("pointer.gguf")


def test_the_error_says_where_we_looked(home):
    with pytest.raises(
        ModelError, match=f"no model 'llama': looked for .* at {home}/llama; the only model known by name"
    ):
        resolve_model("llama")
    (home / "llama").mkdir()
    (home / "llama/llama.Q4.gguf").touch()
    with pytest.raises(ModelError, match=r"llama is not .*: it has no config.json; did you mean .*/llama.Q4.gguf\?"):
        resolve_model("llama")


def test_without_the_demo_models_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(model_files, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"no package no_such_package is here\); run `make setup`"):
        resolve_model(model_files.DEMO_MODEL)


def test_the_demo_model_is_the_file_in_its_package(home, monkeypatch):
    package = home / "tiny_demo"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr(model_files, "DEMO_PACKAGE", "tiny_demo")
    assert resolve_model(model_files.DEMO_MODEL) == package / "tiny.gguf"

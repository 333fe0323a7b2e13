"""What an engine process starts with, and that what the user has set wins."""

import subprocess
import sys

import pytest

from engine.environment import engine_environment


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5")])
def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, name, value):
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    assert engine_environment() == {"GOMP_SPINCOUNT": "1000"}
    monkeypatch.setenv(name, value)
    assert engine_environment() == {}


def test_a_control_process_gets_it_without_torch():
    code = "import sys, prefill_worker.__main__, decode_worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

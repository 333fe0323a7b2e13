"""What an engine process starts with, and that what the user has set wins."""

import subprocess
import sys

from engine.environment import engine_environment


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert engine_environment() == {"OMP_WAIT_POLICY": "passive"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert engine_environment() == {}


def test_a_control_process_gets_it_without_torch():
    code = "import sys, prefill_worker.__main__, decode_worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Proof that a process is dead, and no false proof."""

import os
import subprocess
import sys

import msgspec
import pytest

from cluster.process_identity import current, is_dead


@pytest.fixture
def child():
    """Waits on its standard input; prints its own identity first."""
    code = (
        "import sys, msgspec; from cluster.process_identity import current;"
        "print(msgspec.json.encode(current()).decode(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def identity(process):
    return msgspec.json.decode(process.stdout.readline(), type=type(current()))


def test_the_living_are_not_dead(child):
    assert not is_dead(current())
    assert not is_dead(identity(child))


def test_a_killed_process_is_dead_as_a_zombie_and_after(child):
    found = identity(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(found), "nobody has reaped it yet, but it writes no more"
    child.wait()
    assert is_dead(found)


def test_a_pid_that_was_taken_over_by_another_process_proves_the_death():
    assert is_dead(msgspec.structs.replace(current(), start_ticks=1))


@pytest.mark.parametrize("change", [{"boot_id": "another host"}, {"pid_namespace": "pid:[1]"}])
def test_nothing_is_known_of_processes_elsewhere(change):
    assert not is_dead(msgspec.structs.replace(current(), pid=2**22 + 1, **change))


def test_a_process_of_another_user_is_alive_until_shown_otherwise(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_dead(current())

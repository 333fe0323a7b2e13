"""Taking hold of another process's connections: the campaigns' cable cutters must cut."""

import os
import socket
import subprocess
import sys

import pytest

from tests.fault.sockets import connections, cut, deafen, heal, other_ends

ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    while data := client.recv(100):
        client.sendall(data)
"""
SILENCE_SECONDS = 0.2
BOUND_SECONDS = 10.0


@pytest.fixture
def echo():
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process:
        yield process.pid, int(process.stdout.readline())
        process.kill()


@pytest.fixture
def client(echo):
    with socket.create_connection(("127.0.0.1", echo[1]), BOUND_SECONDS) as found:
        found.sendall(b"hello")
        assert found.recv(100) == b"hello"
        yield found


def test_a_cut_connection_ends_for_both_and_the_listener_stays(echo, client):
    pid, port = echo
    assert cut(connections([pid])) == 1
    assert client.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port), BOUND_SECONDS) as again:
        again.sendall(b"again")
        assert again.recv(100) == b"again"


def test_a_deaf_process_hears_nothing_until_it_is_healed_and_then_all_of_it(echo, client):
    pid, port = echo
    assert deafen(connections([pid])) == 2  # the connection, and who listens
    client.sendall(b"later")
    client.settimeout(SILENCE_SECONDS)
    with pytest.raises(TimeoutError):
        client.recv(100)
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), SILENCE_SECONDS)
    assert heal(connections([pid])) == 2
    assert heal(connections([pid])) == 0
    client.settimeout(BOUND_SECONDS)
    assert client.recv(100) == b"later"


def test_the_other_end_of_a_connection_is_found(echo, client):
    pid, _ = echo
    ends = connections([pid])
    others = other_ends(ends, ends)
    assert others == []
    (found,) = other_ends(ends, connections([pid, os.getpid()]))
    assert found.local == client.getsockname()

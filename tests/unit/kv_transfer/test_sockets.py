"""Connections of others that are ended in this process: those that are meant, and no more."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from kv_transfer.backends.sockets import addresses, hang_up

SECONDS = 10.0


class Line:
    """A server with one client connected to it."""

    def __init__(self, stack: ExitStack) -> None:
        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port: int = self.server.getsockname()[1]
        self.client = stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        self.accepted = stack.enter_context(self.server.accept()[0])
        for end in (self.server, self.client, self.accepted):
            end.settimeout(SECONDS)

    def works(self) -> bool:
        self.client.sendall(b"?")
        return self.accepted.recv(1) == b"?"


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    with ExitStack() as stack:
        yield Line(stack), Line(stack)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_who_listens_at_the_port_or_serves_there_is_told_of_the_end_at_once(lines, threads):
    line, other = lines
    waiting: Future[object] = threads.submit(line.server.accept)
    serving = threads.submit(line.accepted.recv, 1)
    hang_up(line.port)
    assert isinstance(waiting.exception(SECONDS), OSError)
    assert not isinstance(waiting.exception(), TimeoutError)
    assert serving.result(SECONDS) == b""
    assert other.works()


def test_who_waits_for_the_word_of_a_peer_is_told_of_the_end_at_once(lines, threads):
    line, other = lines
    waiting = threads.submit(line.client.recv, 1)
    hang_up(0, addresses("localhost", line.port))
    assert waiting.result(SECONDS) == b""
    assert other.works()


def test_a_name_that_nobody_knows_has_no_addresses(monkeypatch):
    def unknown(*question: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert addresses("nowhere", 1) == frozenset()

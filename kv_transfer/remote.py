"""Transfers of the other ranks of a worker: commands go to them over `cluster.ranks`, results come back.

Rank 0 has a `RemoteTransfers` for each follower; a follower has `serve_transfers` between that and its own transfer
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from cluster.errors import BatonError, ErrorInfo, from_info
from cluster.ranks import Frames, RankGone
from kv_transfer.driver import Command, Result
from kv_transfer.thread import TransferThread


def _encode_error(error: Any) -> ErrorInfo:
    if isinstance(error, BatonError):
        return error.to_info()
    raise NotImplementedError(f"{type(error)} is no part of a result")


def _decode_error(kind: type, value: Any) -> Any:
    return from_info(msgspec.convert(value, ErrorInfo))


class RemoteTransfers:
    """Implements `kv_transfer.group.RankPort`. `deliver` is called with results, on a thread of its own, until the
    follower is gone: then this worker's engine is about to end (`cluster.engine_host`)."""

    def __init__(self, follower: Frames, deliver: Callable[[Sequence[Result]], None]) -> None:
        self._follower = follower
        self._deliver = deliver
        self._encoder = msgspec.msgpack.Encoder()
        threading.Thread(target=self._listen, name="kv-transfer follower", daemon=True).start()

    def post(self, command: Command) -> None:
        with suppress(RankGone):
            self._follower.send(self._encoder.encode(command))

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(list[Result], dec_hook=_decode_error)
        with suppress(RankGone):
            while True:
                self._deliver(decoder.decode(self._follower.receive()))


class FollowerTransfers:
    """A follower's end. `open_thread` makes its transfer thread, given what the thread is to call when it has results;
    `stop` is called when it has died, and has to lead to `close`."""

    def __init__(
        self, leader: Frames, open_thread: Callable[[Callable[[], None]], TransferThread], stop: Callable[[], None]
    ) -> None:
        self._leader = leader
        self._stop = stop
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_error)
        self._thread = open_thread(self._report)
        self.descriptor = self._thread.descriptor
        threading.Thread(target=self._listen, name="kv-transfer commands", daemon=True).start()

    def close(self) -> None:
        """Raises whatever ended the transfer thread."""
        self._thread.close()
        if self._thread.death is not None:
            raise self._thread.death

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Command)
        with suppress(RankGone):
            while True:
                self._thread.post(decoder.decode(self._leader.receive()))

    def _report(self) -> None:
        """On the transfer thread."""
        if self._thread.death is not None:
            self._stop()
            return
        with suppress(RankGone):
            self._leader.send(self._encoder.encode(self._thread.results()))

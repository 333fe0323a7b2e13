"""The thread that owns the transfer backend, so that the step loop never waits for it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from cluster.clock import Clock
from kv_transfer.backends.base import TransferBackend
from kv_transfer.driver import WRITE_TIMEOUT_SECONDS, Command, Digester, Result, TransferDriver

SHORTEST_NAP = 100e-6
LONGEST_NAP = 1e-3
NAP_GROWTH = 1.5
"""Seconds between two looks at what is under way: short after something happened, then longer. Engines that move bytes
inside of `poll` or `progress` do so until nothing is left, so a nap costs latency, not bandwidth."""
IDLE_SECONDS = 0.5
"""Seconds between two looks while nothing is under way; a command wakes the thread at once."""


class TransferThread:
    """Runs a `TransferDriver`. `post`, `results`, `wait` and `close` are for the step loop; the last two block.

    `wake` is called on this thread after results have arrived, and when the thread dies of an error; it must not block.
    `digester` None: no digests. `trial_page`, `write_timeout`: see `TransferDriver`. `on_look` is called on this thread
    each time it has looked after what is under way, with the time at which the oldest of it began: as long as it is,
    the thread lives.
    """

    def __init__(
        self,
        backend: TransferBackend,
        digester: Digester | None,
        clock: Clock,
        wake: Callable[[], None],
        trial_page: int | None = None,
        on_look: Callable[[float | None], None] = lambda oldest: None,
        write_timeout: float = WRITE_TIMEOUT_SECONDS,
    ) -> None:
        self.name = backend.name
        self.descriptor = backend.descriptor
        self._driver = TransferDriver(backend, digester, clock, trial_page, write_timeout)
        self._wake = wake
        self._on_look = on_look
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._posted = threading.Event()
        """Set with each command; the thread clears it before it looks for the next one."""
        self._results: deque[Result] = deque()
        self._arrived = threading.Event()
        """Set with each result, and by the thread's death; `results` clears it."""
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self._thread.start()

    def post(self, command: Command) -> None:
        self._put(command)

    def deliver(self, results: Sequence[Result]) -> None:
        """Results of another rank's thread, to be picked up with ours. From any thread."""
        self._results.extend(results)
        self._arrived.set()
        self._wake()

    @property
    def death(self) -> BaseException | None:
        """The error that ended the thread, if one did."""
        return self._death

    def results(self) -> list[Result]:
        """What has ended since the last call. Raises the error that ended the thread, if one did."""
        self._arrived.clear()
        found = [self._results.popleft() for _ in range(len(self._results))]
        if self._death is not None and not found:
            raise self._death
        return found

    def wait(self, seconds: float) -> bool:
        return self._arrived.wait(seconds)

    def close(self, timeout: float = 10.0) -> None:
        """Ends the thread and closes the backend; commands posted before are carried out. A second call does nothing.

        Writes under way are not waited for: whoever closes has ended its handoffs, or ends its process.
        """
        self._put(None)
        self._thread.join(timeout)

    def _put(self, command: Command | None) -> None:
        self._commands.put(command)
        self._posted.set()

    def _run(self) -> None:
        try:
            self._loop()
            self._driver.close()
        except Exception as error:  # noqa: BLE001 - this thread's outermost call: the step loop raises it in `results`
            self._death = error
            self._arrived.set()
            self._wake()

    def _loop(self) -> None:
        nap = SHORTEST_NAP
        while True:
            try:
                command = self._next(nap if self._driver.busy else IDLE_SECONDS)
            except Empty:
                results: list[Result] = []
                nap = min(nap * NAP_GROWTH, LONGEST_NAP)
            else:
                if command is None:
                    return
                results = self._driver.take(command)
                nap = SHORTEST_NAP
            if self._driver.busy:
                results += self._driver.turn()
            else:
                self._driver.idle()
            self._on_look(self._driver.oldest)
            if results:
                nap = SHORTEST_NAP
                self.deliver(results)

    def _next(self, seconds: float) -> Command | None:
        """The next command; waits for one at most so long, and then raises `Empty`.

        Not by `SimpleQueue.get(timeout=...)`: CPython's (up to 3.12), where its lock is still open from the last `put`,
        takes it, reckons what is left of the time, and with less than nothing waits for the next `put`, for ever if
        need be. A thread that loses its core for `SHORTEST_NAP` at that moment does just that.
        """
        self._posted.clear()
        with contextlib.suppress(Empty):
            return self._commands.get_nowait()
        self._posted.wait(seconds)
        return self._commands.get_nowait()

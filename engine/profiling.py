"""Traces of an engine process's steps: which operator ran when, as a file for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cluster.engine_messages import EngineMessage, ProfileEnded, ProfileReply, StartProfile, StopProfile
from cluster.errors import BatonError, ConfigError, Conflict
from cluster.logging import get_logger
from cluster.messages import (
    Load,
    Message,
)
from cluster.step_loop import StepHandler

log = get_logger(__name__)

LONGEST_SILENCE_SECONDS = 120.0
"""Writing a long trace takes a minute, in which nothing tells of progress."""

_UNTRACED: AbstractContextManager[object] = nullcontext()


class _Recording(NamedTuple):
    file: Path
    last_step: int
    """Where it ends by itself."""
    trace: profile


class ProfiledSteps:
    """A `StepHandler` around `inner`, which drives an engine of which `steps` tells the steps so far.

    It answers `StartProfile` and `StopProfile`, by `send`; all else is `inner`'s. While nothing is recorded, a turn of
    the loop costs a comparison more. While something is, each turn is a range "step N" of the trace, with torch's
    operators in it. Starting holds up the step loop, and so does writing, for a second per 5,000 operators or so:
    `expect_silence` is told beforehand for how many seconds at most, and 0 when it is over.
    """

    def __init__(
        self,
        inner: StepHandler,
        steps: Callable[[], int],
        send: Callable[[Message], None],
        expect_silence: Callable[[float], None],
    ) -> None:
        self._inner = inner
        self._steps = steps
        self._send = send
        self._expect_silence = expect_silence
        self._recording: _Recording | None = None

    def handle(self, message: EngineMessage, now: float) -> None:
        if isinstance(message, StartProfile | StopProfile):
            self._send(self._reply(message))
        else:
            self._inner.handle(message, now)

    def step(self, now: float) -> bool:
        if self._recording is None:
            return self._inner.step(now)
        with record_function(f"step {self._steps()}"):
            busy = self._inner.step(now)
        if self._steps() >= self._recording.last_step:
            self._end_by_itself()
        return busy

    def load(self) -> Load:
        return self._inner.load()

    def close(self) -> None:
        if self._recording is not None:
            self._recording.trace.stop()
        self._inner.close()

    def _reply(self, message: StartProfile | StopProfile) -> ProfileReply:
        try:
            file = self._start(message) if isinstance(message, StartProfile) else self._write()
        except BatonError as error:
            return ProfileReply(error=error.to_info())
        return ProfileReply(str(file))

    def _start(self, message: StartProfile) -> Path:
        if self._recording is not None:
            raise Conflict(f"a profile is being recorded already, for {self._recording.file}")
        file = Path(message.file)
        with _writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with self._silence():
            trace = profile(activities=activities, record_shapes=True)
            trace.start()
        self._recording = _Recording(file, self._steps() + message.steps, trace)
        return file

    def _write(self) -> Path:
        """Ends the recording; the file appears whole, or not at all."""
        if self._recording is None:
            raise Conflict("no profile is being recorded")
        file, _, trace = self._recording
        self._recording = None
        unfinished = file.with_name(f".{file.name}")
        with self._silence(), _writing(file):
            trace.stop()
            trace.export_chrome_trace(str(unfinished))
            unfinished.replace(file)
        return file

    @contextmanager
    def _silence(self) -> Iterator[None]:
        self._expect_silence(LONGEST_SILENCE_SECONDS)
        try:
            yield
        finally:
            self._expect_silence(0.0)

    def _end_by_itself(self) -> None:
        try:
            self._send(ProfileEnded(str(self._write())))
        except ConfigError as error:
            log.error("a profile is lost", error=str(error))


def traced(name: str) -> AbstractContextManager[object]:
    """A range of the trace, for what torch does not see by itself: our own kernels. While nothing is recorded it costs
    nothing worth mentioning; `record_function` alone would cost microseconds."""
    recording: bool = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return record_function(name) if recording else _UNTRACED


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"logging.profile_dir: can't write {file}: {error.strerror or error}") from error

"""An engine process without a model: `python -m metronome`. It gives a token a beat, and which one is a function of the
request alone, as with a real model that samples greedily.

Its control process is a real worker's: membership, links, probes, drain. KV is not handed over: a prefill leg gives the
first token, a decode leg all that follow, whether the other is there or not.
"""

import sys

from cluster.engine_main import EngineContext, main
from cluster.engine_messages import EngineReady, FromRouter, ToRouter
from cluster.errors import ConfigError
from cluster.layout import KVLayout
from cluster.messages import (
    AttemptFinished,
    AttemptStarted,
    CancelAttempt,
    DecodeAttempt,
    Emitted,
    Fence,
    FinishReason,
    Load,
    ModelCard,
    PrefillAttempt,
    Role,
    Speed,
    Tokens,
)
from cluster.process_identity import current

BEAT_SECONDS = 0.05
LAYOUT = KVLayout("metronome", "float32", 16, 2, 1, 8)
CARD = ModelCard("metronome", 8192, 49152)


def token(prompt: list[int], offset: int) -> int:
    return 1000 + (31 * sum(prompt) + 7 * offset) % 997


class _Playing:
    """One attempt that is under way."""

    def __init__(self, router: str, attempt: PrefillAttempt | DecodeAttempt, due: float) -> None:
        self.router = router
        self.attempt = attempt
        self.due = due
        given = len(attempt.output)
        most = attempt.sampling.max_tokens
        if isinstance(attempt, PrefillAttempt):
            self.role, self.offset, self.end = Role.PREFILL, given, given + 1
            self.reason = FinishReason.LENGTH if given + 1 == most else FinishReason.HANDED_OFF
        else:
            self.role, self.offset, self.end = Role.DECODE, given + (attempt.prefill is not None), most
            self.reason = FinishReason.LENGTH


class Metronome:
    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._playing: dict[Fence, _Playing] = {}
        self._steps = 0

    def handle(self, message: object, now: float) -> None:
        if not isinstance(message, FromRouter):
            return
        attempt = message.message
        if isinstance(attempt, CancelAttempt):
            if playing := self._playing.pop(attempt.fence, None):
                self._tell(playing, AttemptFinished(attempt.fence, playing.role, FinishReason.CANCELLED))
            return
        playing = self._playing[attempt.fence] = _Playing(message.router, attempt, now + BEAT_SECONDS)
        self._tell(playing, AttemptStarted(attempt.fence, playing.role))

    def step(self, now: float) -> bool:
        self._steps += 1
        self._context.board.transfers_seen(None)
        for fence, playing in list(self._playing.items()):
            if now >= playing.due:
                self._beat(fence, playing)
        return False

    def load(self) -> Load:
        return Load(running=len(self._playing), steps=self._steps)

    def close(self) -> None:
        pass

    def _beat(self, fence: Fence, playing: _Playing) -> None:
        playing.due += BEAT_SECONDS
        if playing.offset < playing.end:
            word = token(playing.attempt.prompt, playing.offset)
            self._tell(playing, Tokens([Emitted(fence, playing.offset, word)]))
            playing.offset += 1
        if playing.offset >= playing.end:
            del self._playing[fence]
            self._tell(playing, AttemptFinished(fence, playing.role, playing.reason))

    def _tell(self, playing: _Playing, message: AttemptStarted | AttemptFinished | Tokens) -> None:
        self._context.send(ToRouter(playing.router, message))


def build(context: EngineContext) -> tuple[Metronome, EngineReady]:
    speed = Speed(0.01, 0.001, 16)
    return Metronome(context), EngineReady(context.epoch, LAYOUT, CARD, 512, b"", current(), speed)


def follow(context: EngineContext) -> object:
    raise ConfigError("a metronome has one rank")


if __name__ == "__main__":
    sys.exit(main("metronome", lambda topology: [], build, follow))

"""A worker that speaks the router's protocol and computes nothing; what it answers, and how it breaks, a test says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from bootstrap.client import Registration
from cluster.errors import ErrorInfo
from cluster.layout import KVLayout
from cluster.links import Link, LinkClosed, accept
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    CancelAttempt,
    DecodeAttempt,
    Emitted,
    FinishReason,
    Heartbeat,
    Load,
    Logprobs,
    Member,
    Message,
    ModelCard,
    PrefillAttempt,
    Refused,
    Role,
    RouterHello,
    Tokens,
    WorkerHello,
)
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

HEARTBEAT_SECONDS = 0.05
DAMAGED = ErrorInfo("TransferFailed", "a page arrived damaged")
LAYOUT = KVLayout(model="fake", dtype="float32", page_size=16, layers=1, kv_heads=1, head_dim=8)
PREFILL_TIMINGS = PrefillTimings(0.001, 0.002, tokens=5, cached_tokens=3, chunks=1)
HANDOFF_TIMINGS = HandoffTimings(0.001, 0.002, 0.003, pages=1, bytes=1024)
DECODE_TIMINGS = DecodeTimings(0.001, 0.01, steps=4, batch_sum=8)


@dataclass
class Behaviour:
    """How a worker answers an attempt. Offsets are of the request's output."""

    answer: list[int] = field(default_factory=lambda: [1000 + number for number in range(64)])
    """The whole output; cut at max_tokens (LENGTH), or at a stop token (STOP)."""
    gate: asyncio.Event | None = None
    """Nothing is said before it is set."""
    silent_from: int | None = None
    """From this offset on it says nothing more, until it is cancelled."""
    fails_at: int | None = None
    error: ErrorInfo = DAMAGED
    blame: Role | None = None
    retracted_at: int | None = None
    """It ends there, for want of pages."""
    dies_at: int | None = None
    """The process ends: every connection breaks. Its successor listens in the same place."""
    faulty_attempts: int = 1
    """So many first attempts at a request meet all this; those after them go well."""
    repeats: bool = False
    """Every token is told twice."""
    token_seconds: float = 0.0
    """From one token to the next."""


class FakeWorker:
    """`start`, then `close`. `attempts` and `cancelled` tell what the router asked for."""

    def __init__(self, name: str, role: Role, epoch: int, behaviour: Behaviour | None = None, **member) -> None:
        self.name = name
        self.role = role
        self.epoch = epoch
        self.behaviour = behaviour or Behaviour()
        self.load = Load()
        self.refuses: ErrorInfo | None = None
        self.heartbeats = True
        self.attempts: list[PrefillAttempt | DecodeAttempt] = []
        self.cancelled: list[str] = []
        """Requests, as often as they were cancelled."""
        self.running: dict[object, asyncio.Task[None]] = {}
        self._member = {"layout": LAYOUT, "transfer": "nixl", "pool_pages": 512, "max_running": 8, **member}
        self._card = self._member.pop("model", ModelCard("fake", 8192, 49152))
        self._links: list[Link] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, session, bootstrap_url: str) -> None:
        app = web.Application()
        app.router.add_get("/router", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.member = Member(self.name, self.role, self.epoch, url, model=self._card, **self._member)
        self._registration = Registration(session, bootstrap_url, self.member, lambda: self.load)
        self._tasks.append(asyncio.create_task(self._registration.run()))
        self._tasks.append(asyncio.create_task(self._beat()))

    def tell(self, message: Message) -> None:
        """Says something that nobody asked for, to each router."""
        for link in self._links:
            link.post(message)

    async def leave(self) -> None:
        """Says goodbye to bootstrap, and goes on with what it has."""
        await self._registration.leave("test")
        self._tasks[0].cancel()

    async def close(self) -> None:
        for link in list(self._links):
            await link.close()
        tasks = [*self._tasks, *self.running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._runner.cleanup()

    async def _beat(self) -> None:
        while True:
            for link in self._links:
                if self.heartbeats:
                    link.post(Heartbeat(self.name, self.epoch, self.load))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        link = await accept(request)
        try:
            assert isinstance(await link.receive(), RouterHello)
            if self.refuses is not None:
                link.post(Refused(self.refuses))
                return web.Response()
            link.post(WorkerHello(self.member))
            self._links.append(link)
            while True:
                message = await link.receive()
                if isinstance(message, CancelAttempt):
                    self.cancelled.append(message.fence.request)
                    task = self.running.pop(message.fence, None)
                    if task is not None:
                        task.cancel()
                else:
                    self.attempts.append(message)
                    play = self._play(link, request, message)
                    self.running[message.fence] = asyncio.create_task(play)
        except LinkClosed:
            pass
        finally:
            if link in self._links:
                self._links.remove(link)
            for task in self.running.values():
                task.cancel()
            self.running.clear()
            await link.close()
        return web.Response()

    async def _play(self, link: Link, request: web.Request, attempt: PrefillAttempt | DecodeAttempt) -> None:
        behaviour, fence = self.behaviour, attempt.fence
        faulty = fence.attempt <= behaviour.faulty_attempts
        if behaviour.gate is not None:
            await behaviour.gate.wait()
        given = len(attempt.output)
        cached = PREFILL_TIMINGS.cached_tokens + given if self.role is Role.PREFILL else 0
        link.post(AttemptStarted(fence, self.role, cached))
        output, reason = _cut(behaviour.answer, attempt)
        first = given + 1 if isinstance(attempt, DecodeAttempt) and attempt.prefill is not None else given
        last = given + 1 if self.role is Role.PREFILL else len(output)
        if first >= len(output):
            return  # The first token was the last one: the prefill leg says so.
        for offset in range(first, last):
            if faulty and behaviour.dies_at == offset:
                await link.close()
                request.transport.abort()
                return
            if faulty and behaviour.fails_at == offset:
                link.post(AttemptFailed(fence, self.role, behaviour.blame or self.role, behaviour.error))
                del self.running[fence]
                return
            if faulty and behaviour.retracted_at == offset:
                link.post(AttemptFinished(fence, self.role, FinishReason.RETRACTED, decode=DECODE_TIMINGS))
                del self.running[fence]
                return
            if faulty and behaviour.silent_from == offset:
                await asyncio.Event().wait()
            emitted = Emitted(fence, offset, output[offset], _logprobs(attempt, output[offset]))
            link.post(Tokens([emitted, emitted] if behaviour.repeats else [emitted]))
            await asyncio.sleep(behaviour.token_seconds)
        if self.role is Role.DECODE:
            link.post(AttemptFinished(fence, self.role, reason, decode=DECODE_TIMINGS))
        elif len(output) == given + 1:
            link.post(AttemptFinished(fence, self.role, reason, prefill=PREFILL_TIMINGS))
        else:
            handed_over = FinishReason.HANDED_OFF
            link.post(AttemptFinished(fence, self.role, handed_over, PREFILL_TIMINGS, HANDOFF_TIMINGS))
        del self.running[fence]


def _cut(answer: list[int], attempt: PrefillAttempt | DecodeAttempt) -> tuple[list[int], FinishReason]:
    output = answer[: attempt.sampling.max_tokens]
    for place, token in enumerate(output):
        if token in attempt.sampling.stop_token_ids:
            return output[: place + 1], FinishReason.STOP
    return output, FinishReason.LENGTH


def _logprobs(attempt: PrefillAttempt | DecodeAttempt, token: int) -> Logprobs | None:
    wanted = attempt.sampling.logprobs
    if wanted is None:
        return None
    return Logprobs(-0.5, [(token + rank, -0.5 - rank) for rank in range(wanted)])

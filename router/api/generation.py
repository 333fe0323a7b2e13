"""The two endpoints that generate: the same way for both, streamed or not.

A stream's status line waits for the first token: until then an error is a proper HTTP error. After it an error is an
event of its own, and the stream ends without [DONE].

A client that names its request (X-Request-Id) gets events with ids, and can come back after a broken connection: it
sends the same request again, to any router, with the last id that it got (Last-Event-ID), and gets what follows. No
router needs to remember anything for that: the same tokens come out again. One that does remember saves their decoding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import msgspec
from aiohttp import web

from cluster.clock import Clock
from cluster.config import Router
from cluster.errors import BatonError, Draining, InvalidRequest
from cluster.metrics import RouterMetrics
from router.api.admitting import Admission, Visit, requested_seconds
from router.api.cursor import HEADER as LAST_EVENT_ID
from router.api.cursor import Cursor
from router.api.decoding import read_request
from router.api.errors import error_body
from router.api.exchange import Exchange, Progress
from router.api.formats import Answer, ChatFormat, CompletionFormat, FinishText, Format, Heading
from router.api.identity import HEADER as REQUEST_ID_HEADER
from router.api.identity import NAMED, REQUEST_ID, unique_id
from router.api.outcome import Outcome
from router.api.plan import Plan, Planner, demand_of
from router.api.requests import ChatCompletionRequest, CompletionRequest
from router.api.unfinished import UnfinishedStreams
from router.dispatch import ChoiceSpec, Dispatcher
from router.text.output import ChoiceOutput, Delta
from router.text.token_table import TokenTable

RECOVERIES = "X-Baton-Recoveries"
"""How often the answer went on elsewhere, where it did. A stream says it in a comment at its end: by then its headers
have long been out."""

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


RequestT = TypeVar("RequestT", ChatCompletionRequest, CompletionRequest)


class Term(NamedTuple):
    """The time a request has: since when, on the router's clock, and how much."""

    arrived: float
    seconds: float


class GenerationApi:
    """Handlers of POST /v1/chat/completions and POST /v1/completions."""

    def __init__(
        self,
        planner: Planner,
        dispatcher: Dispatcher,
        table: TokenTable,
        metrics: RouterMetrics,
        clock: Clock,
        admission: Admission,
        config: Router,
    ) -> None:
        self._planner = planner
        self._dispatcher = dispatcher
        self._table = table
        self._metrics = metrics
        self._clock = clock
        self._admission = admission
        self._config = config
        self._event_ids = config.event_ids
        self._unfinished = UnfinishedStreams()
        self._encoder = msgspec.json.Encoder()
        self.draining = False
        """No new requests; those under way go on."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, "chat", ChatCompletionRequest, self._planner.chat, ChatFormat())

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(
            request, "completions", CompletionRequest, self._planner.completion, CompletionFormat()
        )

    async def _serve(
        self,
        request: web.Request,
        route: str,
        kind: type[RequestT],
        make_plan: Callable[[RequestT, str], Awaitable[Plan]],
        form: Format,
    ) -> web.StreamResponse:
        arrived = self._clock.now()
        with self._counted(route, request) as outcome:
            self._require_open()
            seconds = requested_seconds(request.headers, self._config.request_timeout_seconds)
            body = await read_request(request, kind, self._config.limits.body_seconds)
            with self._admission.enter(demand_of(body), arrived + seconds) as visit:
                plan = await make_plan(body, request[REQUEST_ID])
                visit.measure(plan.choices)
                return await self._answer(request, plan, form, Term(arrived, seconds), visit, outcome)

    def _require_open(self) -> None:
        if self.draining:
            raise Draining("this router is stopping")

    def _counted(self, route: str, request: web.Request) -> Outcome:
        return Outcome(route, request[REQUEST_ID], self._metrics, self._clock)

    async def _answer(
        self, request: web.Request, plan: Plan, form: Format, term: Term, visit: Visit, outcome: Outcome
    ) -> web.StreamResponse:
        name = request[REQUEST_ID]
        request_id = unique_id(form.prefix, name)
        cursor = _cursor(request, plan)
        choices: Sequence[ChoiceSpec] = plan.choices
        if cursor is not None:
            choices = _shortened(choices, cursor, await self._unfinished.take(name, choices))
        generation = self._dispatcher.begin(
            request_id, name, choices, term.arrived, plan.tokenize_seconds, term.seconds
        )
        visit.follow(generation, plan.choices)
        exchange = Exchange(plan, generation, self._outputs(plan, form), self._heading(plan, request_id), cursor)
        try:
            if plan.stream:
                with self._unfinished.telling(name, plan.choices, generation) if request[NAMED] else nullcontext():
                    return await self._stream(request, exchange, form, outcome)
            return await self._whole(request, exchange, form)
        finally:
            generation.close("the client is gone")
            first_tokens = [choice.trace.first_token_at for choice in generation.choices]
            outcome.observe(exchange.usage(), first_tokens, term.arrived)

    def _outputs(self, plan: Plan, form: Format) -> list[ChoiceOutput]:
        return [
            ChoiceOutput(
                self._table, plan.stops, choice.sampling.stop_token_ids, continues_prompt=form.continues_prompt
            )
            for choice in plan.choices
        ]

    def _heading(self, plan: Plan, request_id: str) -> Heading:
        return Heading(
            request_id,
            int(time.time()),
            self._planner.served_model,
            plan.logprobs is not None,
            plan.return_token_ids,
            plan.include_usage,
        )

    async def _whole(self, request: web.Request, exchange: Exchange, form: Format) -> web.Response:
        deltas: list[list[Delta]] = [[] for _ in exchange.plan.choices]
        finishes: list[FinishText] = ["stop"] * len(deltas)
        async for news in exchange.progress():
            for new in news:
                deltas[new.choice].append(new.delta)
                finishes[new.choice] = new.finish or finishes[new.choice]
        answers = [
            Answer(_joined(parts), finish, choice.prompt)
            for parts, finish, choice in zip(deltas, finishes, exchange.plan.choices, strict=True)
        ]
        body = self._encoder.encode(form.whole(exchange.heading, answers, exchange.usage()))
        headers = {RECOVERIES: str(exchange.recoveries)} if exchange.recoveries else None
        response = web.Response(body=body, content_type="application/json", headers=headers)
        await self._sent(request, response.prepare(request))
        await self._sent(request, response.write_eof())
        return response

    async def _stream(
        self, request: web.Request, exchange: Exchange, form: Format, outcome: Outcome
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        heading, cursor = exchange.heading, exchange.cursor
        ids = self._event_ids and request[NAMED]
        try:
            async for news in exchange.progress():
                if exchange.recoveries and not response.prepared:
                    response.headers[RECOVERIES] = str(exchange.recoveries)
                await self._write(request, response, self._news(form, exchange, news, ids=ids))
            ending = b""
            if heading.usage and not cursor.usage_told:
                cursor.usage_told = True
                ending = self._event(form.usage_chunk(heading, exchange.usage()), cursor if ids else None)
            if exchange.recoveries:
                # Within the last event: the OpenAI SDK takes a comment by itself for an event, once it has seen an id.
                ending += f": {RECOVERIES}: {exchange.recoveries}\n".encode()
            await self._write(request, response, ending + b"data: [DONE]\n\n")
        except BatonError as error:
            if not response.prepared:
                raise
            outcome.failed(error)
            await self._write(request, response, self._event(error_body(error)))
        await self._sent(request, response.write_eof())
        return response

    def _news(self, form: Format, exchange: Exchange, news: list[Progress], *, ids: bool) -> bytes:
        """What is new, as events."""
        heading, cursor = exchange.heading, exchange.cursor
        events = []
        for new in news:
            opening = None if cursor.marks[new.choice].begun else form.opening(heading, new.choice)
            if opening is not None:
                cursor.tell(new.choice, 0, finished=False)
                events.append(self._event(opening, cursor if ids else None))
            cursor.tell(new.choice, new.tokens, finished=new.finish is not None)
            chunk = form.chunk(heading, new.choice, new.delta, new.finish)
            events.append(self._event(chunk, cursor if ids else None))
        return b"".join(events)

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Waits while the client is slow; the choices' events wait in their mailbox meanwhile."""
        if not response.prepared:
            await response.prepare(request)
        await self._sent(request, response.write(data))

    async def _sent(self, request: web.Request, writing: Awaitable[object]) -> None:
        """Waits for a write, and cuts a client off that takes nothing for too long: this handler is cancelled then."""
        transport = request.transport
        stuck = asyncio.get_running_loop().call_later(
            self._config.limits.stuck_seconds, lambda: transport.abort() if transport is not None else None
        )
        try:
            await writing
        finally:
            stuck.cancel()

    def _event(self, body: msgspec.Struct, cursor: Cursor | None = None) -> bytes:
        id_line = b"" if cursor is None else f"id: {cursor}\n".encode()
        return id_line + b"data: " + self._encoder.encode(body) + b"\n\n"


def _cursor(request: web.Request, plan: Plan) -> Cursor | None:
    """Where the client wants to go on, if it does. Raises `InvalidRequest`."""
    last = request.headers.get(LAST_EVENT_ID)
    if last is None:
        return None
    if not plan.stream:
        raise InvalidRequest(f"{LAST_EVENT_ID}: only a stream can be gone on with (stream: true)", param=LAST_EVENT_ID)
    if not request[NAMED]:
        raise InvalidRequest(
            f"{LAST_EVENT_ID}: needs the {REQUEST_ID_HEADER} of the request that it goes on with", param=LAST_EVENT_ID
        )
    return Cursor.parse(last.strip(), [choice.sampling.max_tokens for choice in plan.choices])


def _shortened(choices: Sequence[ChoiceSpec], cursor: Cursor, outputs: list[list[int]] | None) -> Sequence[ChoiceSpec]:
    """The choices without what the client has and we still know: all of it but the last token, so that there is one to
    come, and with it the end, if that was the last."""
    if outputs is None or any(mark.finished for mark in cursor.marks):
        return choices
    return [
        choice._replace(output=output[: max(0, min(mark.tokens, len(output)) - 1)])
        for choice, mark, output in zip(choices, cursor.marks, outputs, strict=True)
    ]


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.text for delta in deltas),
        [info for delta in deltas for info in delta.infos],
        [token for delta in deltas for token in delta.token_ids],
    )

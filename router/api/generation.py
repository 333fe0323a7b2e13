"""The two endpoints that generate: the same way for both, streamed or not.

A stream's status line waits for the first token: until then an error is a proper HTTP error. After it an error is an
event of its own, and the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web

from cluster.clock import Clock
from cluster.errors import BatonError, Draining
from cluster.metrics import RouterMetrics
from router.api.decoding import read_request
from router.api.errors import error_body
from router.api.exchange import Exchange
from router.api.formats import Answer, ChatFormat, CompletionFormat, FinishText, Format, Heading
from router.api.identity import REQUEST_ID, unique_id
from router.api.outcome import Outcome
from router.api.plan import Plan, Planner
from router.api.requests import ChatCompletionRequest, CompletionRequest
from router.dispatch import Dispatcher
from router.text.output import ChoiceOutput, Delta
from router.text.token_table import TokenTable

STUCK_SECONDS = 5.0
"""A client that has read nothing for so long after its request's deadline loses its connection."""

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class GenerationApi:
    """Handlers of POST /v1/chat/completions and POST /v1/completions."""

    def __init__(
        self,
        planner: Planner,
        dispatcher: Dispatcher,
        table: TokenTable,
        metrics: RouterMetrics,
        clock: Clock,
        timeout_seconds: float,
    ) -> None:
        self._planner = planner
        self._dispatcher = dispatcher
        self._table = table
        self._metrics = metrics
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._encoder = msgspec.json.Encoder()
        self.draining = False
        """No new requests; those under way go on."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        arrived = self._clock.now()
        with self._counted("chat", request) as outcome:
            self._require_open()
            plan = await self._planner.chat(await read_request(request, ChatCompletionRequest))
            return await self._answer(request, plan, ChatFormat(), arrived, outcome)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        arrived = self._clock.now()
        with self._counted("completions", request) as outcome:
            self._require_open()
            plan = await self._planner.completion(await read_request(request, CompletionRequest))
            return await self._answer(request, plan, CompletionFormat(), arrived, outcome)

    def _require_open(self) -> None:
        if self.draining:
            raise Draining("this router is stopping")

    def _counted(self, route: str, request: web.Request) -> Outcome:
        return Outcome(route, request[REQUEST_ID], self._metrics, self._clock)

    async def _answer(
        self, request: web.Request, plan: Plan, form: Format, arrived: float, outcome: Outcome
    ) -> web.StreamResponse:
        request_id = unique_id(form.prefix, request[REQUEST_ID])
        generation = self._dispatcher.begin(
            request_id, request[REQUEST_ID], plan.choices, arrived, plan.tokenize_seconds
        )
        # At the deadline the exchange ends by itself; only a write that waits for the client does not.
        transport = request.transport
        stuck = asyncio.get_running_loop().call_later(
            self._timeout_seconds + STUCK_SECONDS, lambda: transport.abort() if transport is not None else None
        )
        exchange = Exchange(plan, generation, self._outputs(plan, form), self._heading(plan, request_id))
        try:
            if plan.stream:
                return await self._stream(request, exchange, form, outcome)
            return await self._whole(exchange, form)
        finally:
            stuck.cancel()
            generation.close("the client is gone")
            outcome.observe(exchange.usage(), [choice.trace.first_token_at for choice in generation.choices], arrived)

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

    async def _whole(self, exchange: Exchange, form: Format) -> web.Response:
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
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, request: web.Request, exchange: Exchange, form: Format, outcome: Outcome
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        heading = exchange.heading
        opened: set[int] = set()
        try:
            async for news in exchange.progress():
                events = []
                for new in news:
                    opening = form.opening(heading, new.choice) if new.choice not in opened else None
                    opened.add(new.choice)
                    if opening is not None:
                        events.append(self._event(opening))
                    events.append(self._event(form.chunk(heading, new.choice, new.delta, new.finish)))
                await self._write(request, response, b"".join(events))
            ending = self._event(form.usage_chunk(heading, exchange.usage())) if heading.usage else b""
            await self._write(request, response, ending + b"data: [DONE]\n\n")
        except BatonError as error:
            if not response.prepared:
                raise
            outcome.failed(error)
            await self._write(request, response, self._event(error_body(error)))
        await response.write_eof()
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Waits while the client is slow; the choices' events wait in their mailbox meanwhile."""
        if not response.prepared:
            await response.prepare(request)
        await response.write(data)

    def _event(self, body: msgspec.Struct) -> bytes:
        return b"data: " + self._encoder.encode(body) + b"\n\n"


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.text for delta in deltas),
        [info for delta in deltas for info in delta.infos],
        [token for delta in deltas for token in delta.token_ids],
    )

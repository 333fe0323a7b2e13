"""From a typed request to what the dispatcher needs: token ids and final sampling settings for each choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.clock import Clock
from cluster.config import Router
from cluster.errors import InvalidRequest, ModelNotFound, PromptTooLong
from cluster.messages import Sampling
from cluster.metrics import RouterMetrics
from router.api.admitting import Demand
from router.api.identity import seed_of
from router.api.requests import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest
from router.dispatch import ChoiceSpec
from router.fleet_view import FleetLimits
from router.text.model_text import ModelText

THREAD_CHARACTERS = 2048
"""Longer texts are tokenized in a thread (about a millisecond), so that the event loop does not stall."""

CHARACTERS_PER_TOKEN = 4
"""About, in English: good enough to turn away what has no room at all, before it is tokenized."""

_MASK = (1 << 64) - 1


class _Tokenized(NamedTuple):
    prompts: list[list[int]]
    seconds: float


class Plan(NamedTuple):
    """A request that is valid and fits. Choice i belongs to prompt i // n."""

    choices: list[ChoiceSpec]
    prompts: list[list[int]]
    n: int
    stops: list[str]
    logprobs: int | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    tokenize_seconds: float


class Planner:
    """Checks requests against the model and the live workers' limits, and tokenizes."""

    def __init__(
        self,
        served_model: str,
        text: ModelText,
        config: Router,
        limits: Callable[[], FleetLimits | None],
        clock: Clock,
        metrics: RouterMetrics,
    ) -> None:
        self.served_model = served_model
        self._text = text
        self._config = config
        self._limits = limits
        self._clock = clock
        self._metrics = metrics

    @property
    def limits(self) -> FleetLimits:
        """What the workers say; before any is live, what the model's files say."""
        size = self._text.context_length
        return self._limits() or FleetLimits(size, self._text.vocab_size, size)

    async def chat(self, request: ChatCompletionRequest, name: str) -> Plan:
        """`name` is the request's id, which gives the seed where the request has none. Raises `ModelNotFound`,
        `InvalidRequest` or `PromptTooLong`."""
        self._require_model(request.model)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        template = self._text.template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions with the model's own format", param="messages"
            )
        messages = [_for_template(message) for message in request.messages]

        def tokenize() -> list[list[int]]:
            return [self._text.encode(template.render(messages), add_special_tokens=False)]

        tokenized = await self._timed(tokenize, [sum(len(message["content"]) for message in messages)])
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._plan(request, name, tokenized, logprobs, *_limit(request))

    async def completion(self, request: CompletionRequest, name: str) -> Plan:
        """As `chat`."""
        self._require_model(request.model)
        prompts = _prompts(request.prompt)
        self._require_choices(len(prompts), request.n)
        vocab_size = self.limits.vocab_size
        for prompt in prompts:
            if not prompt:
                raise InvalidRequest("prompt: empty", param="prompt")
            if isinstance(prompt, list):
                _require_tokens(prompt, vocab_size)

        def tokenize() -> list[list[int]]:
            return [
                self._text.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        tokenized = await self._timed(tokenize, [len(prompt) for prompt in prompts if isinstance(prompt, str)])
        return self._plan(request, name, tokenized, request.logprobs, request.max_tokens, "max_tokens")

    # --- steps -------------------------------------------------------------------------------------------------------

    def _require_model(self, model: str) -> None:
        if model != self.served_model:
            raise ModelNotFound(
                f"there is no model {model!r} here; this cluster serves {self.served_model!r}", param="model"
            )

    def _require_choices(self, prompts: int, n: int | None) -> None:
        most = self._config.max_choices
        if prompts * (n or 1) > most:
            raise InvalidRequest(
                f"{prompts} prompts with n={n or 1} ask for {prompts * (n or 1)} choices; the limit is {most}",
                param="n" if (n or 1) > 1 else "prompt",
            )

    async def _timed(self, work: Callable[[], list[list[int]]], lengths: list[int]) -> _Tokenized:
        """`lengths` are the texts' own, in characters. Raises `PromptTooLong` where they tell enough."""
        for length in lengths:
            self._require_fitting(self._text.fewest_tokens(length), "at least ")
        start = self._clock.now()
        prompts = await asyncio.to_thread(work) if sum(lengths) > THREAD_CHARACTERS else work()
        seconds = self._clock.now() - start
        self._metrics.tokenize.observe(seconds)
        return _Tokenized(prompts, seconds)

    def _plan(
        self,
        request: GenerationRequest,
        name: str,
        tokenized: _Tokenized,
        logprobs: int | None,
        limit: int | None,
        field: str,
    ) -> Plan:
        n = request.n or 1
        self._require_choices(len(tokenized.prompts), n)
        seed = seed_of(name) if request.seed is None else request.seed
        choices = []
        for prompt in tokenized.prompts:
            if not prompt:
                raise InvalidRequest("the prompt is empty: it has no tokens", param="prompt")
            max_tokens = self._max_tokens(len(prompt), limit, field)
            choices += [
                ChoiceSpec(
                    prompt,
                    self._sampling(request, max_tokens, choice_seed(seed, index), logprobs),
                    request.priority or 0,
                )
                for index in range(n)
            ]
        return Plan(
            choices=choices,
            prompts=tokenized.prompts,
            n=n,
            stops=[request.stop] if isinstance(request.stop, str) else list(request.stop or []),
            logprobs=logprobs,
            stream=bool(request.stream),
            include_usage=bool(request.stream_options and request.stream_options.include_usage),
            return_token_ids=bool(request.return_token_ids),
            tokenize_seconds=tokenized.seconds,
        )

    def _require_fitting(self, prompt: int, about: str = "") -> None:
        """Raises `PromptTooLong` unless there is room for `prompt` tokens and one more."""
        limits, own = self.limits, self._config.limits.prompt_tokens
        for capacity, what in ((limits.context_length, "the model's context"), (limits.pool_tokens, "the KV pool")):
            if prompt + 1 > capacity:
                raise PromptTooLong(f"the prompt has {about}{prompt} tokens; {what} holds {capacity}", param="prompt")
        if own is not None and prompt > own:
            raise PromptTooLong(f"the prompt has {about}{prompt} tokens; this router takes {own}", param="prompt")

    def _max_tokens(self, prompt: int, limit: int | None, field: str) -> int:
        """The request's own limit if that fits, else the default, or what is left of the context and the KV pool."""
        limits = self.limits
        self._require_fitting(prompt)
        for capacity, what in ((limits.context_length, "the model's context"), (limits.pool_tokens, "the KV pool")):
            if limit is not None and prompt + limit > capacity:
                raise PromptTooLong(
                    f"{field} is {limit} and the prompt has {prompt} tokens, together {prompt + limit}; "
                    f"{what} holds {capacity}",
                    param=field,
                )
        left = min(limits.context_length, limits.pool_tokens) - prompt
        return min(self._config.default_max_tokens, left) if limit is None else limit

    def _sampling(self, request: GenerationRequest, max_tokens: int, seed: int, logprobs: int | None) -> Sampling:
        stops = set() if request.ignore_eos else set(self._text.stop_token_ids)
        return Sampling(
            max_tokens=max_tokens,
            seed=seed,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            stop_token_ids=sorted(stops | set(request.stop_token_ids or [])),
            logprobs=logprobs,
        )


def demand_of(request: ChatCompletionRequest | CompletionRequest) -> Demand:
    """What the request will take, as far as can be told without a tokenizer."""
    if isinstance(request, ChatCompletionRequest):
        prompts, tokens = 1, sum(len(_for_template(message)["content"]) for message in request.messages)
        tokens = -(-tokens // CHARACTERS_PER_TOKEN)
    else:
        texts = _prompts(request.prompt)
        prompts = len(texts)
        tokens = sum(-(-len(text) // (CHARACTERS_PER_TOKEN if isinstance(text, str) else 1)) for text in texts)
    n = request.n or 1
    return Demand(prompts * n, tokens * n, request.priority or 0)


def choice_seed(seed: int, index: int) -> int:
    """The seed (63 bits) of choice `index` of a prompt. Choice 0 has the request's own, so that n does not change it,
    nor does sending a prompt together with others. The mixing is SplitMix64's finaliser."""
    if index == 0:
        return seed & (_MASK >> 1)
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 1


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """Templates were written for plain text: parts are joined by line breaks."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    rendered: dict[str, Any] = {"role": message.role, "content": text}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _limit(request: ChatCompletionRequest) -> tuple[int | None, str]:
    """The most tokens that the answer may have, and the field that says so: the newer one, or its older name."""
    if request.max_completion_tokens is None:
        return request.max_tokens, "max_tokens"
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise InvalidRequest(
            f"max_tokens is {request.max_tokens} and max_completion_tokens {request.max_completion_tokens}: give one",
            param="max_tokens",
        )
    return request.max_completion_tokens, "max_completion_tokens"


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The four forms of `prompt` as a list of texts or of token id lists."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [part for part in prompt if isinstance(part, str)]
    tokens = [part for part in prompt if isinstance(part, int)]
    lists = [part for part in prompt if isinstance(part, list)]
    if not prompt:
        raise InvalidRequest("prompt: empty", param="prompt")
    if len(texts) == len(prompt):
        return list(texts)
    if len(tokens) == len(prompt):
        return [tokens]
    if len(lists) == len(prompt):
        return list(lists)
    raise InvalidRequest(
        "prompt: expected text, a list of texts, a list of token ids or a list of such lists, found a mixed list",
        param="prompt",
    )


def _require_tokens(prompt: list[int], vocab_size: int) -> None:
    for place, token in enumerate(prompt):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"prompt: token id {token} (number {place}) is not in the vocabulary of {vocab_size}", param="prompt"
            )

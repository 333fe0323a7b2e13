"""One request as the engine sees it: its tokens, how many of them have KV, and in which pages."""

from __future__ import annotations

from collections.abc import Callable

from cluster.messages import Fence, Sampling


class Sequence:
    """Mutable; the scheduler that it was submitted to is the only writer.

    A token's position is its index in prompt + output. KV of positions below `computed` is in `pages`, page i holding
    positions [i * page_size, (i + 1) * page_size). A step feeds the tokens from `computed` on, and samples the next
    one when it has fed them all, so there are `pending` >= 1 tokens between two steps. The last token is never fed.

    `output` may begin with tokens of earlier attempts; `sampling.max_tokens` counts them too. `arrived` is when it
    began to wait, in seconds of the clock that the scheduler is asked by.

    Where steps are planned ahead, there may be tokens at its end that are being computed and that nobody has read:
    `unread` of them, which count in `length` and `pending`, and are not in `output`.
    """

    __slots__ = (
        "_chain", "arrived", "attempt", "cached", "computed", "key", "output", "pages", "prefill_end", "priority",
        "prompt", "sampling", "unread",
    )  # fmt: skip

    def __init__(
        self,
        key: Fence,
        prompt: list[int],
        output: list[int],
        sampling: Sampling,
        computed: int = 0,
        *,
        arrived: float = 0.0,
        priority: int = 0,
        attempt: int = 1,
    ) -> None:
        self.key = key
        self.prompt = prompt
        self.sampling = sampling
        self.output = output
        self.unread = 0
        self.computed = computed
        self.arrived = arrived
        self.priority = priority
        """The higher, the more urgent."""
        self.attempt = attempt
        """Of the request: 1, and one more for each time that it was placed again."""
        self.cached = 0
        """Tokens whose KV was in the prefix cache when it was admitted."""
        self.pages: list[int] = []
        self._chain: list[bytes] | None = None
        self.prefill_end = computed if computed and self.pending == 1 else self.length
        """Where prefill ends: positions below it are the prompt's (and earlier attempts') to compute; those from it
        on are decode steps. With KV for all but the last token, there is nothing to prefill."""

    @property
    def length(self) -> int:
        """Tokens so far; the position of the next one."""
        return len(self.prompt) + len(self.output) + self.unread

    @property
    def pending(self) -> int:
        """Tokens that are known and have no KV yet."""
        return self.length - self.computed

    @property
    def capacity(self) -> int:
        """Tokens whose KV this sequence can ever need: all but the last one."""
        return len(self.prompt) + self.sampling.max_tokens - 1

    @property
    def at_limit(self) -> bool:
        """Whether it has all the tokens that it may have, be they read or not: there is no step left for it."""
        return len(self.output) + self.unread >= self.sampling.max_tokens

    @property
    def interrupted(self) -> bool:
        """Whether an earlier attempt at this request was given up."""
        return self.attempt > 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens at positions [start, stop), but for unread ones."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return self.prompt[start:stop] + self.output[: max(0, stop - split)]

    def chain_by(self, make: Callable[[list[int]], list[bytes]]) -> list[bytes]:
        """Keys of the full pages of the tokens that it has before its first step, by `PrefixCache.chain`, made once:
        who waits is looked up at each step."""
        if self._chain is None:
            self._chain = make(self.tokens(0, self.length))
        return self._chain

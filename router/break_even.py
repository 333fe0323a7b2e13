"""Whether to hand over at all: a prompt is prefilled where it decodes when that delays everybody less. Pure.

Both ways are priced in seconds that somebody waits for a token:

    handing over    all prompt tokens that go first at the prefill worker, and its own, at that worker's speed; and the
                    handoff: until decode's next step begins, and that step
    staying         all prompt tokens that go first at the decode worker, and its own, at the pace that it has beside
                    decodes; and for each request that decodes there, what the prompt's tokens make its steps longer

So an idle decode worker takes short prompts, and long ones while the prefill pool is behind; a busy one takes what it
can hide. There is no threshold in it: the speeds are those that the workers measured at their start.
"""

from __future__ import annotations

from cluster.config import BreakEven, SchedulingPolicy
from cluster.messages import Speed
from router.policies import Candidate, Need, Placement, Policy, Snapshot, compatible_groups

STEPS_PER_HANDOFF = 1.5
"""Of decode: half a step, on average, until the next one begins, and that one."""


class BreakEvenPolicy:
    """Another policy's pair of workers, or a decode worker alone. Also where no prefill worker is live: late is better
    than never."""

    def __init__(self, pairs: Policy, settings: BreakEven, prefill_order: SchedulingPolicy) -> None:
        """`prefill_order` is that of the prefill workers' queues."""
        self._pairs = pairs
        self._delay_weight = settings.delay_weight
        self._shortest_first = prefill_order is SchedulingPolicy.SHORTEST_FIRST

    def place(self, snapshot: Snapshot, need: Need, turn: int) -> Placement:
        if snapshot.unified or need.output <= 1:
            return self._pairs.place(snapshot, need, turn)
        alone = snapshot._replace(prefill=[], unified=True)
        if not snapshot.prefill:
            return self._pairs.place(alone, need, turn)
        pair = self._pairs.place(snapshot, need, turn)
        assert pair.prefill is not None
        assert pair.decode is not None
        priced = [
            (self._staying(candidate, candidate.member.speed, need.prompt), candidate)
            for group in compatible_groups(alone, need)
            for candidate in group.decode
            if candidate.member.speed is not None
        ]
        prefill_speed, decode_speed = pair.prefill.member.speed, pair.decode.member.speed
        if not priced or prefill_speed is None or decode_speed is None:
            return pair
        handing_over = (
            self._ahead(pair.prefill, need.prompt) + need.prompt
        ) * prefill_speed.prompt_token_seconds + STEPS_PER_HANDOFF * decode_speed.step_seconds
        seconds, candidate = min(priced, key=lambda pricing: pricing[0])
        return Placement(None, candidate) if seconds < handing_over else pair

    def _staying(self, candidate: Candidate, speed: Speed, prompt: int) -> float:
        """`candidate.attempts` counts those whose KV is still awaited, too: they will decode beside this prompt."""
        pace = speed.prompt_token_seconds
        if candidate.attempts:
            pace += speed.step_seconds / speed.prompt_tokens_beside_decodes
        longer = prompt * speed.prompt_token_seconds * candidate.attempts
        return (candidate.tokens + prompt) * pace + self._delay_weight * longer

    def _ahead(self, candidate: Candidate, prompt: int) -> int:
        """Prompt tokens that go before one of `prompt` tokens. Other routers' count whole: their sizes are unknown."""
        if not self._shortest_first:
            return candidate.tokens
        longer = sum(own.tokens for own in candidate.commitments if own.tokens > prompt)
        return max(0, candidate.tokens - longer)

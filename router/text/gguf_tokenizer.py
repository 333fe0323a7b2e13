"""Builds a `tokenizers.Tokenizer` from GGUF metadata.

Two families: byte-level BPE (`tokenizer.ggml.model` gpt2), whose splitting rule goes by the name in
`tokenizer.ggml.pre`, and SentencePiece BPE (llama), which has scores in place of merges. What is not known is refused:
a tokenizer that is nearly right gives answers that are nearly right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cluster.errors import ModelError

_CONTROL = 3
_USER_DEFINED = 4
"""Values of `tokenizer.ggml.token_type`."""

_SPACE = "▁"

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""The published rules differ in how many digits go together."""


def build_tokenizer(metadata: Mapping[str, Any], path: object) -> Tokenizer:
    """Raises `ModelError`, naming `path`, for a tokenizer that is missing or of a kind we don't know."""
    model = metadata.get("tokenizer.ggml.model")
    tokens: Sequence[str] | None = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ModelError(f"{path} has no tokenizer")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, path)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, path)
    else:
        raise ModelError(f"{path}: tokenizer model {model!r} is not supported; supported: gpt2, llama")
    _add_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    if _adds_bos(metadata):
        bos = int(metadata["tokenizer.ggml.bos_token_id"])
        _prepend(tokenizer, tokens[bos], bos)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], path: object) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    # Llama 3 takes a word that is a token as it is, even where no sequence of merges leads to it.
    bpe = models.BPE(vocab=_vocabulary(tokens), merges=merges, fuse_unk=False, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    if pre == "smollm":
        splitters = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split_by(_QWEN2_SPLIT)
    elif pre == "llama-bpe":
        tokenizer.pre_tokenizer = _split_by(_LLAMA3_SPLIT)
    elif pre in ("default", "gpt-2"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        known = "smollm, qwen2, llama-bpe, gpt-2, default"
        raise ModelError(f"{path}: the pre-tokenizer {pre!r} is not supported; supported: {known}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_by(rule: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], path: object) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ModelError(f"{path}: a SentencePiece tokenizer without tokenizer.ggml.scores")
    vocabulary = _vocabulary(tokens)
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours form the token of the highest score: that is BPE with these merges."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[number], vocabulary[left], vocabulary[right], (left, right)))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are special (never shown); user-defined ones are only never split."""
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    own = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Where the file doesn't say, these two families do."""
    by_family = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    wanted = metadata.get("tokenizer.ggml.add_bos_token", by_family)
    return bool(wanted) and "tokenizer.ggml.bos_token_id" in metadata


def _prepend(tokenizer: Tokenizer, token: str, number: int) -> None:
    template = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])
    # A second post-processor would replace the offsets of byte-level ones; nobody here reads offsets.
    tokenizer.post_processor = template

"""Tokenizers, chat templates and sizes, from both kinds of model files."""

import json
import struct
from datetime import datetime

import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from cluster.errors import InvalidRequest, ModelError
from cluster.model_files import resolve_model
from router.text.chat_template import ChatTemplate
from router.text.gguf_metadata import read_metadata
from router.text.gguf_tokenizer import build_tokenizer
from router.text.model_text import load_model_text

TEXTS = [
    "hello",
    " leading and  double   spaces ",
    "12345 and 3.14159, 1,000,000",
    "don't we'll I'M",
    "Grüße, 你好, Здравствуйте, مرحبا",
    "👩‍🚀 👍🏽 é e\u0301",
    "def f(x):\n\treturn x ** 2\r\n\n\n",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 500,
    "\u00a0\u200b\ufeff",
]


@pytest.fixture(scope="module")
def demo():
    return load_model_text(resolve_model("smollm2-135m-instruct"))


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_the_demo_models_sizes_and_ends(demo):
    assert (demo.context_length, demo.vocab_size, demo.stop_token_ids) == (8192, 49152, [2])


def test_digits_stand_alone_and_special_tokens_are_whole(demo):
    digits = demo.encode("12345", add_special_tokens=True)
    assert len(digits) == 5
    assert demo.encode("<|im_start|>", add_special_tokens=True) == [1]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(demo, text):
    ids = demo.encode(text, add_special_tokens=False)
    shown = b"".join(demo.table.bytes_of(token) for token in ids)
    assert shown.decode() == text


def gguf(tmp_path, values: dict, version: int = 3):
    """A file with these metadata: str, int, float, bool, and lists of one of them."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    kinds = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}

    def plain(value) -> bytes:
        return text(value) if isinstance(value, str) else struct.pack("<" + kinds[type(value)][1], value)

    def kind(value) -> int:
        return 8 if isinstance(value, str) else kinds[type(value)][0]

    body = b""
    for key, value in values.items():
        body += text(key)
        if isinstance(value, list):
            body += struct.pack("<IIQ", 9, kind(value[0]), len(value)) + b"".join(map(plain, value))
        else:
            body += struct.pack("<I", kind(value)) + plain(value)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, len(values)) + body)
    return path


def test_metadata_of_all_kinds_are_read(tmp_path):
    values = {"a": "é", "b": 7, "c": 1.5, "d": True, "e": ["x", ""], "f": [1, 2], "g": [0.5], "h": [True, False]}
    assert read_metadata(gguf(tmp_path, values)) == values


def test_files_that_are_no_gguf_or_damaged_are_refused(tmp_path):
    whole = gguf(tmp_path, {"a": "some text"}).read_bytes()
    for content, words in ((b"", "read"), (b"PK\x03\x04abcd", "not a GGUF"), (whole[:-3], "damaged")):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            read_metadata(broken)
    with pytest.raises(ModelError, match="version 1"):
        read_metadata(gguf(tmp_path, {}, version=1))


def byte_level(pre: str, **more) -> dict:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab", "<s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        **more,
    }


@pytest.mark.parametrize(
    ("pre", "count"), [("smollm", 2), ("qwen2", 2), ("llama-bpe", 1), ("gpt-2", 1), ("default", 1)]
)
def test_digits_are_split_by_the_models_own_rule(pre, count):
    tokenizer = build_tokenizer(byte_level(pre), "x")
    assert len(tokenizer.encode("12", add_special_tokens=False).ids) == count


def test_bos_is_added_where_the_family_or_the_file_says_so():
    def first(metadata) -> str:
        return build_tokenizer(metadata, "x").encode("ab").tokens[0]

    assert first(byte_level("llama-bpe")) == "<s>"
    assert first(byte_level("qwen2")) == "ab"
    assert first(byte_level("qwen2", **{"tokenizer.ggml.add_bos_token": True})) == "<s>"


def test_a_sentencepiece_tokenizer_merges_by_score():
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a"]
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = build_tokenizer(metadata, "x")
    assert tokenizer.encode("ab é").tokens == ["<s>", "▁a", "b", "▁", "<0xC3>", "<0xA9>"], "▁a before ab: -1 beats -2"
    assert tokenizer.decode(tokenizer.encode("ab é").ids) == "ab é"


def test_a_tokenizer_that_is_not_known_is_refused():
    with pytest.raises(ModelError, match=r"'deepseek-llm' is not supported; supported: smollm"):
        build_tokenizer(byte_level("deepseek-llm"), "x")
    with pytest.raises(ModelError, match="'bert'"):
        build_tokenizer({**byte_level("default"), "tokenizer.ggml.model": "bert"}, "x")
    with pytest.raises(ModelError, match="has no tokenizer"):
        build_tokenizer({"tokenizer.ggml.model": "gpt2"}, "x")


# --- Hugging Face folders --------------------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<turn>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", {"max_position_embeddings": 64, "vocab_size": 300, "eos_token_id": 257})
    write(
        tmp_path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
        },
    )
    return tmp_path


def write(path, content) -> None:
    path.write_text(json.dumps(content))


def test_a_folder_gives_tokenizer_template_and_sizes(folder):
    text = load_model_text(folder)
    assert (text.context_length, text.vocab_size, text.stop_token_ids) == (64, 300, [257])
    assert text.encode("longer than four", add_special_tokens=True)[0] == 256
    assert len(text.encode("longer than four", add_special_tokens=True)) == 17, "the file's truncation is not ours"
    assert text.template.render([{"role": "user", "content": "hi"}]) == "<s>[user] hi"


def test_end_of_turn_and_templates_come_from_their_newer_places(folder):
    write(folder / "generation_config.json", {"eos_token_id": [257, 258]})
    assert load_model_text(folder).stop_token_ids == [257, 258]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert load_model_text(folder).template.render([]) == "named"
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert load_model_text(folder).template.render([]) == "a file of its own"


def test_a_model_without_a_template_still_completes(folder):
    write(folder / "tokenizer_config.json", {})
    assert load_model_text(folder).template is None


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{", "can't be read"),
        ("config.json", '{"vocab_size": 5}', "max_position_embeddings"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "can't be read"),
        ("chat_template.jinja", "{% if %}", "line 1"),
    ],
)
def test_a_broken_folder_is_named(folder, file, content, words):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=words):
        load_model_text(folder)


# --- chat templates --------------------------------------------------------------------------------------------------

CONVENTIONS = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{{ message | tojson }}{% endgeneration %}
{% endfor %}
{{ strftime_now('%Y') }}{% if add_generation_prompt %}!{% endif %}
"""


def test_the_conventions_of_templates_hold():
    template = ChatTemplate(CONVENTIONS, {}, today=lambda: datetime(2026, 11, 20))
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "<é & 'q'>"}]
    assert template.render(messages).split() == ['{"role":', '"user",', '"content":', '"<é', "&", "'q'>\"}2026!"]


def test_templates_equal_transformers_own(tmp_path, folder):
    transformers = pytest.importorskip("transformers")
    source = TEMPLATE + CONVENTIONS.replace("{{ strftime_now('%Y') }}", "")
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": source,
        },
    )
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "line\nline  é"}]
    ours = load_model_text(folder).template.render(messages)
    assert ours == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_what_a_template_refuses_is_the_clients_mistake():
    template = ChatTemplate("{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}", {})
    with pytest.raises(InvalidRequest, match="one at a time"):
        template.render([{}, {}])
    with pytest.raises(InvalidRequest, match=r"can only concatenate"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([{"content": "a"}])


def test_a_template_can_not_reach_outside():
    escape = ChatTemplate("{{ messages.__class__.__mro__[-1].__subclasses__() }}", {})
    with pytest.raises(InvalidRequest):
        escape.render([])
    assert jinja2.__version__

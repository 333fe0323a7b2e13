"""The demo model's tokenizer and chat template against transformers, which takes long to load them."""

import transformers
from tokenizers import pre_tokenizers

from cluster.model_files import resolve_model
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


def test_tokens_and_chats_of_the_demo_model_are_transformers_own():
    """transformers' own conversion of this file lacks the digit splitter, and nothing else."""
    demo_path = resolve_model("smollm2-135m-instruct")
    demo = load_model_text(demo_path)
    reference = transformers.AutoTokenizer.from_pretrained(demo_path.parent, gguf_file=demo_path.name)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        assert demo.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "<"},
    ]
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert demo.template.render(messages) == rendered

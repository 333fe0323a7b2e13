"""Every supported architecture against transformers: same logits, same greedy tokens, whatever the batch and chunks."""

from __future__ import annotations

import json

import gguf
import pytest
import torch

from cluster.config import Dtype, Kernels, KVDtype, WeightsFrom
from cluster.errors import ModelError
from engine.weights import open_model
from tests.unit.engine.tiny import MODELS, SIZES, make_engine, make_model, prompts, run, sequence

NEW_TOKENS = 12


def generated(model, prompt):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
    return answer[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.NATIVE])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logprobs_are_transformers_own(name, kernels, tmp_path):
    model = make_model(MODELS[name])
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, kernels=kernels)
    engine.warm_up()
    asked = prompts(1, 3, 4, 5, 15, 16, 17, 40, 70)
    found = run(engine, *(sequence(index, prompt, NEW_TOKENS) for index, prompt in enumerate(asked)))
    assert list(found.values()) == [generated(model, prompt) for prompt in asked]

    engine.submit(sequence("logprobs", asked[-1], 1, logprobs=5))
    while (result := engine.step()).sampled == []:
        pass
    with torch.no_grad():
        expected = model(torch.tensor([asked[-1]])).logits[0, -1].log_softmax(-1)
    values, ids = expected.topk(5)
    assert [token for token, _ in result.sampled[0].logprobs.top] == ids.tolist()
    assert [logprob for _, logprob in result.sampled[0].logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_shards_hold_the_same_model_as_one_file(tmp_path):
    model = make_model(MODELS["qwen3"])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (open_model(tmp_path / name, WeightsFrom.FILES).weights for name in ("one", "many"))
    assert one.shapes() == many.shapes()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.shapes())


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "layers": "blk",
         "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}  # fmt: skip


def write_gguf(model, path, architecture, **metadata):
    """As llama.cpp's converter does: other names, and rotated rows of query and key for the llama architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for add, value in metadata.items():
        getattr(writer, add)(value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        prefix, part = "", stem
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            prefix = f"blk.{layer}."
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = SIZES["num_attention_heads" if "q_" in part else "num_key_value_heads"]
            rows = parameter.shape[0] // heads // 2
            parameter = parameter.view(heads, 2, rows, -1).transpose(1, 2).reshape(parameter.shape)
        writer.add_tensor(f"{prefix}{NAMES[part]}.{kind}", parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture", "metadata"),
    [
        ("llama", "llama", {"add_rope_dimension_count": 8}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"add_key_length": 16, "add_value_length": 16}),
    ],
)
def test_gguf_files_hold_the_same_model_as_folders(name, architecture, metadata, tmp_path):
    model = make_model(MODELS[name])
    write_gguf(model, tmp_path / "model.gguf", architecture, **metadata)
    asked = prompts(1, 20, 33)
    found = run(
        make_engine(tmp_path / "model.gguf"), *(sequence(i, prompt, NEW_TOKENS) for i, prompt in enumerate(asked))
    )
    assert list(found.values()) == [generated(model, prompt) for prompt in asked]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "distance"),
    [
        # bfloat16 keeps 8 bits, float16 keeps 11, keys and values of eight bits keep 4; the logits here are about 10.
        (Dtype.BFLOAT16, KVDtype.AUTO, 0.5),
        (Dtype.FLOAT16, KVDtype.AUTO, 0.06),
        (Dtype.FLOAT32, KVDtype.FLOAT8, 1.0),
    ],
)
def test_fewer_bits_stay_close(dtype, kv_dtype, distance, tmp_path):
    model = make_model(MODELS["llama"])
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, dtype=dtype, kv_dtype=kv_dtype)
    (prompt,) = prompts(30)
    engine.submit(sequence("a", prompt, 1, logprobs=128))
    engine.step()
    result = engine.step()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    found = torch.empty(128)
    for token, logprob in result.sampled[0].logprobs.top:
        found[token] = logprob
    assert (found - expected).abs().max() < distance


def test_dummy_weights_need_a_config_only_and_are_the_same_everywhere(tmp_path):
    MODELS["qwen2"].save_pretrained(tmp_path)
    first, second = (make_engine(tmp_path, weights=WeightsFrom.DUMMY) for _ in range(2))
    (prompt,) = prompts(9)
    assert run(first, sequence("a", prompt, 8)) == run(second, sequence("a", prompt, 8))
    assert first.layout == second.layout
    assert first.layout.model.startswith("dummy-")


class TestIdentity:
    """`KVLayout.model`: what keeps two workers with different weights from handing over to each other."""

    def identity(self, folder):
        return open_model(folder, WeightsFrom.FILES).weights.identity

    def test_it_follows_the_weights_and_the_config_and_not_the_path(self, tmp_path):
        model = make_model(MODELS["llama"])
        model.save_pretrained(tmp_path / "a")
        model.save_pretrained(tmp_path / "b")
        assert self.identity(tmp_path / "a") == self.identity(tmp_path / "b")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight *= 1.01
        model.save_pretrained(tmp_path / "c")
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        assert len({self.identity(tmp_path / name) for name in "abc"}) == 3


class TestDamage:
    """What is wrong with the files is said by name, before anything runs."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_model(MODELS["llama"]).save_pretrained(tmp_path)
        return tmp_path

    def refusal(self, path):
        with pytest.raises(ModelError) as refused:
            open_model(path, WeightsFrom.FILES)
        return str(refused.value)

    def change_config(self, folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    def test_missing_unexpected_and_misshapen_tensors(self, folder):
        self.change_config(folder, num_hidden_layers=4, intermediate_size=81)
        refusal = self.refusal(folder)
        assert "missing: model.layers.3.input_layernorm.weight" in refusal
        assert "model.layers.0.mlp.gate_proj.weight is [80, 48], not [81, 48]" in refusal
        self.change_config(folder, num_hidden_layers=2, intermediate_size=80)
        assert "unexpected: model.layers.2." in self.refusal(folder)

    def test_a_truncated_or_missing_file(self, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        assert "model.safetensors is damaged" in self.refusal(folder)
        file.unlink()
        assert "lacks model.safetensors: only safetensors files are supported" in self.refusal(folder)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
        assert "lacks part-1.safetensors" in self.refusal(folder)

    def test_a_config_that_is_no_json(self, folder):
        (folder / "config.json").write_text("{")
        assert "config.json can't be read" in self.refusal(folder)

    def test_a_damaged_gguf_file(self, tmp_path):
        write_gguf(make_model(MODELS["llama"]), tmp_path / "model.gguf", "llama")
        content = (tmp_path / "model.gguf").read_bytes()
        for kept in (100, 2000, len(content) // 2):
            (tmp_path / "model.gguf").write_bytes(content[:kept])
            assert "is not a GGUF file, or damaged" in self.refusal(tmp_path / "model.gguf")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported are llama, mistral"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu' (only silu)"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
            ({"rope_parameters": {"full": {"rope_type": "default"}}}, "by layer type"),
            ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "config.json lacks 'low_freq_factor'"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
            ({"num_key_value_heads": 4}, "6 heads can't be shared by 4"),
            ({"hidden_size": 0}, "hidden_size is 0"),
            ({"head_dim": 7}, "head_dim 7 is odd"),
        ],
    )
    def test_what_we_do_not_run(self, folder, changes, said):
        self.change_config(folder, **changes)
        assert said in self.refusal(folder)

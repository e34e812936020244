"""A folder for vLLM's own DeciLM class, which does not run here: what it reads, and what its arithmetic gives with that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import AutoConfig, dynamic_module_utils
from typer.testing import CliRunner

import slimtune
from cuts import UNEVEN, Kept, cut_model, logits_of, sample_ids
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import deci, verify
from slimtune.export.gguf_layout import Widths
from slimtune.export.huggingface import save
from slimtune.models.deci import DeciConfig

run = CliRunner().invoke
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
# of 4, 3 and 2 groups of two query heads the second needs a fourth, for 3 does not divide 8; the third has four heads for each
LADDER: Kept = (
    {"kv_group": [0, 1, 2, 3], "ffn": range(40)},
    {"kv_group": [0, 1, 3], "ffn": range(50)},
    {"kv_group": [0, 2], "ffn": range(96)},
)
DROPPED: Kept = ({"kv_group": [0, 1, 3], "ffn": range(50)}, {"kv_group": [], "ffn": []}, {"kv_group": [2], "ffn": range(7)})

CASES: dict[str, tuple[str, Kept, dict[str, Any], list[tuple[int, int, int]]]] = {
    "llama": ("llama", UNEVEN, {}, [(4, 1, 40), (4, 2, 33), (4, 1, 96)]),
    "biases everywhere": ("llama-bias", UNEVEN, {}, [(4, 1, 40), (4, 2, 33), (4, 1, 96)]),
    "tied, padded KV": ("llama-tied", LADDER, EIGHT, [(8, 4, 40), (8, 4, 50), (8, 2, 96)]),
    "no window, six heads": ("mistral", DROPPED, {**EIGHT, "sliding_window": None}, [(6, 3, 50), (6, 1, 7)]),
    "biases of q, k, v": ("qwen2", UNEVEN, {"head_dim": None}, [(4, 1, 40), (4, 2, 33), (4, 1, 96)]),
}


def written(folder: Path, name: str, kept: Kept | None, **overrides: Any) -> Any:
    model, plan = cut_model(name, kept, **overrides)
    save(model, None, plan, folder, torch.float32, {})
    return model


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions, halves of a head side by side: [heads, T, d]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


class Reference:
    """What vLLM 0.33's ``nemotron_nas.py`` computes, from what it reads of config.json and the weights' names."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.used = set[str]()

    def get(self, name: str, there: bool, shape: tuple[int, ...]) -> Tensor | None:
        """A parameter that vLLM makes of ``shape`` where ``there``, and fills from the file."""
        if not there:
            return None
        self.used.add(name)
        assert self.weights[name].shape == shape, name
        return self.weights[name]

    def linear(self, x: Tensor, name: str, out: int, bias: bool) -> Tensor:
        weight = self.get(f"{name}.weight", True, (out, x.shape[-1]))
        return linear(x, weight, self.get(f"{name}.bias", bias, (out,)))  # type: ignore[arg-type]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.get(f"{name}.weight", True, (self.config["hidden_size"],))
        return normed(x, weight, self.config["rms_norm_eps"])  # type: ignore[arg-type]

    def attention(self, x: Tensor, name: str, block: dict[str, Any]) -> Tensor:
        heads, size = self.config["num_attention_heads"], self.config["head_dim"]
        kv_heads = heads // block["attention"]["n_heads_in_group"]
        bias = self.config["attention_bias"]
        qkv = self.config.get("qkv_bias", bias)
        parts = {
            part: self.linear(x, f"{name}.{part}_proj", count * size, qkv).view(-1, count, size).transpose(0, 1)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        }
        theta = self.config["rope_parameters"]["rope_theta"]
        q, k = turned(parts["q"], theta), turned(parts["k"], theta)
        mixed = scaled_dot_product_attention(
            q, k.repeat_interleave(heads // kv_heads, 0), parts["v"].repeat_interleave(heads // kv_heads, 0), is_causal=True
        )
        return self.linear(mixed.transpose(0, 1).flatten(1), f"{name}.o_proj", self.config["hidden_size"], bias)

    def mlp(self, x: Tensor, name: str, block: dict[str, Any]) -> Tensor:
        assert self.config["hidden_act"] == "silu"
        assert "ffn_mult" not in block["ffn"]  # it would be rounded to 256
        width, bias = block["ffn"]["intermediate_size"], self.config["mlp_bias"]
        gate, up = (self.linear(x, f"{name}.{part}_proj", width, bias) for part in ("gate", "up"))
        return self.linear(silu(gate) * up, f"{name}.down_proj", self.config["hidden_size"], bias)

    def logits(self, ids: Tensor) -> Tensor:
        """[T] -> [T, V]."""
        words = (self.config["vocab_size"], self.config["hidden_size"])
        x = self.get("model.embed_tokens.weight", True, words)[ids]  # type: ignore[index]
        assert len(self.config["block_configs"]) == self.config["num_hidden_layers"]
        for index, block in enumerate(self.config["block_configs"]):
            assert not block["attention"]["no_op"]
            assert not block["ffn"]["no_op"]
            name = f"model.layers.{index}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", block)
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp", block)
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return linear(self.norm(x, "model.norm"), self.get(head, True, words))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kept", "overrides", "widths"), CASES.values(), ids=CASES)
def test_vllms_arithmetic_on_the_written_folder_gives_the_models_logits(
    tmp_path: Path, name: str, kept: Kept, overrides: dict[str, Any], widths: list[tuple[int, int, int]]
) -> None:
    model = written(tmp_path / "model", name, kept, **overrides)
    found = slimtune.export_model(tmp_path, "vllm", form="deci", check=False)
    reference = Reference(Path(found["file"]))
    heads = reference.config["num_attention_heads"]
    blocks = [
        (each["attention"]["n_heads_in_group"], each["ffn"]["intermediate_size"]) for each in reference.config["block_configs"]
    ]
    assert [(heads, heads // group, mlp) for group, mlp in blocks] == widths
    for row in sample_ids():
        assert (reference.logits(row) - logits_of(model, row[None])[0]).abs().max() <= 1e-5
    assert reference.used == set(reference.weights)
    assert found["parameters"] == sum(each.numel() for each in reference.weights.values()) > found["parameters_before"]
    assert reference.config["architectures"] == ["DeciLMForCausalLM"]
    assert reference.config["model_type"] == "nemotron-nas"
    assert reference.config["sliding_window"] is None
    assert "layer_types" not in reference.config


def test_the_fewest_heads_that_do() -> None:
    def heads(*groups: int, per_group: int = 1) -> list[tuple[int, int]]:
        found = deci.widths_for([Widths(kv * per_group, kv, 9) for kv in groups])
        return [(each.heads, each.kv_heads) for each in found]

    assert heads(8, 4, 1, per_group=4) == [(32, 8), (32, 4), (32, 1)]
    assert heads(8, 5, per_group=4) == [(32, 8), (32, 8)]
    # one query head more for every layer spares most of them the KV heads that 31, a prime, would need
    assert heads(31, 16, 16, 16) == [(32, 32), (32, 16), (32, 16), (32, 16)]
    assert deci.widths_for([Widths(4, 2, 0)]) == [Widths(4, 2, 1)]


def test_a_fresh_process_loads_it_and_verify_takes_it(warm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "subprocess", warm)
    written(tmp_path / "model", "llama-bias", UNEVEN)
    done = run(app, ["export", str(tmp_path), "--to", "vllm", "--form", "deci"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "64 of 64 next tokens as in the model's folder, logits within" in told
    assert "8,256 of them are zeros; without them 70,866" in told
    target = tmp_path / "model-vllm-deci"
    assert f"not run here; vllm serve {target} --trust-remote-code" in told
    card = (target / "README.md").read_text()
    assert "every layer has 4 query heads, and zeros stand for those" in card
    assert "vllm serve folder --trust-remote-code" in card
    found = slimtune.verify_export(target)
    assert found["ok"]
    assert (found["class"], found["tokens_same"], found["tokens"]) == ("DeciLMForCausalLM", 64, 64)
    with pytest.raises(UserError, match=r"model_type 'nemotron-nas' is unknown"):
        slimtune.export_model(target, "hf", out=tmp_path / "back")


def test_the_config_class_in_the_folder_is_what_vllm_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM 0.33 reads: of the config ``architectures``, ``model_type`` (which convertor), ``num_hidden_layers``,
    ``hidden_size``, ``vocab_size``, ``head_dim``, ``num_attention_heads`` (by which tensor parallelism must divide),
    ``max_position_embeddings``, ``rms_norm_eps``, ``hidden_act``, ``rope_parameters``, ``tie_word_embeddings``, ``dtype``,
    ``attention_bias`` (of o), ``qkv_bias``, ``mlp_bias``, no ``bias``, ``logit_scale``, ``layer_types``,
    ``position_embedding_type``; of every block, as attributes, ``attention.no_op``, ``attention.n_heads_in_group``,
    ``ffn.no_op``, ``ffn.intermediate_size``, no ``ffn.ffn_mult``, ``ffn.hidden_act``, ``block_type``.
    """
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    written(tmp_path / "model", "qwen2", UNEVEN)
    slimtune.export_model(tmp_path, "vllm", form="deci", quantize="bf16", check=False)
    target = tmp_path / "model-vllm-deci-bf16"
    config = AutoConfig.from_pretrained(target, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules.")
    assert (config.architectures, config.model_type) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, config.head_dim) == (3, 64, 97, 16)
    assert (config.num_attention_heads, config.max_position_embeddings, config.hidden_act) == (4, 128, "silu")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert (config.tie_word_embeddings, config.dtype, config.rms_norm_eps) == (False, torch.bfloat16, 1e-6)
    assert (config.attention_bias, config.qkv_bias, config.mlp_bias) == (False, True, False)
    for absent in ("bias", "logit_scale", "layer_types", "position_embedding_type", "quantization_config"):
        assert not hasattr(config, absent)
    assert config.get_text_config() is config
    assert not config.is_heterogeneous
    kv_heads = [config.num_attention_heads // block.attention.n_heads_in_group for block in config.block_configs]
    assert kv_heads == [1, 2, 1]
    assert [block.ffn.intermediate_size for block in config.block_configs] == [40, 33, 96]
    for block in config.block_configs:
        assert (block.attention.no_op, block.ffn.no_op) == (False, False)
        assert not hasattr(block, "block_type")
        assert set(block.ffn) == {"no_op", "intermediate_size"}
        assert not hasattr(block.ffn, "ffn_mult")
    config.save_pretrained(tmp_path / "two")
    for file in ("config.json", "modeling_slimtune_deci.py"):
        assert (tmp_path / "two" / file).read_bytes() == (target / file).read_bytes()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms of heads": ("qwen3", {}, "--form deci is for the blocks of llama, mistral, qwen2; this is a 'qwen3'"),
    "scaled": ("granite", {}, "this is a 'granite': leave out --form deci: vLLM's Transformers backend reads this model too"),
    "windows": ("mistral", {}, "--form deci has no sliding windows, and this model has sliding_window=16"),
    "activation": (
        "llama",
        {"hidden_act": "gelu"},
        "vLLM computes these blocks with silu, and this model has hidden_act='gelu'",
    ),
}


@pytest.mark.parametrize(("name", "overrides", "told"), REFUSED.values(), ids=REFUSED)
def test_what_its_class_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, overrides: dict[str, Any], told: str
) -> None:
    written(tmp_path / "model", name, UNEVEN, **overrides)
    with pytest.raises(UserError) as caught:
        slimtune.export_model(tmp_path, "vllm", form="deci")
    assert told in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_window_longer_than_every_text_is_none(tmp_path: Path) -> None:
    written(tmp_path / "model", "mistral", UNEVEN, sliding_window=128)
    assert slimtune.export_model(tmp_path, "vllm", form="deci", check=False)["class"] == "DeciLMForCausalLM"


def test_absent_parts_are_not_computed_as_if_they_were_there() -> None:
    from slimtune.models.deci import DeciLMForCausalLM

    block = {"attention": {"no_op": True}, "ffn": {"no_op": False, "intermediate_size": 8}}
    keys = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 8}
    with pytest.raises(ValueError, match="layer 0: no_op is not supported"):
        DeciLMForCausalLM(DeciConfig(block_configs=[block], **keys, num_key_value_heads=2))

"""GGUF files of models with experts, run in llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cuts import generate, logits_of
from mixtures import write_sparse
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import gguf, gguf_compared
from slimtune.export.gguf_run import run

PROMPTS = [[433, 1639, 5509, 260, 1516, 278], [19, 77, 1200], list(range(100, 190))]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "top-2, GQA, heads of 24": {},
    "top-1 of 8, tied": {"num_local_experts": 8, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    "top-4 of 22, heads of the width's share": {"num_local_experts": 22, "num_experts_per_tok": 4, "head_dim": None},
    "experts of 8, one KV head": {"intermediate_size": 8, "num_key_value_heads": 1},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 4},
    "linear, one expert": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    },
}


def differences(model: Any, file: Path) -> list[float]:
    """The largest of log-probabilities of the first token, by prompt."""
    found = []
    for prompt, logprobs in zip(PROMPTS, run(file, PROMPTS, tokens=1, top=6144).logprobs, strict=True):
        expected = logits_of(model, torch.tensor([prompt]))[0, -1].log_softmax(-1)
        assert len(logprobs) == 6144
        found.append(max(abs(expected[token].item() - value) for token, value in logprobs.items()))
    return found


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared, GQA, tied": ("glm4_moe", {"tie_word_embeddings": True}),
    "shared, biases": ("glm4_moe", {"attention_bias": True, "num_key_value_heads": 4, "num_experts_per_tok": 1}),
    "shared, norms on heads": ("dots1", {"num_key_value_heads": 4}),
    "shared, norms on heads, GQA, tied": ("dots1", {"tie_word_embeddings": True, "n_shared_experts": 1}),
    "norms on heads": ("qwen3_moe", {}),
    "norms on heads, tied, one KV head": ("qwen3_moe", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
"""Of other classes."""
ARCHS = {"mixtral": "llama", "glm4_moe": "glm4moe", "dots1": "glm4moe", "qwen3_moe": "qwen3moe"}


@pytest.mark.parametrize(
    ("model_type", "keys"), [*(("mixtral", keys) for keys in CASES.values()), *OTHERS.values()], ids=[*CASES, *OTHERS]
)
def test_llama_cpp_computes_what_torch_does(tmp_path: Path, model_type: str, keys: dict[str, Any]) -> None:
    model = write_sparse(tmp_path / "model", model_type, **keys)
    written = gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    assert (written["architecture"], written["kind"], written["kept"]) == (ARCHS[model_type], "f32", {})
    assert max(differences(model, tmp_path / "model.gguf")) < 1e-4
    tokens = run(tmp_path / "model.gguf", PROMPTS, tokens=12).tokens
    assert tokens == [generate(model, torch.tensor([prompt]))[0] for prompt in PROMPTS]


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model", sliding_window=16)
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert (told["llama.expert_count"], told["llama.expert_used_count"]) == (5, 2)
    assert (told["llama.feed_forward_length"], told["llama.attention.key_length"]) == (96, 24)
    assert told["llama.context_length"] == 16  # within the window nothing differs
    shapes = {tensor.name: tuple(int(each) for each in reversed(tensor.shape)) for tensor in reader.tensors}
    experts = {f"blk.1.ffn_{kind}_exps.weight": shapes[f"blk.1.ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down")}
    assert list(experts.values()) == [(5, 96, 64), (5, 96, 64), (5, 64, 96)]
    assert shapes["blk.1.ffn_gate_inp.weight"] == (5, 64)
    assert "blk.1.ffn_gate.weight" not in shapes


@pytest.mark.parametrize(("kind", "alike"), [("f16", 0.9999), ("bf16", 0.999), ("q8_0", 0.99), ("q4_1", 0.85)])
def test_weights_in_fewer_bits(tmp_path: Path, kind: str, alike: float) -> None:
    """Routers stay whole, rows of 24 numbers fit no block of 32. Words whose choice tips over cost more than the rounding."""
    model = write_sparse(tmp_path / "model", intermediate_size=24)
    written = gguf.write(tmp_path / "model", tmp_path / "model.gguf", kind)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    block = "f16" if kind.startswith("q") else kind
    found = [kinds[f"blk.0.ffn_{name}.weight"] for name in ("gate_inp", "gate_exps", "up_exps", "down_exps")]
    assert found == ["f32", kind, kind, block]
    assert written["kept"] == ({f"blk.{layer}.ffn_down_exps.weight": "f16" for layer in (0, 1)} if block != kind else {})
    for prompt, logprobs in zip(PROMPTS, run(tmp_path / "model.gguf", PROMPTS, tokens=1, top=6144).logprobs, strict=True):
        expected = logits_of(model, torch.tensor([prompt]))[0, -1].log_softmax(-1)
        there = torch.tensor([logprobs[token] for token in range(6144)])
        assert torch.corrcoef(torch.stack([expected, there]))[0, 1] > alike


def test_one_tensor_of_experts_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are read after it was written, and none twice in one pass."""
    write_sparse(tmp_path / "model")
    stacked = list[int]()
    plain = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: stacked.append(len(parts)) or plain(parts))
    seen = list[int]()
    encoded = gguf._encoded
    monkeypatch.setattr(gguf, "_encoded", lambda tensor, kind: seen.append(len(stacked)) or encoded(tensor, kind))
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    assert stacked == [5] * 12  # three in each of two layers, told and then written
    assert sorted(set(seen)) == list(range(6, 13))


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_of_fewer_bits_the_refusal_tells_what_else_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A word that rounding sends to another expert is far off, in a file that is the model's all the same."""
    write_sparse(tmp_path / "model")
    figures = {"tokens_same": 9, "tokens": 96, "logprob_difference": 2.5, "logprob_mean": 0.39, "load_s": 0.1, "texts": []}
    monkeypatch.setattr(gguf_compared, "compared", lambda folder, file: figures)
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--to", "gguf", "-q", kind])
    assert done.exit_code == 2
    told = " ".join(done.stderr.split())
    assert "llama.cpp computes other figures than torch" in told
    assert ("rounded to bf16 a word that lies between two experts may go to the other one" in told) == (kind == "bf16")


def test_more_experts_than_llama_cpp_takes_are_told_in_its_words(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model", num_local_experts=1100, intermediate_size=8, num_hidden_layers=1)
    gguf.write(tmp_path / "model", tmp_path / "x.gguf", "q8_0")
    with pytest.raises(
        UserError, match=r"llama.cpp does not run .*GGML_ASSERT\(hparams.n_expert <= LLAMA_MAX_EXPERTS\) failed$"
    ):
        run(tmp_path / "x.gguf", PROMPTS[:1], tokens=1)


def test_export_and_verify(tmp_path: Path) -> None:
    """Through the commands, which run the file; a file whose experts changed places is another model's."""
    write_sparse(tmp_path / "model")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--to", "gguf"])
    assert done.exit_code == 0, done.output
    assert "96 of 96 greedy tokens as in torch" in done.stdout
    file = str(tmp_path / "model.gguf")
    done = CliRunner().invoke(app, ["verify", file, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["logprob_difference"] < 1e-4
    weights = load_file(tmp_path / "model" / "model.safetensors")
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in (0, 1)]
    weights |= {names[0]: weights[names[1]], names[1]: weights[names[0]]}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert CliRunner().invoke(app, ["verify", file]).exit_code == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "act": ({"hidden_act": "gelu"}, r"hidden_act='gelu': llama.cpp computes these blocks with silu; use the model's folder"),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}},
        r"rope_type 'yarn' is not written to GGUF yet",
    ),
    "none chosen": ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0 of num_local_experts=5: no model runs so"),
    "too many chosen": ({"num_experts_per_tok": 6}, r"num_experts_per_tok=6 of num_local_experts=5: no model runs so"),
    "more in the config": ({"num_local_experts": 6}, r"lack the tensor 'model.layers.0.block_sparse_moe.experts.5.w1.weight'"),
    "more in the files": ({"num_local_experts": 4}, r"no place for 'model.layers.0.block_sparse_moe.experts.4.w1.weight'"),
}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
OTHERS_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "weights of all": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        r"norm_topk_prob=False: GGUF of qwen3_moe is written .*True",
    ),
    "a dense layer": (
        "glm4_moe",
        {"first_k_dense_replace": 1},
        r"first_k_dense_replace=1: GGUF of glm4_moe is written .*0",
    ),
    "groups": ("dots1", {"n_group": 5}, r"n_group=5: GGUF of dots1 is written for n_group=1 alone; use the model's folder"),
    "long context": ("glm4_moe", {"rope_parameters": LLAMA3}, r"'glm4moe' has no place for it; convert with moe.shared=false"),
    "long context, norms": ("qwen3_moe", {"rope_parameters": LLAMA3}, r"'qwen3moe' has no place for it; use the model's"),
    "half a head": ("glm4_moe", {"rope_parameters": HALF}, r"partial_rotary_factor=0.5: llama.cpp turns whole heads"),
    "too many chosen": ("dots1", {"num_experts_per_tok": 6}, r"num_experts_per_tok=6 of n_routed_experts=5: no model runs so"),
    "no number": ("dots1", {"n_shared_experts": None}, r"config.json has no n_shared_experts, a number that models of type"),
    "long context, biases": (
        "glm4_moe",
        {"rope_parameters": LLAMA3, "attention_bias": True},
        r"'glm4moe' has no place for it; use the model's",
    ),
    "half of it weighed": ("qwen2_moe", {"norm_topk_prob": False}, r"model_type 'qwen2_moe' yet .* a glm4_moe of Qwen2 with"),
    "one more": ("glm4_moe", {"n_shared_experts": 0}, r"no place for 'model.layers.0.mlp.shared_experts.down_proj.weight'"),
    "unweighed": ("qwen2_moe", {}, r"model_type 'qwen2_moe' yet .* convert makes a glm4_moe of Qwen2 with moe\.shared=true"),
}


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [*(("mixtral", *case) for case in REFUSED.values()), *OTHERS_REFUSED.values()],
    ids=[*REFUSED, *(f"others: {name}" for name in OTHERS_REFUSED)],
)
def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path, model_type: str, keys: dict[str, Any], reason: str) -> None:
    write_sparse(tmp_path / "model", model_type)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(UserError, match=reason):
        gguf.write(tmp_path / "model", tmp_path / "x.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_what_stands_in_a_file_with_a_shared_expert(tmp_path: Path) -> None:
    """The choice has a bias and the weights a factor; the shared expert is as wide as two."""
    model = write_sparse(tmp_path / "model", "glm4_moe")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    reader = GGUFReader(tmp_path / "model.gguf")
    told = {name.removeprefix("glm4moe."): field.contents() for name, field in reader.fields.items()}
    assert {name: told[name] for name in told if name.startswith("expert_")} == {
        "expert_count": 5,
        "expert_used_count": 2,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 96,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.0,
        "expert_gating_func": 2,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(each) for each in reversed(tensor.shape)) for name, tensor in tensors.items()}
    assert (shapes["blk.1.ffn_up_shexp.weight"], shapes["blk.1.ffn_down_shexp.weight"]) == ((192, 64), (64, 192))
    assert shapes["blk.1.ffn_gate_exps.weight"] == (5, 96, 64)
    assert [tensors[f"blk.1.{name}"].tensor_type.name for name in ("ffn_gate_inp.weight", "exp_probs_b.bias")] == ["F32", "F32"]
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(torch.from_numpy(tensors["blk.1.exp_probs_b.bias"].data.copy()), bias)


def test_a_bias_that_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model", "dots1", attention_bias=True)
    with pytest.raises(UserError, match=r"no biases in 'glm4moe', and this model has 'model.layers.0.self_attn.o_proj.bias'"):
        gguf.write(tmp_path / "model", tmp_path / "x.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_the_context_is_bounded_by_windows_that_some_layer_has(tmp_path: Path) -> None:
    for name, kind, bound in (("all", "full_attention", 128), ("few", "sliding_attention", 16)):
        write_sparse(tmp_path / name, "dots1", sliding_window=16, layer_types=["full_attention", kind], max_window_layers=1)
        gguf.write(tmp_path / name, tmp_path / f"{name}.gguf")
        told = GGUFReader(tmp_path / f"{name}.gguf").get_field("glm4moe.context_length")
        assert told is not None
        assert told.contents() == bound

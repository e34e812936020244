"""GGUF files run in llama.cpp itself."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cuts import UNEVEN, Kept, even, generate, logits_of, write_folder
from slimtune.errors import UserError
from slimtune.export import gguf
from slimtune.export.gguf_run import run
from slimtune.export.huggingface import save
from slimtune.models.surgery import cut
from slimtune.sections import ModelConfig
from slimtune.structure.families import describe
from slimtune.structure.plan import Plan

BUILTIN = Path(str(files("slimtune"))) / "assets" / "base-10m"
PROMPTS = [[433, 1639, 5509, 260, 1516, 278], [19, 77, 1200]]


CASES = {
    "llama-whole": ("llama", None, "llama"),
    "llama-even": ("llama", even([1], 64), "llama"),
    "llama-uneven": ("llama", UNEVEN, "deci"),
    "mistral-uneven": ("mistral", UNEVEN, "deci"),
    "qwen2-even": ("qwen2", even([0], 40), "deci"),
    "qwen2-mlp": ("qwen2", even([0, 1], 40), "qwen2"),
    "llama-bias": ("llama-bias", UNEVEN, "deci"),
    "qwen2-uneven": ("qwen2", UNEVEN, "deci"),
    "qwen3-even": ("qwen3", even([0], 40), "qwen3"),
    "qwen3-uneven": ("qwen3", UNEVEN, "openelm"),
}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXTRA: dict[str, dict[str, Any]] = {"llama-bias": {"mlp_bias": False}, "mistral": {"sliding_window": None}}


@pytest.mark.parametrize(("name", "kept", "arch"), CASES.values(), ids=CASES)
def test_llama_cpp_computes_what_torch_does(tmp_path: Path, name: str, kept: Kept | None, arch: str) -> None:
    extra = {"tie_word_embeddings": arch == "openelm", "attention_bias": False} if name == "qwen3" else EXTRA.get(name, {})
    model = write_folder(tmp_path / "model", name, kept, **extra)
    file = tmp_path / "model.gguf"
    written = gguf.write(tmp_path / "model", file)
    assert (written["architecture"], written["kind"]) == (arch, "f32")
    ran = run(file, PROMPTS, tokens=12, top=6144)
    for prompt, tokens, found in zip(PROMPTS, ran.tokens, ran.logprobs, strict=True):
        ids = torch.tensor([prompt])
        assert tokens == generate(model, ids)[0]
        expected = logits_of(model, ids)[0, -1].log_softmax(-1)
        assert len(found) == 6144
        assert max(abs(expected[token].item() - value) for token, value in found.items()) < 1e-4


REFUSED = {
    "qwen3-untied": (
        "qwen3",
        {"attention_bias": False},
        r"no architecture for 'qwen3' with widths by layer.*budget.layout=uniform",
    ),
    "qwen3-bias": (
        "qwen3",
        {"tie_word_embeddings": True},
        r"no biases in 'openelm', and this model has 'model.layers.0.self_attn",
    ),
    "mlp-bias": ("llama-bias", {}, r"'deci' has no place for 'model.layers.0.mlp.down_proj.bias'"),
    "act": (
        "llama",
        {"hidden_act": "gelu"},
        r"hidden_act='gelu': llama.cpp computes these blocks with silu; use the model's folder",
    ),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}},
        r"rope_type 'yarn' is not written to GGUF yet \(default, linear and llama3 are\)",
    ),
    "gemma": (
        "gemma",
        {},
        r"GGUF is not written for model_type 'gemma' yet \(for llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, .* it is\)",
    ),
}


@pytest.mark.parametrize(("name", "extra", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path, name: str, extra: dict[str, Any], reason: str) -> None:
    write_folder(tmp_path / "model", name, UNEVEN, **extra)
    with pytest.raises(UserError, match=reason):
        gguf.write(tmp_path / "model", tmp_path / "x.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}], ids=["llama3", "linear"])
def test_positions_are_scaled_as_in_torch(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = write_folder(tmp_path / "model", "llama", UNEVEN, rope_parameters=rope, max_position_embeddings=128)
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    long = [int(token) for token in torch.randint(10, 6000, (90,), generator=torch.Generator().manual_seed(0))]
    found = run(tmp_path / "model.gguf", [long], tokens=1, top=6144).logprobs[0]
    expected = logits_of(model, torch.tensor([long]))[0, -1].log_softmax(-1)
    assert max(abs(expected[token].item() - value) for token, value in found.items()) < 1e-4


def test_a_window_of_attention_bounds_the_context(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "mistral", UNEVEN)
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["deci.context_length"].contents() == 16


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_weights_in_fewer_bits(tmp_path: Path, kind: str) -> None:
    """Rows of 33 numbers fit no block of 32, and stay in 16 bits."""
    model = write_folder(tmp_path / "model", "llama", UNEVEN)
    written = gguf.write(tmp_path / "model", tmp_path / "model.gguf", kind)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    block = "f16" if kind.startswith("q") else kind
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.ffn_down.weight"]) == (kind, block)
    assert (kinds["output_norm.weight"], kinds["token_embd.weight"]) == ("f32", "q8_0" if kind.startswith("q") else kind)
    assert set(written["kept"].values()) == ({"f16"} if kind.startswith("q") else set())
    assert "blk.1.ffn_down.weight" in written["kept"] or not kind.startswith("q")
    expected = logits_of(model, torch.tensor(PROMPTS[:1]))[0, -1].log_softmax(-1)
    found = run(tmp_path / "model.gguf", PROMPTS[:1], tokens=1, top=6144).logprobs[0]
    alike = torch.corrcoef(torch.stack([expected, torch.tensor([found[token] for token in range(6144)])]))[0, 1]
    assert alike > {"f16": 0.9999, "bf16": 0.999, "q8_0": 0.999}.get(kind, 0.98 if "5" in kind else 0.94)


def test_kinds_that_are_not_written() -> None:
    with pytest.raises(
        UserError, match=r"K- and I-quants are made by llama.cpp alone.*llama-quantize MODEL.gguf OUT.gguf Q4_K_M"
    ):
        gguf.check_kind("q4_k_m")
    with pytest.raises(UserError, match=r"--quantize q8 is not known. Did you mean 'q8_0'\?"):
        gguf.check_kind("q8")


@pytest.mark.parametrize("bare", [(0, "self_attn"), (1, "mlp"), (2, "mlp"), (2, "self_attn")])
def test_a_layer_without_attention_or_without_mlp(tmp_path: Path, bare: tuple[int, str]) -> None:
    """The head size is layer 0's in llama.cpp, and a layer of MLP width 0 loses its attention or ends the process."""
    layer, part = bare
    model = write_folder(tmp_path / "model", "llama", UNEVEN)
    linear = {"self_attn": "o_proj", "mlp": "down_proj"}[part]
    with torch.no_grad():
        model.get_submodule(f"model.layers.{layer}.{part}.{linear}").weight.zero_()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    rest = {name: value for name, value in weights.items() if not name.startswith(f"model.layers.{layer}.{part}.")}
    save_file(rest, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    absent = {"self_attn": ("num_attention_heads", "num_key_value_heads"), "mlp": ("intermediate_size",)}[part]
    (own,) = [value for key, value in config["per_layer_config"].items() if int(key) == layer]
    own |= dict.fromkeys(absent, 0)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    ran = run(tmp_path / "model.gguf", PROMPTS, tokens=12)
    assert ran.tokens == [generate(model, torch.tensor([prompt]))[0] for prompt in PROMPTS]


TEXTS = (
    "The function returns a list of tuples, e.g. [(1, 'a'), (22, \"b\")].",
    "  Zwei  Leerzeichen,\ttabs\n\n\nund Zeilen;  don't we'll I'VE",
    "naïve café — 日本語のテキスト 12345678 ½ ٣٤ 🙂👩‍🔬 Привет",
    "x_1 = foo.bar(baz)  # comment\n    return {'k': [0x1F, 1e-5]}\n",
)


@pytest.mark.parametrize("base", ["builtin", "shared"])
def test_a_real_model_goes_on_as_in_torch(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """64 greedy tokens in f32 after texts that llama.cpp splits into tokens itself: each the likeliest after all before it."""
    folder = BUILTIN if base == "builtin" else request.getfixturevalue("shared_data") / "models" / "base-44m"
    gguf.write(folder, tmp_path / "model.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ran = run(tmp_path / "model.gguf", TEXTS, tokens=64)
    for text, tokens, read in zip(TEXTS, ran.tokens, ran.read, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert read == ids.shape[1]
        assert len(tokens) == 64
        with torch.no_grad():  # one pass over what was written says what 64 by generate would
            logits = model(torch.cat([ids, torch.tensor([tokens])], 1)).logits[0, ids.shape[1] - 1 : -1]
        logits[:, model.generation_config.eos_token_id] = float("-inf")  # no end before it
        assert tokens == logits.argmax(-1).tolist()


def test_perplexity_of_a_cut_model_in_eight_bits(tmp_path: Path) -> None:
    """Of 60 tokens of text, each after all before it, within 1% of torch's in f32; widths by layer, all in blocks of 32."""
    model = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    structure = describe(model.config.to_dict(), {key: tuple(each.shape) for key, each in model.named_parameters()})
    groups = [range(5), range(4), range(5), range(1, 5), range(5), range(3), range(5)]
    plan = Plan.of(structure, [{"kv_group": kept, "ffn": range(864 - 32 * row)} for row, kept in enumerate(groups)])
    cut(model, structure, plan)
    save(model, ModelConfig(path=str(BUILTIN)), plan, tmp_path / "model", torch.float32, {})
    text = (
        "Return a new list with the items of the iterable in order. If no key function is given, items are compared directly. "
    )
    ids = AutoTokenizer.from_pretrained(BUILTIN)(text * 4)["input_ids"][:61]
    written = gguf.write(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    assert (written["architecture"], written["kept"]) == ("deci", {})
    found = run(tmp_path / "model.gguf", [ids[:end] for end in range(1, 61)], tokens=1, top=60).logprobs
    rare = [end for end in range(60) if ids[end + 1] not in found[end]]  # all 6144 of every token would take long
    rest = run(tmp_path / "model.gguf", [ids[: end + 1] for end in rare], tokens=1, top=6144).logprobs
    found = [dict(zip(rare, rest, strict=True)).get(end, likeliest) for end, likeliest in enumerate(found)]
    theirs = -sum(logprobs[after] for logprobs, after in zip(found, ids[1:], strict=True)) / 60
    ours = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert math.exp(theirs) == pytest.approx(math.exp(ours), rel=0.01)

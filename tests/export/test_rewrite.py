"""Folders written anew for transformers and vLLM. Who loads them elsewhere: test_deci.py and e2e/test_targets.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import slimtune
from cuts import UNEVEN, Kept, cut_model, even, logits_of, reference_logits, sample_ids, write_folder
from families import FAMILY_NAMES
from mixtures import write_sparse
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import record, rewrite
from slimtune.export.huggingface import save
from slimtune.structure.plan import Plan

run = CliRunner().invoke
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
THREE: Kept = ({"kv_group": [0, 1, 3], "ffn": range(50)}, {"kv_group": [], "ffn": []}, {"kv_group": [2], "ffn": range(96)})
"""Six query heads at most, which do not divide the width; the second layer goes as a whole."""


def written(folder: Path, name: str, kept: Kept | None, **overrides: Any) -> tuple[Any, Plan]:
    """A tiny model and its plan, the model saved as ``folder``."""
    model, plan = cut_model(name, kept, **overrides)
    facts = {"base": "org/base", "figures": {"this model": {"perplexity": 9.5}}, "reload_difference": 2.5e-7}
    save(model, None, plan, folder, torch.float32, facts)
    return model, plan


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def in_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison without its fresh process: for what is told and recorded, not for who loads."""

    def reloaded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        logits = logits_of(loaded(folder), tensors["input_ids"])
        same = logits.argmax(-1) == tensors["expected"].argmax(-1)
        difference = (logits - tensors["expected"]).abs().max().item()
        return {"difference": difference, "same": int(same.sum()), "places": same.numel(), "load_s": 0.1}

    monkeypatch.setattr(rewrite, "reloaded", reloaded)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_zeros_make_widths_equal_and_change_no_logit(name: str, tmp_path: Path) -> None:
    model, _ = written(tmp_path / "model", name, UNEVEN, **({"qk_layernorm": True} if name == "phi" else {}))
    found = slimtune.export_model(tmp_path, "hf-uniform", check=False)
    target = tmp_path / "model-hf-uniform"
    assert found["file"] == str(target)
    again, config = loaded(target), config_of(target)
    assert type(again).__module__.startswith("transformers.")
    widths = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
    assert widths.items() <= config.items()
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not list(target.glob("*.py"))
    assert (logits_of(again, sample_ids()) - logits_of(model, sample_ids())).abs().max() <= 1e-5
    assert found["parameters"] == sum(each.numel() for each in again.parameters())
    assert found["parameters_before"] == sum(each.numel() for each in model.parameters()) < found["parameters"]
    zeros = sum(int((each == 0).sum()) for each in again.parameters()) - sum(
        int((each == 0).sum()) for each in model.parameters()
    )
    assert zeros == found["parameters"] - found["parameters_before"]


@pytest.mark.parametrize(("to", "kind"), [("hf", "bf16"), ("vllm", "f32"), ("hf-uniform", "")])
def test_experts_are_written_as_published_files_name_them(to: str, kind: str, tmp_path: Path, in_here: None) -> None:
    """One by one, and not as transformers has them in memory: other readers, vLLM and ours for GGUF, know no other names."""
    model = write_sparse(tmp_path / "model")
    found = slimtune.export_model(tmp_path / "model", to, quantize=kind)
    count = sum(each.numel() for each in model.parameters())
    assert (found["class"], found["parameters"], found["parameters_before"]) == ("MixtralForCausalLM", count, count)
    given, there = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", Path(found["file"])))
    assert "model.layers.1.block_sparse_moe.experts.4.w3.weight" in there
    assert there.keys() == given.keys()
    assert all(tensor.equal(given[name].to(rewrite.KINDS[found["kind"]])) for name, tensor in there.items())


# 64 is no multiple of six heads, which some stock configs refuse
@pytest.mark.parametrize(
    ("name", "expected", "heads"),
    [
        ("llama", "mistral", 6),
        ("llama-bias", "llama", 8),
        ("qwen3", "qwen3", 6),
        ("gemma2", "gemma2", 8),
        ("gemma3_text", "gemma3_text", 8),
    ],
)
def test_where_a_stock_class_refuses_the_heads_there_are_more_of_zeros(
    name: str, expected: str, heads: int, tmp_path: Path
) -> None:
    model, plan = written(tmp_path / "model", name, THREE, **WIDE)
    slimtune.export_model(tmp_path, "hf-uniform", check=False)
    config = config_of(tmp_path / "model-hf-uniform")
    assert (config["model_type"], config["num_attention_heads"], config["num_hidden_layers"]) == (expected, heads, 2)
    assert Plan.from_json((tmp_path / "model-hf-uniform" / "plan.json").read_text()) == plan
    again = loaded(tmp_path / "model-hf-uniform")
    assert (logits_of(again, sample_ids()) - logits_of(model, sample_ids())).abs().max() <= 1e-5


def test_equal_widths_that_no_stock_class_takes_are_padded_too(tmp_path: Path) -> None:
    model, _ = written(tmp_path / "model", "gemma2", even([0, 1, 3], 40), **WIDE)
    assert config_of(tmp_path / "model")["model_type"] == "slimtune_gemma2"
    slimtune.export_model(tmp_path, "hf-uniform", check=False)
    again = loaded(tmp_path / "model-hf-uniform")
    assert (again.config.model_type, again.config.num_attention_heads, again.config.intermediate_size) == ("gemma2", 8, 40)
    assert (logits_of(again, sample_ids()) - logits_of(model, sample_ids())).abs().max() <= 1e-5


def test_a_base_of_too_few_heads_for_any_stock_class_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model", "gemma2", even([0, 1, 3], 40), **WIDE)
    config = config_of(tmp_path / "model")
    config |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no stock class of 'gemma2' takes .*; use --to hf"):
        slimtune.export_model(tmp_path, "hf-uniform", check=False)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("in_here")
@pytest.mark.parametrize(("name", "kept"), [("gemma2", UNEVEN), ("qwen2", even([1], 40)), ("llama-tied", None)])
def test_the_same_class_in_another_type(name: str, kept: Kept | None, tmp_path: Path) -> None:
    model, _ = written(tmp_path / "model", name, kept)
    (tmp_path / "model" / "tokenizer.json").write_bytes(b'{"odd":  1}\r\n')
    found = slimtune.export_model(tmp_path, "hf", quantize="BF16")
    target = tmp_path / "model-hf-bf16"
    assert found["logit_difference"] <= found["limit"]
    assert found["tokens_same"] == found["tokens"] == 64
    with safe_open(target / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(each).dtype for each in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    before, after = config_of(tmp_path / "model"), config_of(target)
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == {"dtype"}
    rounded = reference_logits(model, sample_ids(), torch.bfloat16)
    assert (logits_of(loaded(target), sample_ids()) - rounded).abs().max() <= 1e-5
    assert (logits_of(model, sample_ids()) - rounded).abs().max() > 1e-4  # rounding is visible here
    for file in ("tokenizer.json", "plan.json", "generation_config.json"):
        assert (target / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    code = {each.name for each in (tmp_path / "model").glob("*.py")}
    assert {each.name for each in target.glob("*.py")} == code
    assert found["remote_code"] == bool(code)
    # what was recorded is what the model computes
    kept_record = record.read(target)
    assert kept_record
    best = reference_logits(model, torch.tensor([kept_record.input_ids]), torch.bfloat16)[0].log_softmax(-1).max(-1)
    assert best.indices.tolist() == kept_record.tokens
    assert best.values.tolist() == pytest.approx(kept_record.logprobs, abs=1e-4)
    assert slimtune.export_model(target, "hf", check=False, out=tmp_path / "again")["kind"] == "bf16"  # as they are
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    assert record.read(tmp_path / "again") is None


def test_what_vllms_transformers_backend_reads_is_there(tmp_path: Path) -> None:
    """vLLM 0.33: ``auto_map`` (AutoConfig first, then both model classes), ``is_heterogeneous`` and the widths of every layer
    in ``per_layer_config``; it builds ``AutoModel`` and gives each layer an attention of that layer's heads, by the attention
    interface, which every layer must go through.
    """
    seen: list[tuple[int, int, int]] = []

    def probe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
        seen.append((module.layer_idx, query.shape[1], key.shape[1]))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("slimtune_probe", probe)
    for name in ("llama", "phi", "gemma3_text"):
        written(tmp_path / name, name, UNEVEN)
        found = slimtune.export_model(tmp_path / name, "vllm", check=False)
        target = Path(found["file"])
        assert target.name == f"{name}-vllm"
        assert list(config_of(target)["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
        config = AutoConfig.from_pretrained(target)
        assert config.is_heterogeneous
        assert config.architectures == [found["class"]]
        wanted = [(i, own.num_attention_heads, own.num_key_value_heads) for i, own in enumerate(config.per_layer_config)]
        assert wanted == [(0, 2, 1), (1, 4, 2), (2, 2, 1)]
        assert {own.head_dim for own in config.per_layer_config} == {16}
        model = AutoModel.from_config(config, attn_implementation="slimtune_probe")
        assert model.is_backend_compatible()
        assert model.tp_plan
        seen.clear()
        with torch.no_grad():
            model(sample_ids(), use_cache=False)
        assert seen == wanted


def test_vllms_own_parsing(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.transformers_utils import model_arch_config_convertor as convertors
    from vllm.transformers_utils.config import get_config

    written(tmp_path / "model", "llama", UNEVEN)
    expected = {"transformers": [(2, 1), (4, 2), (2, 1)], "deci": [(4, 1), (4, 1), (4, 1)]}  # of deci the first layer's
    for form, heads in expected.items():
        target = slimtune.export_model(tmp_path, "vllm", form=form, check=False)["file"]
        config = get_config(target, trust_remote_code=True)
        kind = convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, convertors.ModelArchConfigConvertorBase)
        found = kind(config, config.get_text_config()).convert()
        layers = [found[index] for index in range(3)]
        assert [(each.total_num_attention_heads, each.total_num_kv_heads) for each in layers] == heads
        assert found.head_size == 16


@pytest.mark.usefixtures("in_here")
def test_what_padding_costs_is_told(tmp_path: Path) -> None:
    written(tmp_path / "model", "llama", UNEVEN)
    done = run(app, ["export", str(tmp_path), "--to", "hf-uniform"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "LlamaForCausalLM, 105,024 parameters" in told
    assert "35,136 of them are zeros; without them 69,888; a run with budget.layout=uniform has equal widths" in told
    assert "64 of 64 next tokens as in the model's folder" in told
    card = (tmp_path / "model-hf-uniform" / "README.md").read_text()
    assert "| parameters after | 105,024 (35,136 of them zeros, for layers that are narrower than others) |" in card
    assert "A stock transformers class (`LlamaForCausalLM`) holds this model" in card
    assert "modeling_slimtune" not in card
    assert "vllm" not in card
    assert "it gives the same widths, without the zeros." in card
    assert "| perplexity | 9.5 |" in card
    assert "2.5e-07 |\n" in (tmp_path / "model" / "README.md").read_text()
    assert "after a reload" not in card  # that was of the source's files
    assert card.count("\n## ") == (tmp_path / "model" / "README.md").read_text().count("\n## ")
    done = run(app, ["export", str(tmp_path), "--to", "vllm", "--no-check", "--json", "-q", "f16"])
    assert json.loads(done.stdout)["kind"] == "f16"
    card = (tmp_path / "model-vllm-f16" / "README.md").read_text()
    assert "| weights | float16 |" in card
    assert "vllm serve folder --trust-remote-code" in card
    done = run(app, ["export", str(tmp_path / "model-hf-uniform"), "--to", "vllm", "--no-check", "--out", str(tmp_path / "v")])
    assert f"not run here; vllm serve {tmp_path / 'v'}\n" in done.stdout
    assert "zeros" not in done.stdout


def test_a_card_of_others_is_not_taken_over(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "llama", None)
    (tmp_path / "theirs" / "plan.json").unlink()
    (tmp_path / "theirs" / "README.md").write_text("# Their model\n\nLoad it with their program.\n")
    slimtune.export_model(tmp_path / "theirs", "hf", check=False)
    card = (tmp_path / "theirs-hf" / "README.md").read_text()
    assert "Written by slimtune" in card
    assert "from theirs" in card
    assert str(tmp_path) not in card
    assert "their program" not in card
    assert "plan.json" not in card
    assert "| weights | float32 |" in card
    assert "| parameters | 105,024 |" in card


@pytest.mark.usefixtures("in_here")
def test_what_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "model", "llama", UNEVEN)
    written(tmp_path / "model-hf", "qwen2", None)
    before = (tmp_path / "model-hf" / "config.json").read_bytes()
    monkeypatch.setattr(rewrite, "LIMIT", -1.0)
    with pytest.raises(UserError, match=r"computes other figures than .*; nothing was written: use the model's folder"):
        slimtune.export_model(tmp_path, "hf")
    assert (tmp_path / "model-hf" / "config.json").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "model-hf"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "model", "llama", UNEVEN)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("precious")
    return folder


BAD = {
    "target": (
        "{run} --to hf-unifrom",
        "--to 'hf-unifrom' is not known. Did you mean 'hf-uniform'? Targets: hf, hf-uniform, gguf",
    ),
    "kind": (
        "{run} --to hf -q fp16",
        "--quantize fp16 is not for --to hf. Did you mean 'f16'? Kinds: f32, f16, bf16 (fewer bits",
    ),
    "kind of a file": ("{run} --to vllm -q q8_0", "--quantize q8_0 is not for --to vllm. Kinds: f32, f16, bf16"),
    "onnx": ("{run} --to onnx -q f16", "--quantize f16 is not for --to onnx, which is written in fp32: leave it out"),
    "form": ("{run} --to vllm --form decilm", "--form 'decilm' is not known. Did you mean 'deci'? Forms: transformers, deci"),
    "form of another": ("{run} --to hf --form deci", "--form deci is for --to vllm; leave it out"),
    "itself": ("{run} --to hf --out {run}/model", "is the model's own folder; name another"),
    "files": ("{run} --to hf --out {run}/notes", "holds other files than a model (no config.json) and is not replaced"),
    "package": ("builtin:base-10m --to vllm", "lies in the package; say where it goes: --out model-vllm"),
    "nothing": ("{run}/nowhere --to hf", "does not exist; give a model folder"),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_bad_words_are_told_in_one_line(tuned: Path, words: str, told: str) -> None:
    done = run(app, ["export", *words.replace("{run}", str(tuned)).split()])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(each.name for each in tuned.iterdir()) == ["model", "notes"]


def test_weights_that_cannot_be_written_so(tmp_path: Path) -> None:
    written(tmp_path / "model", "llama", UNEVEN)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 1e6}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"--quantize f16: 'model.norm.weight' has values that f16 does not hold; choose bf16"):
        slimtune.export_model(tmp_path, "hf", quantize="f16")
    assert slimtune.export_model(tmp_path, "hf", quantize="bf16", check=False)["kind"] == "bf16"
    config = {**config_of(tmp_path / "model"), "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds quantised weights .*; give the original ones"):
        slimtune.export_model(tmp_path, "hf")

"""The per-layer classes: exact, cache-safe, trainable, and whole after another save, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils

from cuts import UNEVEN, cut_model, generate, logits_of, sample_ids
from families import FAMILY_NAMES, tiny_config
from slimtune.models import per_layer
from slimtune.structure.families import FAMILIES

WIDTHS = {
    "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40},
    "2": {"intermediate_size": 33},
}


def narrow_model(name: str, attention: str | None = None, **overrides: Any) -> Any:
    keys = tiny_config(name, **overrides).to_dict()
    config = per_layer.CONFIGS[keys.pop("model_type")](**keys, per_layer_config=WIDTHS)
    per_layer.register()
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def load_cut(name: str, **overrides: Any) -> tuple[Any, Any]:
    """A cut stock model, and the per-layer model with its tensors."""
    model, plan = cut_model(name, UNEVEN, **overrides)
    keys = model.config.to_dict()
    widths = {str(layer): plan.widths(layer) for layer in range(len(plan.kept))}
    config = per_layer.CONFIGS[keys.pop("model_type")](**keys, per_layer_config=widths)
    per_layer.register()
    loaded = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation).eval()
    loaded.load_state_dict(model.state_dict())
    return model, loaded


def test_every_family_of_the_table_has_its_classes() -> None:
    assert set(per_layer.CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_logits_and_greedy_tokens_equal_the_cut_model(name: str) -> None:
    model, loaded = load_cut(name)
    ids = sample_ids(rows=4)
    assert (logits_of(model, ids) - logits_of(loaded, ids)).abs().max() <= 1e-5
    expected = generate(model, ids, use_cache=False)
    assert len({token for row in expected for token in row}) > 2
    assert generate(loaded, ids, use_cache=False) == expected
    assert generate(loaded, ids) == expected
    assert generate(loaded, ids, cache_implementation="static") == expected


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_save_pretrained_round_trip_keeps_widths_code_and_all_auto_classes(name: str, tmp_path: Path) -> None:
    model = narrow_model(name)
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    stem = type(model).__name__.removesuffix("ForCausalLM")
    assert config["auto_map"] == {
        "AutoConfig": f"modeling_slimtune.{stem}Config",
        "AutoModel": f"modeling_slimtune.{stem}Model",
        "AutoModelForCausalLM": f"modeling_slimtune.{stem}ForCausalLM",
    }
    assert {int(layer): widths for layer, widths in config["per_layer_config"].items()} == {
        int(layer): widths for layer, widths in WIDTHS.items()
    }
    assert config["head_dim"] == 16
    code = (tmp_path / "two" / "modeling_slimtune.py").read_bytes()
    assert code == Path(per_layer.__file__).read_bytes()
    assert torch.equal(logits_of(again, sample_ids()), logits_of(model, sample_ids()))
    assert type(again).__module__ == "slimtune.models.per_layer"


def test_the_copied_code_makes_the_same_model_and_saves_itself_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = narrow_model("qwen3")
    model.save_pretrained(tmp_path / "one")
    name = "modeling_slimtune.SlimtuneQwen3ForCausalLM"
    remote = dynamic_module_utils.get_class_from_dynamic_module(name, str(tmp_path / "one"))
    assert remote.__module__.startswith("transformers_modules.")
    assert remote.config_class.__module__ == remote.__module__
    remote.register_for_auto_class("AutoModelForCausalLM")  # as AutoModelForCausalLM does after such a load
    loaded = remote.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(logits_of(loaded, sample_ids()), logits_of(model, sample_ids()))
    for file in ("config.json", "modeling_slimtune.py"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )


def test_only_model_type_and_class_names_differ_from_the_stock_config() -> None:
    stock = tiny_config("llama").to_dict()
    ours = narrow_model("llama").config.to_dict()
    changed = {key for key in {*stock, *ours} if stock.get(key) != ours.get(key)}
    assert changed == {"model_type", "per_layer_config"}


def test_the_global_widths_can_be_read_and_are_those_before_the_cut() -> None:
    config = narrow_model("llama").config
    assert (config.num_attention_heads, config.intermediate_size) == (4, 96)
    assert {"num_attention_heads", "intermediate_size"} <= set(config)
    assert [own.intermediate_size for own in config.per_layer_config] == [40, 96, 33]


def test_auto_model_gives_the_base_model(tmp_path: Path) -> None:
    model = narrow_model("llama-tied")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is per_layer.SlimtuneLlamaModel  # type: ignore[attr-defined]
    hidden = base(sample_ids()).last_hidden_state
    assert torch.equal(hidden, model.model(sample_ids()).last_hidden_state)


def test_new_weights_are_drawn_once_at_the_configured_scale() -> None:
    model = narrow_model("qwen2", initializer_range=0.5)
    for layer in model.model.layers:
        assert 0.4 < layer.self_attn.q_proj.weight.std() < 0.6
        assert 0.4 < layer.mlp.down_proj.weight.std() < 0.6
        assert not layer.self_attn.q_proj.bias.any()


@pytest.mark.parametrize("name", ["phi", "gemma3_text"])
def test_head_norms_keep_the_size_of_a_head(name: str) -> None:
    extra = {"qk_layernorm": True} if name == "phi" else {}
    model, loaded = load_cut(name, **extra)
    assert (logits_of(model, sample_ids()) - logits_of(loaded, sample_ids())).abs().max() <= 1e-5


@pytest.mark.parametrize("change", [("eager", "sdpa"), ("sdpa", "eager")])
def test_attention_implementation_can_be_changed_later(change: tuple[str, str]) -> None:
    model = narrow_model("llama", attention=change[0])
    assert model.config._attn_implementation == change[0]
    before = logits_of(model, sample_ids())
    model.set_attn_implementation(change[1])
    assert (logits_of(model, sample_ids()) - before).abs().max() <= 1e-5
    assert model._supports_attention_backend


@pytest.mark.parametrize("name", ["llama-bias", "phi"])
def test_lora_on_all_linears_trains_and_merges_under_checkpointing(name: str) -> None:
    model = narrow_model(name)
    ids = sample_ids()
    plain = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        plain.train()
        plain.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in plain.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 3 * (7 if name == "llama-bias" else 6)
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key
    plain.eval()
    tuned = logits_of(plain, ids)
    assert (logits_of(plain.merge_and_unload(), ids) - tuned).abs().max() <= 1e-4


def test_skipped_sub_blocks_are_refused_not_ignored() -> None:
    keys = tiny_config("llama").to_dict()
    keys.pop("model_type")
    config = per_layer.CONFIGS["llama"](**keys, per_layer_config={"0": {"skip": ["mlp"]}})
    with pytest.raises(ValueError, match="skip"):
        AutoModelForCausalLM.from_config(config)


def test_register_can_be_called_again() -> None:
    per_layer.register()
    per_layer.register()
    assert isinstance(AutoConfig.for_model("slimtune_llama"), per_layer.CONFIGS["llama"])

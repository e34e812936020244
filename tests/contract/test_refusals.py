"""What cannot be cut is refused before anything is built, with the reason or the list; a Plan survives its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from families import FAMILY_NAMES, tiny_config
from gated import random_model, random_plan
from slimtune.errors import UserError
from slimtune.models.load import load_config, meta_shapes, structure_of
from slimtune.models.selfcheck import self_check
from slimtune.models.surgery import cut
from slimtune.sections import ModelConfig
from slimtune.structure.axes import measure
from slimtune.structure.families import FAMILIES, REFUSED, describe, family_of
from slimtune.structure.plan import Plan


def folder_with(tmp_path: Path, **keys: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(keys))
    return ModelConfig(path=str(tmp_path))


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["lama", "gpt2", "made_up"])
def test_an_unknown_family_fails_with_the_list(model_type: str) -> None:
    with pytest.raises(UserError, match=f"{model_type}.*unknown") as caught:
        family_of(model_type)
    assert all(known in str(caught.value) for known in FAMILIES)
    assert ("Did you mean 'llama'" in str(caught.value)) == (model_type == "lama")


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_family_fails_with_the_reason(model_type: str) -> None:
    with pytest.raises(UserError, match="refused") as caught:
        family_of(model_type)
    assert REFUSED[model_type] in str(caught.value)
    assert model_type not in FAMILIES


@pytest.mark.parametrize("model_type", ["olmo2", "phi3", "mixtral", "gpt2"])
def test_a_config_of_another_family_is_refused_before_a_model_is_built(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(folder_with(tmp_path, model_type=model_type))
    monkeypatch.setattr("slimtune.models.load.meta_shapes", lambda config: pytest.fail("built a model"))
    with pytest.raises(UserError, match=model_type):
        structure_of(config)


def test_a_folder_of_a_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'made_up' is unknown.*llama.*granite"):
        load_config(folder_with(tmp_path, model_type="made_up"))


def test_a_folder_without_a_model_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded"):
        load_config(folder_with(tmp_path, hidden_size=8))


def test_a_folder_whose_config_needs_its_own_code(tmp_path: Path) -> None:
    model = folder_with(tmp_path, model_type="made_up", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(UserError, match="'made_up' is unknown"):
        load_config(model)


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.path=.* cannot be loaded"):
        load_config(ModelConfig(path=str(tmp_path)))


def test_an_inline_config_of_an_unknown_model_type() -> None:
    with pytest.raises(UserError, match=r"'made_up' is unknown.*llama"):
        load_config(ModelConfig(init="config", config={"model_type": "made_up"}))


def test_an_exported_folder_is_not_cut_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="slimtune_llama"):
        structure_of(AutoConfig.for_model("slimtune_llama"))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_quantised_weights_are_refused(name: str) -> None:
    config = tiny_config(name)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match="quantised weights cannot be cut"):
        structure_of(config)
    with pytest.raises(UserError, match="quantised weights cannot be cut"):
        self_check(config)


# --- shapes ----------------------------------------------------------------------------------------------------------


def _shapes(name: str = "llama") -> dict[str, tuple[int, ...]]:
    return meta_shapes(tiny_config(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda shapes: shapes.update({"model.layers.1.mlp.extra.weight": (4, 64)}),
            r"layer 1.*not in the table.*extra",
        ),
        (lambda shapes: shapes.pop("model.layers.2.mlp.up_proj.weight"), r"layer 2.*missing.*up_proj"),
        (lambda shapes: shapes.update({"model.layers.0.mlp.up_proj.weight": (95, 64)}), r"layer 0.*95 rows.*96"),
        (lambda shapes: shapes.update({"model.layers.0.self_attn.o_proj.weight": (64, 48)}), r"48 columns.*2 x 32"),
        (lambda shapes: [shapes.pop(key) for key in list(shapes) if "layers" in key], "no decoder blocks"),
    ],
)
def test_shapes_that_do_not_match_the_table(change: Callable[[Any], Any], message: str) -> None:
    shapes = _shapes()
    assert measure(FAMILIES["llama"], shapes, 16).group == 2
    change(shapes)
    with pytest.raises(UserError, match=message):
        measure(FAMILIES["llama"], shapes, 16)


def test_a_layer_with_other_head_groups_is_refused() -> None:
    shapes = _shapes()
    for path, shape in {"q_proj": (32, 64), "o_proj": (64, 32)}.items():
        shapes[f"model.layers.0.self_attn.{path}.weight"] = shape
    with pytest.raises(UserError, match="layer 0"):
        measure(FAMILIES["llama"], shapes, 16)


def test_layers_may_differ_in_width() -> None:
    shapes = _shapes()
    for path, shape in {"gate_proj": (40, 64), "up_proj": (40, 64), "down_proj": (64, 40)}.items():
        shapes[f"model.layers.1.mlp.{path}.weight"] = shape
    structure = measure(FAMILIES["llama"], shapes, 16)
    assert [layer.units["ffn"] for layer in structure.layers] == [96, 40, 96]
    assert [layer.unit_params["ffn"] for layer in structure.layers] == [192] * 3


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_describe_agrees_with_a_model_with_weights(name: str) -> None:
    model, structure = random_model(name)
    assert describe(model.config.to_dict(), meta_shapes(model.config)) == structure


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_plan_survives_its_file(name: str) -> None:
    _, structure = random_model(name)
    plan = Plan.of(structure, random_plan(structure, 3).kept, seed=3, base="tiny")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.digest, again.to_json()) == (plan.digest, plan.to_json())
    assert again.digest == random_plan(structure, 3).digest, "notes are not part of the decision"
    assert again.digest != random_plan(structure, 4).digest
    again.check(structure)


def test_wide_axes_are_bits_in_the_file() -> None:
    full, kept = {"kv_group": 2, "ffn": 1001}, tuple(range(0, 1001, 3))
    plan = Plan("llama", 2, (full,) * 32, ({"kv_group": (1,), "ffn": kept},) * 32)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert len(text) < 10_000
    raw = json.loads(text)
    assert raw["plan"]["kept"][0]["kv_group"] == [1]
    raw["plan"]["kept"] = [{"kv_group": [1], "ffn": list(kept)}] * 32  # as they were written before
    assert Plan.from_json(json.dumps({**raw, "version": 1})) == plan
    raw["plan"]["kept"][0]["ffn"] = "no base64"
    with pytest.raises(UserError, match=r"not a plan\.json"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"plan": 1}', '{"plan": {"model_type": "llama", "group": 2, "full": [1], "kept": [1]}}'],
)
def test_a_file_that_is_no_plan(text: str) -> None:
    with pytest.raises(UserError, match=r"not a plan\.json"):
        Plan.from_json(text)


@pytest.mark.parametrize("change", [{"full": [1, 2, 3]}, {"kept": [{"kv_group": [[0]], "ffn": [0]}]}, {"group": "two"}])
def test_a_plan_of_the_wrong_form(change: dict[str, Any]) -> None:
    raw = json.loads(random_plan(random_model("llama")[1], 0).to_json())
    raw["plan"].update(change)
    with pytest.raises(UserError, match=r"plan\.json"):
        Plan.from_json(json.dumps(raw))


def test_a_plan_changed_by_hand() -> None:
    raw = json.loads(random_plan(random_model("llama")[1], 0).to_json())
    raw["plan"]["kept"][0]["ffn"].append(95)
    with pytest.raises(UserError, match="changed by hand"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("units", [[], [0, 0], [-1, 2], [96]], ids=["empty", "repeats", "negative", "too large"])
def test_a_plan_that_leaves_the_axis(units: list[int]) -> None:
    _, structure = random_model("llama")
    with pytest.raises(UserError, match="layer 1 axis 'ffn'"):
        Plan.of(structure, [{"kv_group": [0], "ffn": units if layer == 1 else [5]} for layer in range(3)])


def test_a_plan_of_another_model_does_not_cut() -> None:
    model, _ = random_model("llama")
    other = random_model("llama", intermediate_size=64)[1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for plan in (random_plan(other, 0), random_plan(random_model("mistral")[1], 0)):
        with pytest.raises(UserError, match="the plan was made for"):
            cut(model, random_model("llama")[1], plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

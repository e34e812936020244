"""Runs on a base in 4 bits: what they write is made of the weights that the base has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bases import Bench, losses, metrics, plan_of, session_of
from slimtune.errors import UserError
from slimtune.export.apply import apply_plan
from slimtune.methods import atp, compensation, twostage
from slimtune.methods.compensation import Fit, fitted
from slimtune.models.load import load_config, structure_of
from slimtune.models.piecewise import cut_values
from slimtune.models.surgery import linears_of
from slimtune.models.weights import held, is_quantized
from slimtune.pipeline import Run, tune
from slimtune.prune.budget import masks_of
from slimtune.prune.gates import Site
from slimtune.runtime import RunFolder

STILL = 1e-30
"""A learning rate that changes nothing: of LoRA's product with such a B no bit shows in a weight."""


def quantized(bench: Bench, out: Path, model: dict[str, Any] | None = None, **overrides: Any) -> Any:
    given = {"recover__quantize": True, **overrides}
    return bench.recipe(out, model={"path": bench.base, "quantize": "nf4", **(model or {})}, **given)


def written(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def base_of(bench: Bench, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(bench.base, dtype=dtype)


def expected_of(bench: Bench, out: Path, dtype: str, changed: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The base in ``dtype`` with some weights ``changed``, cut by the run's Plan; in fp32, as it is written."""
    model = base_of(bench, dtype)
    for name, value in (changed or {}).items():
        model.get_parameter(name).data.copy_(value)
    return {name: value.float() for name, value in cut_values(model, structure_of(model.config), plan_of(out))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "how",
    [
        {"compensate__weights": "none", "model": {"dtype": "bfloat16"}},
        {"compensate__weights": "none", "search__update": "joint"},
        {"compensate__weights": "none", "lora__semantics": "lora_aware", "lora__settle": 0.5},
        {"compensate__weights": "none", "generator__prior": "mixed", "evaluate__dense_lora": True, "recover__quantize": False},
        {"method": "twostage", "twostage__scores": "magnitude"},
        {"method": "twostage", "twostage__scores": "layer_drop"},
        {"method": "finetune"},
    ],
)
def test_without_learning_the_written_weights_are_those_of_the_base(bench: Bench, tmp_path: Path, how: dict[str, Any]) -> None:
    dtype = how.get("model", {}).get("dtype", "float32")
    tune(quantized(bench, tmp_path, train__lr=STILL, **how))
    assert_equal(written(tmp_path), expected_of(bench, tmp_path, dtype))


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> dict[Site, Tensor]:
    """Fills with the whole second moments that a run compensates by."""
    found: dict[Site, Tensor] = {}
    real = compensation.Compensation.__init__

    def init(self: Any, model: Any, structure: Any, given: Any, fit: Fit, place: Any) -> None:
        found.update({site: each.whole(each.half).clone() for site, each in given.items()})
        real(self, model, structure, given, fit, place)

    monkeypatch.setattr(compensation.Compensation, "__init__", init)
    return found


@pytest.mark.parametrize(
    "how",
    [
        {"compensate__weights": "adapt", "model": {"dtype": "bfloat16"}},
        {"compensate__weights": "decide", "distill__weight": 0.5, "distill__recover": True, "recover__quantize": False},
        {"method": "twostage", "twostage__scores": "generator"},
        {"method": "twostage", "twostage__scores": "wanda", "twostage__least_squares": True, "recover__quantize": False},
    ],
)
def test_consumers_compensate_from_the_weights_of_the_base(
    bench: Bench, tmp_path: Path, moments: dict[Site, Tensor], how: dict[str, Any]
) -> None:
    dtype = how.get("model", {}).get("dtype", "float32")
    recipe = quantized(bench, tmp_path, train__lr=STILL, **how)
    tune(recipe)
    model, structure = base_of(bench, dtype), structure_of(load_config(recipe.model))
    masks, changed = masks_of(plan_of(tmp_path), torch.device("cpu")), {}
    for layer, axis in structure.sites():
        row = structure.family.consumer(axis)
        name = f"model.layers.{layer}.{row.path}.weight"
        assert row.into is not None
        original, site = model.get_parameter(name).detach(), (layer, axis)
        fit = Fit(recipe.compensate.damping, judge=False)
        changed[name] = fitted(structure, row.into, masks[site], moments[site], original, fit)[0]
    assert_equal(written(tmp_path), expected_of(bench, tmp_path, dtype, changed))
    assert any(not torch.equal(value, model.get_parameter(name)) for name, value in changed.items())


def test_biases_compensate_from_the_weights_of_the_base(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means, real = dict[Site, Tensor](), twostage.compensate

    def compensate(model: Any, structure: Any, plan: Any, given: dict[Site, Tensor]) -> None:
        means.update(given)
        real(model, structure, plan, given)

    monkeypatch.setattr(twostage, "compensate", compensate)
    recipe = quantized(bench, tmp_path, train__lr=STILL, method="twostage", twostage__scores="flap")
    tune(recipe)
    found, model, structure = written(tmp_path), base_of(bench), structure_of(load_config(recipe.model))
    weights = expected_of(bench, tmp_path, "float32")
    assert_equal({name: found[name] for name in weights}, weights)
    masks = masks_of(plan_of(tmp_path), torch.device("cpu"))
    for layer, axis in structure.sites():
        row = structure.family.consumer(axis)
        assert row.into is not None
        gone = masks[layer, axis].repeat_interleave(structure.rows(row.into)) == 0
        original = model.get_parameter(f"model.layers.{layer}.{row.path}.weight").detach()
        expected = original[:, gone] @ means[layer, axis][gone].float()
        torch.testing.assert_close(found[f"model.layers.{layer}.{row.path}.bias"], expected)


def test_what_was_learned_is_merged_into_the_weights_of_the_base(bench: Bench, tmp_path: Path) -> None:
    how = {"compensate__weights": "decide", "distill__weight": 0.1, "distill__teacher": bench.base}
    summary = tune(quantized(bench, tmp_path / "run", **how))
    assert apply_plan(tmp_path / "run", bench.base, out=tmp_path / "again")["same"]
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), written(tmp_path / "run"))
    assert summary["result"]["ppl"] < summary["base"]["ppl"]


def test_the_run_computes_with_4_bits_and_gates_change_them(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, model={"path": bench.base, "quantize": "nf4"}, generator__prior_steps=2))
    run.compensation = atp.prepare(run.session, run.model, run.bank, run.decider, fresh=True)

    def held_now() -> list[Tensor]:
        return [
            part.clone() for _, row, module in linears_of(run.model, run.structure) for part in held(module.base_layer.weight)
        ]

    def same(one: list[Tensor], two: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    assert all(is_quantized(module.base_layer.weight) for _, _, module in linears_of(run.model, run.structure))
    run.bank.open()
    opened = held_now()
    halves = {
        site: (torch.arange(run.structure.layers[site[0]].units[site[1]]) % 2 == 0).float() for site in run.structure.sites()
    }
    run.bank.close(halves)
    closed = held_now()
    assert not same(opened, closed)
    run.bank.open()
    assert same(opened, held_now())
    run.bank.close(halves)
    assert same(closed, held_now())


def test_checkpointing_of_activations_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    found = []
    for kind in ("none", "non_reentrant", "reentrant"):
        tune(quantized(bench, tmp_path / kind, model={"checkpointing": kind}, compensate__weights="decide"))
        found.append(losses(tmp_path / kind))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("quantize", [True, "auto"])
def test_what_is_written_is_what_recovery_tuned_where_that_was_whole(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: bool | str
) -> None:
    summary = tune(quantized(bench, tmp_path, evaluate__every=4, evaluate__windows=64, recover__quantize=quantize))
    last = [row["valid_ppl"] for row in metrics(tmp_path) if "valid_ppl" in row][-1]
    assert (summary["result"]["valid_ppl"] == pytest.approx(last, rel=1e-5)) == (quantize == "auto")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"model__quantize": "int4"}, r"model.quantize='int4' is not valid: Input should be 'none' or 'nf4'"),
        ({"model__quantize": True}, r"model.quantize=True is not valid: Input should be 'none' or 'nf4'"),
        ({"model__quantise": "nf4"}, r"unknown key 'model.quantise'. Did you mean 'model.quantize'"),
        ({"quantize": "nf4"}, r"unknown key 'quantize'. Did you mean 'model.quantize'"),
        ({"train__shard": "full"}, r"model.quantize needs whole weights and does not go with train.shard=full; leave one"),
        ({"train__compile": True}, r"model.quantize=nf4 does not go with train.compile=true; leave one of them out"),
        (
            {"method": "finetune", "model__init": "config"},
            r"model.quantize=nf4 is of frozen weights, and model.init=config with method=finetune trains all .*quantize=none",
        ),
    ],
)
def test_what_does_not_go_with_it_is_told(bench: Bench, tmp_path: Path, how: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tune(bench.recipe(tmp_path, **{"model__path": bench.base, "model__quantize": "nf4", **how}))
    assert not list(tmp_path.iterdir())


def test_the_package_is_asked_for(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.models.quantized.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"model.quantize=nf4 needs the package bitsandbytes: pip install 'slimtune\[qlora\]', or"
    ):
        tune(quantized(bench, tmp_path))


def test_a_run_goes_on_as_it_began(bench: Bench, tmp_path: Path) -> None:
    tune(quantized(bench, tmp_path, method="finetune", train__steps=1))
    with pytest.raises(UserError, match=r"model.quantize is 'none' now but 'nf4'"):
        tune(bench.recipe(tmp_path, method="finetune", train__steps=1), resume=True)


def test_whether_to_recover_in_4_bits_is_decided_once_in_a_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may go on where more fits, or less."""
    recipe, found = quantized(bench, tmp_path, recover__quantize="auto"), []
    for fits, resume in ((True, False), (False, True)):
        monkeypatch.setattr("slimtune.preflight.recovers_in_4_bits", lambda *_, fits=fits: not fits)
        run = Run(recipe, RunFolder(recipe.out), resume)
        run.check()
        found.append(run.recover_in_4_bits)
    assert found == [False, False]

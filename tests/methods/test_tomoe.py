"""Whole runs that make experts: what they decide, what they write, and that they hold to what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bases import Bench, losses, made_once, metrics, plan_of, session_of
from slimtune.errors import UserError
from slimtune.export.apply import apply_plan
from slimtune.methods import tomoe
from slimtune.methods.refit import Fits
from slimtune.methods.routes import alike, starved
from slimtune.models.load import load_config, structure_of
from slimtune.pipeline import tune
from slimtune.prune.shape import active_ratio
from slimtune.prune.split import split as real
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.experts import Division
from slimtune.structure.plan import count

MOE: dict[str, Any] = {
    "method": "tomoe",
    "budget": {"keep": 0.7, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
    "moe__prior_steps": 2,
    "moe__number": 5,
    "moe__top_k": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "partition": {},
    "routed": {"moe__shared": False, "moe__number": "auto"},
    "frozen": {"moe__tune": False},
    "overlap": {"moe__experts": "overlap", "moe__number": 4, "moe__top_k": 1},
    "published": {
        "moe": {
            "experts": "overlap",
            "number": 4,
            "prior": "none",
            "groups": "all",
            "tune": False,
            "refit": False,
            "explore": 1.0,
        },
        "recover__steps": 0,
    },
    "rival": {"moe__prior": "cmoe", "moe__refit": False, "moe__groups": "all", "search__steps": 0},
}


@pytest.fixture(scope="module")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by kind, each made once: folder and summary."""
    return made_once(bench, tmp_path_factory, KINDS, **MOE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_model_is_the_one_in_memory_and_of_the_size_asked_for(runs: Any, bench: Bench, kind: str) -> None:
    out, summary = runs(kind)
    structure, plan = structure_of(load_config(bench.recipe(out).model)), plan_of(out)
    result = summary["result"]
    assert summary["reload_difference"] < 1e-4
    assert abs(result["active_ratio"] - 0.7) <= 0.03
    assert result["active_ratio"] == pytest.approx(count(structure, plan, active=True).block_ratio)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert result["parameters"] == sum(each.numel() for each in model.parameters()) == count(structure, plan).total
    assert result["class"] == type(model).__name__
    widths = {len(expert) for division in plan.experts for expert in division.routed}
    assert len(widths) == 1
    assert widths.pop() % 4 == 0
    if "overlap" not in str(KINDS[kind]):
        for each in plan.experts:  # nothing is stored twice
            assert len(each.union) == each.used(len(each.routed))
        assert result["parameters"] <= structure.total_params + 3 * 8 * structure.hidden


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_tells_where_its_tokens_went(runs: Any, kind: str) -> None:
    _, summary = runs(kind)
    assert len(summary["shares"]) == 3
    for layer in summary["shares"]:
        assert sum(layer) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["partition", "overlap", "published"])
def test_every_layer_tells_which_part_of_its_channels_is_in_some_expert(runs: Any, kind: str) -> None:
    out, summary = runs(kind)
    plan = plan_of(out)
    found = [len(set().union(each.shared, *each.routed)) / plan.full[0][FFN] for each in plan.experts]
    assert summary["coverage"] == found
    steps = [value for step in metrics(out) for key, value in step.items() if key.endswith("generator_coverage")]
    assert bool(steps) == (kind != "partition"), "where it can change"
    assert all(0.5 < part <= 1 for part in steps)


@pytest.mark.parametrize("step", [0, 9])
def test_the_budget_pulls_only_where_widths_are_free(bench: Bench, tmp_path: Path, step: int) -> None:
    """In the last fifth widths are what the Plan will have: the penalty's slope there is the same at every step, to no end."""
    changes = {**MOE, **KINDS["published"], "search__steps": 10}
    changes = {**changes, "moe": {**changes["moe"], "union": 0.0}}
    experts = tomoe._ToMoE(session_of(bench, tmp_path / "run", **changes)).experts
    sampled = experts.sample(step)
    leaves = {site: torch.zeros_like(mask, requires_grad=True) for site, mask in sampled.items()}
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    figures = experts.learn(step, sampled, [leaves])
    assert ("budget" in figures) == (step == 0), "what is not in the loss is not told"
    assert (float(figures["grad_norm"]) > 0) == (step == 0)


def test_without_validation_rows_no_shares_are_told(bench: Bench, tmp_path: Path) -> None:
    few = {"data__valid_fraction": 0.0, "evaluate__every": 0, "search__steps": 1, "recover__steps": 1}
    summary = tune(bench.recipe(tmp_path, **{**MOE, **few}))
    assert summary["rows"]["valid"] == 0
    assert "shares" not in summary
    assert summary["coverage"]


def test_experts_that_hardly_any_token_uses_are_told() -> None:
    even = [[0.25, 0.25, 0.25, 0.25]] * 2
    assert starved(even, 1) == ""
    told = starved([even[0], [0.004, 0.496, 0.4, 0.1]], 2)
    assert told.startswith("1 of 8 experts are used by less than 1% of the validation tokens: 0 of layer 1 (0.80%); raise")
    assert starved([even[0], [0.005, 0.495, 0.4, 0.1]], 2) == ""
    assert "and others" in starved([[0.0] * 4] * 2, 2)


def test_experts_that_are_one_and_the_same_are_told() -> None:
    near = Division.of([], [range(97), range(1, 98)])
    apart = Division.of([], [range(97), range(20, 117)])
    split = Division.of(range(50), [range(50, 60), range(60, 70)])
    told = alike(SimpleNamespace(experts=[near, near, apart], top_k=1))  # type: ignore[arg-type]
    assert told.startswith("in 2 of 3 layers experts are alike: one has 99% or more of the channels that all have together")
    assert alike(SimpleNamespace(experts=[apart, split], top_k=1)) == ""  # type: ignore[arg-type]


def test_a_second_run_is_the_same(runs: Any, bench: Bench, tmp_path: Path) -> None:
    out, summary = runs("partition")
    again = tune(bench.recipe(tmp_path / "again", **MOE))
    assert again["plan"] == summary["plan"]
    assert metrics(tmp_path / "again") == metrics(out)
    theirs, ours = (load_file(each / "model" / "model.safetensors") for each in (out, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_frozen_base_stays_as_it_is(runs: Any, bench: Bench) -> None:
    """The published way changes no weight: experts are slices of the base."""
    out, _ = runs("published")
    base, found = load_file(Path(bench.base) / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    plan = plan_of(out)
    for layer, division in enumerate(plan.experts):
        for expert, channels in enumerate(division.routed):
            place, mlp = f"model.layers.{layer}", f"model.layers.{layer}.mlp"
            gate, up, down = (base[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            for name, part in {"w1": gate[list(channels)], "w3": up[list(channels)], "w2": down[:, list(channels)]}.items():
                assert torch.equal(found[f"{place}.block_sparse_moe.experts.{expert}.{name}.weight"], part)
        for name in "qkvo":
            assert torch.equal(found[f"{place}.self_attn.{name}_proj.weight"], base[f"{place}.self_attn.{name}_proj.weight"])


def test_whole_kv_groups_go_where_the_budget_says_so(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path / "run", **{**MOE, "moe__groups": 1, "budget__keep": 0.5, "search__steps": 1}))
    plan = plan_of(tmp_path / "run")
    assert all(len(layer[KV_GROUP]) == 1 for layer in plan.kept)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)


def test_on_the_way_the_masks_are_at_the_present_target(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, "search__steps": 10, "search__ramp": 0.5})
    method = tomoe._ToMoE(session)
    widths = []
    for step in range(10):
        masks = method.experts.masks(step)
        widths.append({int(masks[layer, FFN][0].sum() + 2 * masks[layer, FFN][1].sum()) for layer in range(3)})
    assert all(len(each) == 1 for each in widths)
    assert [each.pop() for each in widths[5:]] == [method.experts.shape.active] * 5
    sampled = method.experts.sample(0)
    assert sampled[0, FFN].requires_grad
    assert sampled[0, FFN].sum() > method.experts.shape.active


@pytest.mark.parametrize(("steps", "expected"), [(0, [0.2]), (1, [0.2]), (3, [0.4, 0.08**0.5, 0.2])])
def test_the_decision_is_made_at_the_last_temperature(bench: Bench, tmp_path: Path, steps: int, expected: list[float]) -> None:
    method = tomoe._ToMoE(session_of(bench, tmp_path / "run", **{**MOE, "search__steps": steps}))
    found = [method.experts.temperature(step) for step in range(min(0, steps - 1), steps)]
    assert found == pytest.approx(expected)
    assert method.experts.temperature(steps - 1) == pytest.approx(0.2)


@pytest.mark.parametrize("more", [{"groups": 1}, {"attention": "pairs"}, {"attention": "tokens"}])
def test_the_published_penalty_counts_what_the_shape_counts(bench: Bench, tmp_path: Path, more: dict[str, Any]) -> None:
    moe = {"experts": "overlap", "number": 4, "prior": "none", "tune": False, "refit": False, "prior_steps": 1, **more}
    wide = {"keep": 0.7 if "groups" in more else 0.9, "of": "block", "ffn_multiple": 4, "tolerance": 0.05}
    session = session_of(bench, tmp_path / "run", method="tomoe", moe=moe, budget=wide, search__steps=10)
    method = tomoe._ToMoE(session)
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    masks = method.experts.masks(9)  # the last step: as wide as it will be
    found = method.experts._sampled_ratio(torch.stack([mask[1:].T for (_, axis), mask in masks.items() if axis == FFN]), masks)
    assert float(found) == pytest.approx(active_ratio(session.structure, method.experts.shape, "block"), rel=1e-6)


def test_padding_is_no_token_of_any_expert(bench: Bench, tmp_path: Path) -> None:
    """Neither for their balance nor for their shares."""
    method = tomoe._ToMoE(session_of(bench, tmp_path / "run", **{**MOE, "search__steps": 0}))
    router, ids = method.experts.router, torch.randint(5, 90, (2, 12))
    method.bank.close(method.experts.masks(0))
    padded, mask = torch.cat([torch.zeros(2, 20, dtype=torch.long), ids], 1), torch.ones(2, 32, dtype=torch.long)
    mask[:, :20] = 0
    found = []
    for batch in ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": padded, "attention_mask": mask}):
        router.counts, router.balance = torch.zeros(3, router.number, dtype=torch.long), 1.0
        router.zero_grad()
        method.model.train()
        method.experts.router.train()
        logits = method.model(**batch).logits
        (0.0 * logits.sum()).backward()
        found.append((router.counts, router.weights[0].grad.clone()))
    (counts, gradient), (same, again) = found
    assert torch.equal(counts, same)
    assert int(counts[0].sum()) == 2 * 12 * router.top_k
    assert gradient.abs().max() > 0
    torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_prior_keeps_as_many_tokens_whatever_the_micro_batches(
    bench: Bench, tmp_path: Path, micro: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[int]()
    monkeypatch.setattr(
        "slimtune.methods.routes.split", lambda energy, *rest: (kept.append(len(energy)), real(energy, *rest))[1]
    )
    more = {"moe__prior_tokens": 60, "search__batch": 6, "train__micro_batch": micro}
    session = session_of(bench, tmp_path / "run", **{**MOE, **more})
    method = tomoe._ToMoE(session)
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    assert kept == [60] * 3


def test_fitting_anew_brings_the_layers_nearer_to_what_they_added(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, "search__steps": 0})
    method = tomoe._ToMoE(session)
    method.tokens["prior"] += tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    batch = method.decision.at(0)[0]
    seen: dict[str, torch.Tensor] = {}
    layer = method.model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda _, __, output: seen.update(now=output))

    def output(masks: dict[Any, torch.Tensor] | None) -> torch.Tensor:
        method.bank.open() if masks is None else method.bank.close(masks)
        with torch.no_grad():
            method.model(input_ids=batch["input_ids"])
        return seen["now"].clone()

    whole = output(None)
    only = {(0, FFN): method.experts.masks(9)[0, FFN]}
    before = (output(only) - whole).norm()
    assert method.fits is not None
    assert method.fits.renew(only, method.decision, 2, 0.01) > 0
    after = (output(only) - whole).norm()
    assert after < 0.8 * before
    assert torch.equal(output(None), whole)  # with open gates it is the base, which may teach


def test_a_fit_is_of_the_base_and_not_of_the_last_fit(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, "search__steps": 0})
    method = tomoe._ToMoE(session)
    fits, masks = method.fits, method.experts.masks(9)
    assert fits is not None
    site, consumer = (0, FFN), method.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    base = consumer.weight
    fits.renew(masks, method.decision, 2, 0.01)
    first = consumer.weight
    assert not torch.equal(first, base)
    method.bank.open()
    assert consumer.weight is base
    method.bank.leaves(masks)
    assert consumer.weight is first
    fits.renew(masks, method.decision, 2, 0.01)
    torch.testing.assert_close(fits.fitted[site], first)  # the first layer's inputs are the same
    last = fits.fitted[2, FFN]
    fits.renew(masks, method.decision, 2, 0.01)
    assert (fits.fitted[2, FFN] - last).abs().max() > 0  # those of a later one are not
    stays = fits.fitted[site]
    fits.settled()
    method.bank.open()
    assert consumer.weight is stays


def test_layers_may_be_fitted_one_after_another(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their moments do not fit in memory together: later layers then read what earlier ones were fitted to."""
    found = []
    for together in (3, 1):
        monkeypatch.setattr("slimtune.methods.refit._together", lambda session, together=together: together)
        session = session_of(bench, tmp_path / str(together), **{**MOE, "search__steps": 0})
        method = tomoe._ToMoE(session)
        tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
        tokens = Fits(session, method.model, method.bank).renew(method.experts.masks(9), method.decision, 2, 0.01)
        weights = [layer.mlp.down_proj.base_layer.weight.clone() for layer in method.model.get_base_model().model.layers]
        found.append((tokens, weights))
    (tokens, at_once), (more, one_by_one) = found
    assert more == 3 * tokens
    assert torch.equal(at_once[0], one_by_one[0])
    assert not torch.equal(at_once[2], one_by_one[2])
    assert (at_once[2] - one_by_one[2]).norm() < 0.5 * at_once[2].norm()


def test_the_loss_falls(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path / "run", **{**MOE, "search__steps": 5, "recover__steps": 40, "train__lr": 1e-2}))
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.9 * sum(found[5:10])


def test_what_cannot_be_is_refused_before_anything_runs(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be met .* by experts"):
        tune(bench.recipe(tmp_path / "a", **{**MOE, "budget__keep": 0.1}))
    with pytest.raises(UserError, match=r"moe\.groups=7 is more than the 2 KV groups"):
        tune(bench.recipe(tmp_path / "b", **{**MOE, "moe__groups": 7}))
    for changes, told in (
        ({"moe__number": 3, "moe__top_k": 4}, "less than the 4 experts"),
        ({"moe__shared": False, "moe__top_k": 3}, "exact for 1, 2, 4, 8"),
        ({"moe__prior": "none", "search__steps": 0}, "nothing to decide by"),
        ({"moe__prior": "cmoe", "moe__experts": "overlap"}, r"moe\.prior=cmoe gives every channel to one expert"),
        ({"moe__tune": False, "moe__kd": 0, "moe__ce": 0}, "leaves the search nothing to learn by"),
        ({"moe__prior_tokens": 4}, r"moe\.prior_tokens=4 are too few to tell 5 experts apart"),
        ({"model": {"path": bench.base, "quantize": "nf4"}}, "does not go with method=tomoe"),
    ):
        with pytest.raises(UserError, match=told):
            tune(bench.recipe(tmp_path / "c", **{**MOE, **changes}))
    assert not (tmp_path / "a").exists()


def test_a_frozen_search_leaves_no_gradient_at_lora(bench: Bench, tmp_path: Path) -> None:
    """PEFT switches LoRA's gradients on when its base has taught; the first step of recovery would have them all."""
    session = session_of(bench, tmp_path / "run", **{**MOE, "moe__tune": False})
    method = tomoe._ToMoE(session)
    for step in range(2):
        method._decide(step)
    trained = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is None for parameter in trained)


@pytest.mark.parametrize("kind", ["partition", "overlap"])
def test_apply_rebuilds_the_model_from_plan_and_adapter(runs: Any, bench: Bench, kind: str, tmp_path: Path) -> None:
    out, _ = runs(kind)
    found = apply_plan(out / "adapter", bench.base, out=tmp_path / "again")
    assert found["same"]
    theirs, ours = (load_file(each / "model.safetensors") for each in (out / "model", tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert (out / "model" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
    with pytest.raises(UserError, match="their routers lie in its adapter"):
        apply_plan(out / "plan.json", bench.base, use_adapter=False, out=tmp_path / "no")


def test_the_base_teaches_the_recovery(bench: Bench, tmp_path: Path) -> None:
    """Not what least squares and the cut have made of it, with its gates open."""
    session = session_of(bench, tmp_path / "run", **{**MOE, "moe__groups": 1, "distill__weight": 0.5, "search__steps": 0})
    method = tomoe._ToMoE(session)
    batch = method.tuner.batches.at(0)[0]
    before = method.teacher.logits(batch)
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    method._freeze()
    method._recover(0)
    torch.testing.assert_close(method.teacher.logits(batch), before, rtol=0, atol=0)
    with torch.no_grad():
        method.bank.open()
        opened = method.model(input_ids=batch["input_ids"]).logits
    assert (opened - before).abs().max() > 0.1

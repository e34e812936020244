"""The rivals: each ends at the budget, counts its tokens, and scores as its formula says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bases import Bench, kept_as_killed, killed, losses, plan_of, session_of, stored_shapes, verify_here
from slimtune.errors import UserError
from slimtune.methods import twostage
from slimtune.methods.scores import Scorer, ranked
from slimtune.models.load import load_config, structure_of
from slimtune.models.surgery import blocks_of, linears_of
from slimtune.pipeline import tune
from slimtune.preflight import check_method
from slimtune.prune.depth import drop_layers
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import FFN, measure
from slimtune.structure.families import family_of
from slimtune.structure.plan import Plan, count

BLOCK = {
    "self_attn.q_proj.weight": (512, 512),
    "self_attn.k_proj.weight": (256, 512),
    "self_attn.v_proj.weight": (256, 512),
    "self_attn.o_proj.weight": (512, 512),
    "mlp.gate_proj.weight": (1408, 512),
    "mlp.up_proj.weight": (1408, 512),
    "mlp.down_proj.weight": (512, 1408),
    "input_layernorm.weight": (512,),
    "post_attention_layernorm.weight": (512,),
}
"""A decoder block of the shape of a 44 M model."""
SCORES = ("random", "magnitude", "taylor", "wanda", "flap", "layer_drop", "generator")


@pytest.mark.parametrize("scores", SCORES)
def test_every_rival_ends_at_the_budget(
    bench: Bench, tmp_path: Path, scores: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if scores in ("flap", "layer_drop"):  # biases, fewer layers: a fresh process must be told of them by the folder
        request.getfixturevalue("forked")
    else:
        monkeypatch.setattr("slimtune.delivery.verify", verify_here)
    recipe = bench.recipe(tmp_path, method="twostage", twostage={"scores": scores, "batches": 2}, export__verify=True)
    summary = tune(recipe)
    plan, structure = plan_of(tmp_path), structure_of(load_config(recipe.model))
    counts = count(structure, plan)
    assert abs(counts.total_ratio - recipe.budget.keep) <= recipe.budget.tolerance
    written = sum(math.prod(shape) for shape in stored_shapes(tmp_path).values())
    assert written == summary["result"]["parameters"]
    assert (written > counts.total) == (scores == "flap")  # its biases
    assert summary["reload_difference"] < 1e-4
    assert len(losses(tmp_path)) == recipe.tuning_steps
    assert math.isfinite(summary["result"]["ppl"])


@pytest.mark.parametrize("scores", SCORES)
def test_a_rival_reads_the_windows_of_atp(bench: Bench, tmp_path: Path, scores: str) -> None:
    recipe = bench.recipe(tmp_path, method="twostage", twostage={"scores": scores, "batches": 2})
    spent = recipe.tuning_steps * recipe.train.batch + recipe.scoring_windows
    assert 0 <= recipe.windows - spent < recipe.train.batch
    assert recipe.windows == (recipe.search.steps + recipe.recover.steps) * recipe.train.batch + recipe.decide_windows


def test_layer_drop_takes_whole_layers_that_change_least(bench: Bench, tmp_path: Path) -> None:
    budget = {"keep": 0.6, "of": "block", "ffn_multiple": "auto"}
    recipe = bench.recipe(tmp_path, method="twostage", twostage={"scores": "layer_drop", "batches": 2}, budget=budget)
    tune(recipe)
    plan = plan_of(tmp_path)
    assert len(plan.layers) == len(plan.kept) - 1
    narrowed = [layer for layer in plan.layers if len(plan.kept[layer]["ffn"]) < plan.full[layer]["ffn"]]
    assert len(narrowed) <= 1


def scorer_of(bench: Bench, out: Path, **overrides: Any) -> tuple[Scorer, Any]:
    session = session_of(bench, out, method="twostage", **overrides)
    run = twostage._TwoStage(session)
    return Scorer(session, run.model, run.decider), run


def weight(run: Any, layer: int, path: str) -> Tensor:
    module = blocks_of(run.model, run.structure)[layer].get_submodule(path)
    return module.base_layer.weight.detach()


def test_magnitude_is_the_sum_of_squares_of_what_a_unit_owns(bench: Bench, tmp_path: Path) -> None:
    scorer, run = scorer_of(bench, tmp_path)
    scores = scorer.magnitude()
    gate, up, down = (weight(run, 1, f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    torch.testing.assert_close(scores[1, "ffn"][5], gate[5].square().sum() + up[5].square().sum() + down[:, 5].square().sum())
    q, k, v, o = (weight(run, 1, f"self_attn.{name}_proj") for name in "qkvo")
    h = run.structure.head_dim
    mine = slice(2 * h, 4 * h)  # two query heads of the second KV group
    expected = q[mine].square().sum() + o[:, mine].square().sum() + k[h : 2 * h].square().sum() + v[h : 2 * h].square().sum()
    torch.testing.assert_close(scores[1, "kv_group"][1], expected)


def inputs_of(run: Any, layer: int, path: str, batches: int) -> Tensor:
    """Real inputs [N, D] of a linear over the decision batches, by a hook of the test's own."""
    seen: list[Tensor] = []
    module = blocks_of(run.model, run.structure)[layer].get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    found = []
    run.model.eval()
    with torch.no_grad():
        for step in range(batches):
            for part in run.decider.batches.at(step):
                seen.clear()
                run.model(**{key: value for key, value in part.items() if key != "labels"})
                real = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()
                found.append(seen[0][real & (part["input_ids"] != 1)])
    handle.remove()
    return torch.cat(found).double()


def test_wanda_weighs_columns_by_the_norm_of_their_input(bench: Bench, tmp_path: Path) -> None:
    scorer, run = scorer_of(bench, tmp_path, twostage={"scores": "wanda", "batches": 2})
    scores = scorer.wanda()
    x, w = inputs_of(run, 1, "mlp.down_proj", 2), weight(run, 1, "mlp.down_proj").double()
    torch.testing.assert_close(scores[1, "ffn"].double(), w.abs().sum(0) * x.norm(dim=0), rtol=1e-5, atol=1e-8)
    assert scorer.tokens == len(x)


def test_flap_scores_the_fluctuation_and_compensates_with_the_mean(bench: Bench, tmp_path: Path) -> None:
    scorer, run = scorer_of(bench, tmp_path, twostage={"scores": "flap", "batches": 2})
    scores = scorer.flap()
    x, w = inputs_of(run, 2, "self_attn.o_proj", 2), weight(run, 2, "self_attn.o_proj").double()
    entries = (w.square().sum(0) * x.var(0, correction=0)).square()  # in attention squared once more, as in the authors' code
    expected = ((entries - entries.mean()) / entries.std()).view(2, -1).mean(1)
    torch.testing.assert_close(scores[2, "kv_group"].double(), expected, rtol=1e-4, atol=1e-4)
    x, w = inputs_of(run, 2, "mlp.down_proj", 2), weight(run, 2, "mlp.down_proj").double()
    entries = w.square().sum(0) * x.var(0, correction=0)
    expected = (entries - entries.mean()) / entries.std()
    torch.testing.assert_close(scores[2, "ffn"].double(), expected, rtol=1e-4, atol=1e-4)
    x, w = inputs_of(run, 2, "self_attn.o_proj", 2), weight(run, 2, "self_attn.o_proj").double()
    kept = [{"kv_group": [0], "ffn": range(64)} for _ in run.structure.layers]
    run.plan, run.means = Plan.of(run.structure, kept), dict(scorer.means)
    run._cut()
    bias = blocks_of(run.model, run.structure)[2].self_attn.o_proj.base_layer.bias
    half = w.shape[1] // 2
    torch.testing.assert_close(bias.double(), w[:, half:] @ x.mean(0)[half:], rtol=1e-4, atol=1e-6)
    assert not bias.requires_grad


def test_compensation_changes_the_model_and_not_the_plan(bench: Bench, tmp_path: Path) -> None:
    values = {}
    for compensate in (True, False):
        twostage_ = {"scores": "flap", "batches": 4, "compensate": compensate}
        recipe = bench.recipe(
            tmp_path / str(compensate),
            method="twostage",
            twostage=twostage_,
            search__steps=0,
            recover__steps=0,
            generator__prior="taylor",
            evaluate__windows=1000,
        )
        values[compensate] = tune(recipe)
    assert values[True]["result"]["parameters"] > values[False]["result"]["parameters"]
    assert values[True]["plan"] == values[False]["plan"]
    assert values[True]["result"]["loss"] != values[False]["result"]["loss"]


def test_influence_is_one_minus_the_cosine(bench: Bench, tmp_path: Path) -> None:
    scorer, run = scorer_of(bench, tmp_path, twostage={"scores": "layer_drop", "batches": 1})
    block = blocks_of(run.model, run.structure)[1]
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            block.get_submodule(name).base_layer.weight.zero_()
    influence = scorer.influence()
    assert influence[1] == pytest.approx(0.0, abs=1e-6)
    assert min(influence[0], influence[2]) > 1e-3


def test_ranking_by_layer_keeps_equal_shares_and_the_others_do_not(bench: Bench, tmp_path: Path) -> None:
    scores = {(layer, axis): torch.rand(n) * 10.0**layer for layer in range(3) for axis, n in (("kv_group", 2), ("ffn", 96))}
    found = {}
    for ranking in ("layer", "axis", "global"):
        session = session_of(bench, tmp_path / ranking, method="twostage", twostage={"scores": "taylor", "ranking": ranking})
        logits = ranked(scores, session)
        found[ranking] = [int((logits[layer, "ffn"] > logits[1, "ffn"].median()).sum()) for layer in range(3)]
    assert max(found["layer"]) - min(found["layer"]) <= 1
    for ranking in ("axis", "global"):
        assert found[ranking][0] < 10
        assert found[ranking][2] > 86


@pytest.mark.parametrize(
    ("scores", "stop", "extra"),
    [
        ("wanda", "recover", {}),
        ("wanda", "recover", {"twostage__least_squares": True, "twostage__refit_rounds": 2}),
        ("generator", "recover", {}),
        ("generator", "recover", {"compensate__weights": "decide"}),
        ("generator", "decide", {"generator__prior": "wanda", "search__decide_every": 2, "evaluate__every": 2}),
        ("generator", "decide", {"compensate__weights": "none", "evaluate__every": 2}),
        ("generator", "recover", {"twostage__least_squares": True}),
    ],
)
def test_a_resumed_rival_ends_where_an_uninterrupted_one_does(
    bench: Bench, tmp_path: Path, scores: str, stop: str, extra: dict[str, Any]
) -> None:
    def recipe(name: str) -> Any:
        common = {"twostage__scores": scores, "twostage__batches": 2, "generator__prior_steps": 2, "search__steps": 6}
        return bench.recipe(tmp_path / name, method="twostage", train__checkpoint_every=2, **common, **extra)

    place = ("main", stop, 2)
    with kept_as_killed([place]):
        whole = tune(recipe("whole"))
    out = tmp_path / "part"
    killed(tmp_path / "whole", *place).rename(out)
    resumed = tune(recipe("part"), resume=True)
    assert resumed["resumed"]
    assert resumed["tokens"] == whole["tokens"]
    assert losses(out) == losses(tmp_path / "whole")
    assert plan_of(out).digest == plan_of(tmp_path / "whole").digest


@pytest.mark.parametrize("scores", ["taylor", "generator"])
def test_what_is_not_tuned_is_decided_and_fitted_alone(bench: Bench, tmp_path: Path, scores: str) -> None:
    keys = {"twostage__scores": scores, "twostage__batches": 2, "twostage__tune": False}
    recipe = bench.recipe(tmp_path, method="twostage", **keys)
    assert recipe.tuning_steps == 0
    assert recipe.windows == recipe.scoring_windows > 0
    summary = tune(recipe)
    assert summary["tokens"].get("adapt", 0) == 0
    base, written = load_file(Path(bench.base) / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    for layer, kept in enumerate(plan_of(tmp_path).kept):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(base[name][list(kept[FFN])], written[name])


def test_what_a_decision_takes_is_counted_where_nothing_else_is_read(bench: Bench, tmp_path: Path) -> None:
    none = {"search__steps": 0, "recover__steps": 0, "generator__prior": "none"}
    keys = {"scores": "wanda", "least_squares": True, "batches": 2}
    recipe = bench.recipe(tmp_path, method="twostage", twostage=keys, **none)
    assert recipe.windows == recipe.scoring_windows == 4 * recipe.train.batch
    assert recipe.tuning_steps == 0


def test_least_squares_at_the_cut_start_from_the_bases_weights(bench: Bench, tmp_path: Path) -> None:
    """Whatever compensated while the generator decided."""
    found = []
    for weights in ("none", "decide"):
        keys = {"twostage__scores": "generator", "twostage__least_squares": True, "twostage__batches": 2}
        run = twostage._TwoStage(session_of(bench, tmp_path / weights, method="twostage", compensate__weights=weights, **keys))
        twostage.prepare(run.session, run.model, run.bank, run.decider, fresh=True)
        masks = run.decider.masks(run.recipe.search.steps)
        run.bank.close({site: 1 - mask if len(mask) > 2 else mask for site, mask in masks.items()})
        run._refit({site: (torch.arange(len(mask)) % 2 == 0).float() for site, mask in masks.items()})
        found.append([module.base_layer.weight.clone() for _, row, module in linears_of(run.model, run.structure) if row.into])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_fit_reads_what_comes_through_the_first(bench: Bench, tmp_path: Path) -> None:
    """So what lies before all that was fitted is as it was, and the tokens are twice as many."""
    found, tokens = [], []
    for rounds in (1, 2):
        keys = {"twostage__least_squares": True, "twostage__batches": 2, "twostage__refit_rounds": rounds}
        run = twostage._TwoStage(session_of(bench, tmp_path / str(rounds), method="twostage", **keys))
        sizes = {site: run.structure.layers[site[0]].units[site[1]] for site in run.structure.sites()}
        tokens.append(run._refit({site: (torch.arange(size) % 2 == 0).float() for site, size in sizes.items()}))
        found.append([module.base_layer.weight.clone() for _, row, module in linears_of(run.model, run.structure) if row.into])
        assert run.recipe.refit_windows == rounds * 2 * run.recipe.train.batch
    (first, *later), (again, *others) = found
    torch.testing.assert_close(first, again)
    assert all(not torch.allclose(one, other, rtol=1e-3) for one, other in zip(later, others, strict=True))
    assert tokens[1] == 2 * tokens[0]


def test_flaps_biases_and_least_squares_exclude_each_other(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"add it to the weights once more; set twostage\.compensate=false"):
        bench.recipe(tmp_path, method="twostage", twostage={"scores": "flap", "least_squares": True})
    bench.recipe(tmp_path, method="twostage", twostage={"scores": "flap", "least_squares": True, "compensate": False})


def test_a_rank_beyond_the_models_width_is_refused_before_anything_runs(bench: Bench, tmp_path: Path) -> None:
    config = load_config(bench.recipe(tmp_path).model)
    structure = structure_of(config)
    check_method(bench.recipe(tmp_path, lora__rank=structure.hidden), config, structure)
    with pytest.raises(
        UserError, match=rf"lora\.rank={structure.hidden + 1} is more than the model's width of {structure.hidden}"
    ):
        check_method(bench.recipe(tmp_path, lora__rank=structure.hidden + 1), config, structure)


def test_a_family_without_bias_keys_is_refused_before_anything_runs(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path, method="twostage", twostage={"scores": "flap"})
    config = load_config(recipe.model)
    structure = structure_of(config)
    check_method(recipe, config, structure)
    with pytest.raises(UserError, match="compensate=false"):
        check_method(recipe, config, replace(structure, family=family_of("mistral")))


def test_layer_drop_meets_a_budget_between_two_layers() -> None:
    """What is left over is more than a layer can lose and less than a whole one, but within the tolerance."""
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(12) for name, shape in BLOCK.items()}
    structure = measure(family_of("llama"), {"model.embed_tokens.weight": (16384, 512), **shapes}, 64)
    level = {site: torch.zeros(structure.layers[site[0]].units[site[1]]) for site in structure.sites()}
    for keep in (0.8, 0.7, 0.6, 0.5):
        plan, counts = drop_layers([float(layer) for layer in range(12)], level, structure, BudgetConfig(keep=keep))
        assert abs(counts.total_ratio - keep) <= 0.002
        assert plan.layers[-1] == 11
        assert all(len(plan.kept[layer]["ffn"]) == 1408 for layer in plan.layers[2:])
        whole = round(12 - (1 - keep) * structure.total_params / structure.layers[0].params)
        assert len(plan.layers) in (whole, whole + 1)

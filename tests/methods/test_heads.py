"""Runs with masks inside heads: rotary pairs of q and k, and every token's value dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bases import Bench, made_once, metrics, plan_of, session_of
from slimtune.errors import UserError
from slimtune.export.apply import apply_plan
from slimtune.export.command import TARGETS, export_model
from slimtune.methods import tomoe
from slimtune.methods.heads import HeadScores
from slimtune.models.load import load_config, structure_of
from slimtune.models.watch import watch
from slimtune.pipeline import tune
from slimtune.prune.gates import MaskBank
from slimtune.report.page import report
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.heads import PAIR, VALUE
from slimtune.structure.plan import count

MOE: dict[str, Any] = {
    "method": "tomoe",
    "budget": {"keep": 0.8, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
    "moe__prior_steps": 2,
    "moe__top_k": 2,
    "moe__attention": "tokens",
}
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"moe__number": 5},
    "pairs": {"moe__attention": "pairs", "budget__keep": 0.7},
    "routed": {"moe__shared": False, "search__steps": 0},
    "published": {
        "moe": {
            "attention": "tokens",
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
}


@pytest.fixture(scope="module")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by kind, each made once: folder and summary."""
    return made_once(bench, tmp_path_factory, KINDS, fresh=("tokens",), **MOE)  # by the code that its folder carries


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_model_is_the_one_in_memory_and_of_the_size_asked_for(runs: Any, bench: Bench, kind: str) -> None:
    out, summary = runs(kind)
    structure, plan, result = structure_of(load_config(bench.recipe(out).model)), plan_of(out), summary["result"]
    assert summary["reload_difference"] < 1e-4
    assert abs(result["active_ratio"] - summary["keep"]) <= 0.03
    assert result["active_ratio"] == pytest.approx(count(structure, plan, active=True).block_ratio)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert result["parameters"] == sum(each.numel() for each in model.parameters()) == count(structure, plan).total
    assert {len(each) for each in plan.pairs} == {7}
    assert plan.values == (0 if kind == "pairs" else 14)
    assert all(len(layer[KV_GROUP]) == 2 for layer in plan.kept)
    assert type(model).__module__.startswith("transformers.") == (kind == "pairs")
    for layer, kept in enumerate(plan.pairs):
        rows = model.model.layers[layer].self_attn.k_proj.weight.abs().sum(1).view(2, 2, 8)
        zero = {pair for pair in range(8) if not rows[:, :, pair].any()}
        assert zero == set(range(8)) - set(kept)


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_apply_rebuilds_the_model_from_plan_and_adapter(runs: Any, bench: Bench, kind: str, tmp_path: Path) -> None:
    out, _ = runs(kind)
    assert apply_plan(out / "adapter", bench.base, out=tmp_path / "again")["same"]
    theirs, ours = (load_file(each / "model.safetensors") for each in (out / "model", tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert (out / "model" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_what_nothing_else_computes_is_not_exported(runs: Any, tmp_path: Path) -> None:
    out, _ = runs("tokens")
    for to in TARGETS:
        with pytest.raises(UserError, match=rf"cannot be written --to {to}; .*moe\.attention=pairs or groups"):
            export_model(out, to, out=tmp_path / "x.gguf")
    pairs, _ = runs("pairs")
    assert export_model(pairs, "hf", quantize="bf16", out=tmp_path / "pairs", check=False)["class"] == "Glm4MoeForCausalLM"


def test_the_report_and_the_card_can_be_read(runs: Any, tmp_path: Path) -> None:
    out, _ = runs("tokens")
    assert report([out], tmp_path / "page.html").read_text(encoding="utf-8")
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert "modeling_slimtune_values.py" in card
    assert "| value dimensions of a token, in each head | 14 |" in card


@pytest.mark.parametrize("kind", KINDS)
def test_passes_over_decision_batches_are_as_many_as_are_counted(runs: Any, bench: Bench, tmp_path: Path, kind: str) -> None:
    method = tomoe._ToMoE(session_of(bench, tmp_path / "run", **{**MOE, **KINDS[kind]}))
    recipe, summary = method.recipe, runs(kind)[1]
    once = sum(method.decision.tokens(step) for step in range(recipe.moe.prior_steps))
    assert summary["tokens"]["prior"] == recipe.moe.passes(recipe.search.steps) * once


def test_on_the_way_masks_and_channels_are_at_the_present_target(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, **KINDS["tokens"], "search__steps": 10, "search__ramp": 0.5})
    experts = tomoe._ToMoE(session).experts
    assert experts.values is not None
    first, last = experts.sample(0), experts.masks(9)
    assert (first[0, PAIR].requires_grad, first[0, VALUE].requires_grad) == (True, True)
    widths = []
    for step in range(10):
        masks = experts.masks(step)
        widths.append((int(masks[1, PAIR].sum()), experts.values.width))
    assert widths[0] == (8, 16)
    assert widths[5:] == [(7, 14)] * 5
    assert widths == sorted(widths, reverse=True)
    assert int(last[0, FFN][0].sum() + 2 * last[0, FFN][1].sum()) == experts.shape.active


def gradients(bench: Bench, out: Path, checkpointing: str) -> dict[str, Tensor | None]:
    """What a batch leaves at the leaves of a layer and at the modules."""
    changes = {"model": {"path": bench.base, "checkpointing": checkpointing}, "moe__explore": 0.5}
    method = tomoe._ToMoE(session_of(bench, out, **{**MOE, **KINDS["tokens"], **changes}))
    values = method.experts.values
    assert values is not None
    torch.manual_seed(3)
    sampled, leaves = method.experts.sample(0), list[dict[Any, Tensor]]()
    method._loss(leaves, sampled)(method.tuner.batches.at(0)[0]).backward()
    found = {name: parameter.grad for name, parameter in values.named_parameters()}
    return {"pair": leaves[0][1, PAIR].grad, "state": leaves[0][1, VALUE].grad, **found}


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_a_batch_teaches_generator_and_modules(bench: Bench, tmp_path: Path, checkpointing: str) -> None:
    """What is computed once more in the backward pass has the same masks: with noise, too."""
    plain, again = (gradients(bench, tmp_path / name, name) for name in ("none", checkpointing))
    missing = [name for name, gradient in plain.items() if gradient is None]
    assert missing == ["states.0", "states.1", "states.2"], "until the decision the generator speaks for them"
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None)
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(again[name], gradient)


def test_routers_and_modules_are_clipped_together(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, **KINDS["tokens"]})
    experts = tomoe._ToMoE(session).experts
    assert experts.values is not None
    parameters = [*experts.router.parameters(), *experts.values.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    wanted = 0.1 * sum(parameter.numel() for parameter in parameters) ** 0.5
    before = experts.values.biases[0].detach().clone()
    assert float(experts.learn_router(0)) == pytest.approx(wanted, rel=1e-4)
    assert not torch.equal(experts.values.biases[0], before)
    assert all(parameter.grad is None for parameter in parameters)


def test_modules_learn_on_while_pairs_stay(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, **KINDS["tokens"], "search__steps": 1})
    method = tomoe._ToMoE(session)
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    method._adapt_both(0)
    method._freeze()
    values = method.experts.values
    assert values is not None
    torch.testing.assert_close(torch.stack(list(values.states)), method.experts.generator.made().states)
    before, pairs = values.tensors(), {site: mask.clone() for site, mask in method.masks.items() if site[1] == PAIR}
    before = {name: each.clone() for name, each in before.items()}
    for step in range(2):
        method._recover(step)
    assert all(not torch.equal(each, before[name]) for name, each in values.tensors().items())
    assert all(torch.equal(method.masks[site], mask) for site, mask in pairs.items())


def test_the_fit_of_o_proj_reads_what_the_masks_leave(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, **KINDS["tokens"], "budget__keep": 0.75, "moe__number": "auto"})
    method = tomoe._ToMoE(session)
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    masks = {site: mask for site, mask in method.experts.masks(3).items() if site[1] != FFN and site[0] == 0}
    batch, seen = method.decision.at(0)[0], dict[str, Tensor]()
    attention = method.model.get_base_model().model.layers[0].self_attn
    original = attention.o_proj.base_layer.weight
    attention.o_proj.register_forward_hook(lambda _, args, output: seen.update(x=args[0], out=output))

    def output(masks: dict[Any, Tensor]) -> Tensor:
        method.bank.close(masks)
        with torch.no_grad():
            method.model(input_ids=batch["input_ids"])
        return seen["out"]

    wanted = output({site: mask for site, mask in masks.items() if site[1] != VALUE})

    def missing() -> Tensor:
        """How far what o_proj adds is from what it would add of all value dimensions."""
        found = (output(masks) - wanted).norm()
        assert (seen["x"] == 0).float().mean() > 0.1
        return found

    before = missing()
    assert method.fits is not None
    method.fits.renew(masks, method.decision, 2, 0.01)
    assert missing() < 0.9 * before
    method.bank.open()
    assert attention.o_proj.base_layer.weight is original


def test_scores_of_pairs_and_dimensions_by_hand(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **MOE)
    method = tomoe._ToMoE(session)
    structure, ids = session.structure, torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    scores, outputs = HeadScores(structure), dict[str, Tensor]()
    handles = watch(method.model, structure, outputs=lambda *args: scores.see(real, *args))
    attention: Any = method.model.get_base_model().model.layers[2].self_attn  # type: ignore[operator, union-attr]
    for name in ("q_proj", "k_proj", "v_proj"):
        handles.append(
            getattr(attention, name).register_forward_hook(
                lambda _, __, output, name=name: outputs.update({name: output[real].double()})
            )
        )
    with torch.no_grad():
        method.model(input_ids=ids)
    pairs, values = scores.scores(method.model)
    assert (pairs.shape, values.shape) == ((3, 8), (3, 16))
    q, k, v = (outputs[name].unflatten(-1, (-1, 16)) for name in ("q_proj", "k_proj", "v_proj"))
    columns = attention.o_proj.base_layer.weight.detach().double().unflatten(-1, (4, 16))
    for pair in (0, 5):
        both = [pair, pair + 8]
        wanted = sum(
            q[:, head, both].square().sum() * k[:, head // 2, both].square().sum() for head in range(4)
        )  # two heads read each KV head
        torch.testing.assert_close(pairs[2, pair].double(), wanted, rtol=1e-4, atol=0)
    wanted = sum(v[:, head // 2, 3].square().sum() * columns[:, head, 3].square().sum() for head in range(4))
    torch.testing.assert_close(values[2, 3].double(), wanted, rtol=1e-4, atol=0)
    for handle in handles:
        handle.remove()


def test_pairs_that_add_nothing_go_first(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path / "run", **{**MOE, **KINDS["tokens"], "search__steps": 0})
    method = tomoe._ToMoE(session)
    base: Any = method.model.get_base_model()  # type: ignore[operator]
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.base_layer.weight[[16 * head + side for head in range(4) for side in (5, 13)]] = 0.0
            layer.self_attn.v_proj.base_layer.weight[[3, 19, 6, 22]] = 0.0
    tomoe.prior_of(session, method.model, method.bank, method.decision, method.experts)
    plan, values = method.experts.plan(), method.experts.values
    assert all(5 not in kept for kept in plan.pairs)
    assert values is not None
    for layer, bias in enumerate(values.biases):
        assert set(bias.topk(2, largest=False).indices.tolist()) == {3, 6}, layer


def test_what_cannot_be_is_refused_before_anything_runs(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"moe\.groups=1 is for moe\.attention=groups, and it is tokens"):
        tune(bench.recipe(out, **{**MOE, "moe__groups": 1}))
    with pytest.raises(UserError, match=r"moe\.attention=pairs leaves out rotary pairs .* 'qwen3' models norm"):
        tune(
            bench.recipe(
                out,
                **{
                    **MOE,
                    "moe__attention": "pairs",
                    "model": {"init": "config", "path": "", "config": {"model_type": "qwen3"}},
                },
            )
        )
    assert not out.exists()


def test_the_bank_tells_of_no_mask_when_it_is_open() -> None:
    bank = MaskBank()
    assert bank.head(0, PAIR) is None
    bank.close({(0, PAIR): torch.ones(8)})
    assert bank.head(0, PAIR) is not None
    assert bank.head(1, PAIR) is None
    bank.close({(0, PAIR): torch.ones(8)}, where="base")
    assert bank.head(0, PAIR) is None


def test_a_second_run_is_the_same(runs: Any, bench: Bench, tmp_path: Path) -> None:
    out, summary = runs("published")
    again = tune(bench.recipe(tmp_path / "again", **{**MOE, **KINDS["published"]}))
    assert again["plan"] == summary["plan"]
    assert metrics(tmp_path / "again") == metrics(out)
    config = json.loads((tmp_path / "again" / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["value_dims"], config["model_type"]) == (14, "slimtune_mixtral")

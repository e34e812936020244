"""The estimate of a run that makes experts, against a Plan, gated models and numbers by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from families import tiny_config
from slimtune import preflight
from slimtune.estimate import Estimate, estimate, experts, render
from slimtune.estimate.build import job_of
from slimtune.estimate.cost import Job
from slimtune.methods.masked import all_groups
from slimtune.models.hooks import place_gates
from slimtune.models.load import attach_lora, structure_of
from slimtune.prune.experts import ExpertGenerator
from slimtune.prune.gates import MaskBank
from slimtune.prune.router import Router
from slimtune.prune.token_masks import TokenMasks
from slimtune.recipe import Recipe, parse
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.experts import Division, host_of
from slimtune.structure.plan import Plan, count

SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "attn_implementation": "eager",
}
CONFIG = tiny_config("llama", **SHAPE)
STRUCTURE = structure_of(CONFIG)
LAYERS, HIDDEN, CHANNELS, QUERIES = 8, 128, 256, 8 * 16
TOKENS = 2 * 32


def recipe_of(config: Any = CONFIG, **sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "method": "tomoe",
        "device": "cpu",
        "model": {"init": "config", "config": config.to_dict()},
        "data": {"train": "nowhere.jsonl", "max_length": 32},
        "train": {"batch": 2, "precision": "float32"},
        "search": {"steps": 5},
        "recover": {"steps": 10},
        "lora": {"rank": 32},
        "moe": {"prior_steps": 3, "groups": 1},
        "budget": {"keep": 0.6, "of": "block", "tolerance": 0.05},
    }
    for name, value in sections.items():
        base[name] = {**base[name], **value} if isinstance(base.get(name), dict) else value
    return parse(base)


def cost(**sections: Any) -> Estimate:
    return estimate(recipe_of(**sections), measure=False)


def job(**sections: Any) -> Job:
    return job_of(recipe_of(**sections), CONFIG, STRUCTURE)


def gated(of: Job, searching: bool) -> tuple[nn.Module, list[nn.Parameter | torch.Tensor]]:
    """A model with routed gates as in training, and what of it lies there whatever is read."""
    shape, model = of.experts, attach_lora(AutoModelForCausalLM.from_config(CONFIG), STRUCTURE, of.recipe.lora)
    bank = MaskBank()
    router = bank.router = Router(HIDDEN, LAYERS, shape.number, shape.top_k, host_of(STRUCTURE.family, shape.shares > 0))
    place_gates(model, STRUCTURE, bank.consumer, bank.base, bank.innovation, bank.follow)
    masks = {(layer, FFN): torch.ones(1 + shape.number, CHANNELS) for layer in range(LAYERS)}
    leaves = bank.leaves(masks | all_groups(STRUCTURE, torch.device("cpu"))) if searching else {}
    if not searching:
        bank.close(masks)
    model.train()
    return model, [*model.parameters(), *model.buffers(), *router.parameters(), *leaves.values()]


def flops_of(model: nn.Module) -> float:
    ids = torch.randint(0, 97, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def saved_by(model: nn.Module, own: list[Any]) -> int:
    lying, kept = {each.untyped_storage().data_ptr() for each in own}, dict[int, torch.Tensor]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.randint(0, 97, (2, 32)))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in lying)


PAIRS = {"attention": "pairs", "groups": "auto"}
TOKENS_OWN = {"attention": "tokens", "groups": "auto"}


@pytest.mark.parametrize("moe", [{}, {"shared": False}, {"experts": "overlap"}, {"groups": "auto"}, PAIRS, TOKENS_OWN])
def test_sizes_are_those_of_a_plan_of_that_shape(moe: dict[str, Any]) -> None:
    found, shape = cost(moe=moe), job(moe=moe).experts
    assert found.problem is None
    assert found.active is not None
    assert found.smallest is None
    starts = [0 if shape.overlap else (shape.shares + expert) * shape.width for expert in range(shape.number)]
    routed = [range(start, start + shape.width) for start in starts]
    division = Division.of(range(shape.shares * shape.width), routed)
    pairs = [range(shape.pairs)] * LAYERS if shape.pairs else []
    groups = [range(shape.groups)] * LAYERS
    plan = Plan.divided(STRUCTURE, groups, [division] * LAYERS, shape.top_k, pairs, shape.values)
    for size, active in ((found.after, False), (found.active, True)):
        counts = count(STRUCTURE, plan, active=active)
        assert (size.total, size.block) == (counts.total, counts.block)
        assert (size.total_ratio, size.block_ratio) == pytest.approx((counts.total_ratio, counts.block_ratio))
    assert found.active.block_ratio == pytest.approx(0.6, abs=0.05)
    assert found.active.block < found.after.block


@pytest.mark.parametrize("generator", ["gru", "direct"])
@pytest.mark.parametrize("kind", ["partition", "overlap"])
@pytest.mark.parametrize("heads", [{}, TOKENS_OWN])
def test_the_generator_is_the_one_that_learns(generator: str, kind: str, heads: dict[str, Any]) -> None:
    moe = {"generator": generator, "experts": kind, **heads}
    of = job(moe=moe)
    slots = of.experts.number + (0 if kind == "overlap" else 2)
    real = ExpertGenerator(LAYERS, CHANNELS, slots, of.recipe.moe, 8 if heads else 0)
    assert cost(moe=moe).generator_params == sum(p.numel() for p in real.parameters())


def test_modules_of_tokens_learn_beside_the_routers() -> None:
    of, made = job(moe=TOKENS_OWN), TokenMasks(HIDDEN, LAYERS, 16)
    own = LAYERS * of.experts.number * HIDDEN + sum(each.numel() for each in made.parameters())
    assert experts.router_params(of) == own
    assert cost(moe=TOKENS_OWN).memory["routers, gradients, AdamW"] == 16 * own


def test_what_has_no_rotary_pairs_is_told() -> None:
    config = tiny_config("qwen3", **SHAPE)
    found = estimate(recipe_of(config, moe=PAIRS), measure=False)
    assert found.problem is not None
    assert "moe.attention=pairs leaves out rotary pairs" in found.problem


@pytest.mark.parametrize("searching", [True, False])
def test_masks_and_routers_cost_what_a_flop_counter_and_autograd_see(searching: bool) -> None:
    of = job()
    plain = attach_lora(AutoModelForCausalLM.from_config(CONFIG), STRUCTURE, of.recipe.lora).train()
    model, own = gated(of, searching)
    number = of.experts.number
    by_hand = LAYERS * number * (6 * HIDDEN + (6 if searching else 4) * CHANNELS)
    assert flops_of(model) - flops_of(plain) == TOKENS * by_hand
    assert experts._routed(of, 4 if searching else 2) == by_hand
    more = saved_by(model, own) - saved_by(plain, [*plain.parameters(), *plain.buffers()])
    # norms and copies of single families are not in the formula; without the masks or the gated inputs half is missing
    assert more == pytest.approx(TOKENS * experts.token_bytes(of, searching), rel=0.05)


def test_phases_are_the_search_and_the_recovery_on_a_model_whose_mlp_is_whole() -> None:
    found = cost(evaluate={"dense_lora": True})
    assert [(phase.name, phase.steps) for phase in found.phases] == [("search", 5), ("recover", 10), ("dense LoRA", 15)]
    search, recover, reference = found.phases
    assert search.tokens == (5 + 5 * 3) * TOKENS  # gradients of groups, prior, a fit on the way and two at the end
    assert recover.tokens == 10 * TOKENS
    of = job()
    generator = 8 * (of.experts.number + 2) * of.generator
    assert search.step_flops == pytest.approx(5 * (TOKENS * (of.adapt() + experts._routed(of, 4)) + generator))
    gone = LAYERS * (STRUCTURE.layers[0].unit_params[KV_GROUP] * 4 + 4 * 2 * 32 * QUERIES // 2)  # 4 T A of two passes
    rank = LAYERS * 6 * 32 * 2 * (QUERIES // 2 + 16)  # q, o and k, v
    assert recover.step_flops == pytest.approx(10 * TOKENS * (of.adapt() - gone - rank + experts._routed(of, 2)))
    assert found.lora_params - found.lora_params_after == rank / 6
    assert recover.step_flops / 10 < search.step_flops / 5
    assert recover.step_flops / 10 > 0.9 * reference.step_flops / 15, "the MLP is not cut"
    assert preflight.costs(recipe_of(), CONFIG, STRUCTURE) == {
        "search": search.step_flops,
        "recover": recover.step_flops,
    }


@pytest.mark.parametrize(
    ("moe", "passes"),
    [
        ({}, 5),
        ({"groups": "all"}, 4),
        ({"prior": "none"}, 4),
        ({"refit": False}, 2),
        ({"refit_every": 0}, 4),
        ({"refit_every": 2, "refit_rounds": 1}, 6),
        ({"groups": "all", "prior": "none"}, 3),
    ],
)
def test_passes_are_those_of_what_is_asked_for(moe: dict[str, Any], passes: int) -> None:
    search = cost(moe=moe, search={"batch": 1}).phases[0]
    assert search.tokens == 5 * TOKENS + passes * 3 * TOKENS / 2
    assert search.tokens + 10 * TOKENS == 32 * recipe_of(moe=moe, search={"batch": 1}).windows


def test_groups_that_all_stay_need_no_gradients() -> None:
    assert job(moe={"groups": "auto"}).experts.groups == 2, "of two"
    assert cost(moe={"groups": "auto"}).phases[0].tokens == (5 + 4 * 3) * TOKENS


def test_a_teacher_costs_a_forward_pass_and_logits() -> None:
    forward = job().forward()
    plain, taught = cost(), cost(moe={"kd": 1.0, "prior_tokens": 3})
    assert taught.phases[0].step_flops - plain.phases[0].step_flops == pytest.approx(5 * TOKENS * forward)
    assert taught.phases[1].step_flops == plain.phases[1].step_flops
    assert taught.memory["logits"] == 2 * 12 * TOKENS * SHAPE["vocab_size"]
    distilled = cost(distill={"weight": 1.0})
    small = experts.cut(job()).forward()
    assert small < forward
    assert distilled.phases[1].step_flops - plain.phases[1].step_flops == pytest.approx(10 * TOKENS * small)
    assert distilled.phases[0].step_flops == plain.phases[0].step_flops


def test_without_lora_in_the_search_its_turns_are_decide_turns_with_the_teacher() -> None:
    found, of = cost(moe={"tune": False}, search={"batch": 1}).phases[0], job()
    each = 3 * of.forward() + 4 * of.lora() + experts._routed(of, 4)
    assert found.step_flops == pytest.approx(5 * (TOKENS / 2 * each + 8 * (of.experts.number + 2) * of.generator))
    assert found.tokens == (5 + 15) * TOKENS / 2


def test_a_refit_takes_moments_and_a_fit_of_every_consumer() -> None:
    squares = LAYERS * (QUERIES**2 + CHANNELS**2)
    fits = LAYERS * (QUERIES**3 + CHANNELS**3) / 3 + 4 * HIDDEN * squares
    assert cost().phases[0].solve_flops == pytest.approx(3 * (3 * TOKENS * 4 * squares + fits))
    one = cost(moe={"refit_every": 0, "refit_rounds": 1})
    assert one.phases[0].solve_flops == pytest.approx(3 * TOKENS * 4 * squares + fits)
    assert cost(moe={"refit": False}).phases[0].solve_flops == 0
    assert experts.refit_bytes(job()) == 8 * squares + 24 * CHANNELS**2


def test_memory_is_that_of_the_fullest_phase() -> None:
    of = job()
    slots = of.experts.number + 2
    found = cost()
    routers = 16 * LAYERS * of.experts.number * HIDDEN
    assert found.memory["generator, gradients, AdamW"] == 16 * of.generator
    assert found.memory["routers, gradients, AdamW"] == routers
    kept = 4096 * LAYERS * (2 * CHANNELS + 4 * HIDDEN)
    assert found.memory["tokens of the prior"] == kept, "beside the gradients of KV groups"
    search = cost(moe={"prior_tokens": 3})
    assert "tokens of the prior" not in search.memory
    assert search.memory["masks"] == 4 * 6 * LAYERS * CHANNELS * slots
    assert (
        cost(moe={"prior_tokens": 3}, train={"micro_batch": 1, "batch": 4}).memory["masks"]
        == 4 * 12 * LAYERS * CHANNELS * slots
    )
    few = {"prior_tokens": 3, "groups": "all"}
    assert cost(moe=few, data={"max_length": 4}).memory["moments of refit"] == experts.refit_bytes(of)
    assert cost(moe=few, data={"max_length": 4}).memory["fitted consumers"] == 4 * HIDDEN * LAYERS * (QUERIES + CHANNELS)
    assert "moments of refit" not in cost(moe={**few, "refit": False}, data={"max_length": 4}).memory


def test_what_convert_refuses_is_a_problem_here_and_the_base_is_told() -> None:
    narrow = cost(budget={"keep": 0.05})
    assert narrow.problem is not None
    assert "cannot be met within budget.tolerance" in narrow.problem
    assert narrow.after.block == STRUCTURE.prunable_params + LAYERS * HIDDEN, "one expert, and its router"
    quantised = cost(model={"quantize": "nf4"})
    assert quantised.problem == "model.quantize=nf4 does not go with method=tomoe; leave it out"
    other = estimate(recipe_of(tiny_config("gemma2")), measure=False)
    assert other.problem is not None
    assert "no stock class holds experts of a 'gemma2' model" in other.problem
    assert other.after.total == other.before.total
    window = estimate(recipe_of(tiny_config("mistral", intermediate_size=256)), measure=False)
    assert window.problem is not None
    assert "has no sliding window" in window.problem


def test_the_table_shows_what_is_stored_and_what_a_token_uses() -> None:
    recipe, out = recipe_of(), io.StringIO()
    found = estimate(recipe, measure=False)
    render(found, recipe, Console(file=out, width=160))
    assert found.active is not None
    for figure in ("stored", "a token uses: budget.keep=0.6 of block", f"{found.after.total:,}", f"{found.active.block:,}"):
        assert figure in out.getvalue()
    assert "smallest possible" not in out.getvalue()


def test_only_the_reference_is_compiled() -> None:
    plain, compiled = (
        estimate(recipe_of(train={"compile": compile_}, evaluate={"dense_lora": True}), gpu="h200").phases
        for compile_ in (False, True)
    )
    assert [row.seconds for row in plain[:2]] == [row.seconds for row in compiled[:2]]
    assert plain[2].seconds != compiled[2].seconds

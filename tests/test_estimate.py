"""The estimate against models that are really built: parameters, operations and saved bytes are counted."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cost as cost_of_a_run
import growth
import pytest
import scale
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from families import tiny_config
from slimtune.errors import UserError
from slimtune.estimate import Estimate, estimate, render, traffic
from slimtune.estimate.build import job_of
from slimtune.estimate.cost import windows
from slimtune.estimate.machines import FIRST_GRAPH, GRAPH, SYMBOLIC, Machine, named, sheet_of
from slimtune.estimate.memory import memory, with_room
from slimtune.estimate.phases import phases
from slimtune.models import load as load_module
from slimtune.models.load import attach_lora, load_config, structure_of
from slimtune.models.quantized import quantized
from slimtune.models.weights import held
from slimtune.prune import least_squares
from slimtune.prune.least_squares import Takeover
from slimtune.recipe import Recipe, load, parse

LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# every term of the formulas weighs enough to be missed: a large vocabulary, a high rank
WIDE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
RANK = {"rank": 32}


@pytest.fixture(scope="module", autouse=True)
def _shapes_once() -> Iterator[None]:
    """Every estimate builds the model of its config for its shapes: a third of what it takes, and most configs come again."""
    real, known = load_module.meta_shapes, dict[tuple[type, str], dict[str, tuple[int, ...]]]()

    def meta_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        key = type(config), config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = real(config)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "meta_shapes", meta_shapes)
        yield


def recipe_of(config: dict[str, Any], **sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "device": "cpu",
        "model": {"init": "config", "config": config},
        "data": {"train": "nowhere.jsonl", "max_length": 32},
        "train": {"batch": 2, "precision": "float32"},
        "lora": {"rank": 4},
        "generator": {"prior": "none"},
        "compensate": {"weights": "none"},
    }
    for name, value in sections.items():
        base[name] = {**base[name], **value} if isinstance(base.get(name), dict) else value
    return parse(base)


def cost(config: dict[str, Any], **sections: Any) -> Estimate:
    return estimate(recipe_of(config, **sections), measure=False)


def tiny(name: str = "llama", **overrides: Any) -> tuple[dict[str, Any], torch.nn.Module]:
    config = tiny_config(name, **overrides)
    return config.to_dict(), AutoModelForCausalLM.from_config(config)


def count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "phi", "gemma2"])
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    config, model = tiny(name)
    result = cost(config)
    assert result.before.total == count(model)
    assert result.after.total == pytest.approx(0.6 * count(model), abs=1)
    lora = attach_lora(model, structure_of(model.config), recipe_of(config).lora)  # type: ignore[arg-type]
    assert result.lora_params == count(lora, trainable=True)


def test_lora_after_the_cut_is_that_of_a_model_built_at_half_the_widths() -> None:
    config, _ = tiny()
    _, half = tiny(num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
    result = cost(config, budget={"keep": 0.5, "of": "block"})
    lora = attach_lora(half, structure_of(half.config), recipe_of(config).lora)  # type: ignore[arg-type]
    assert result.after.total == sum(p.numel() for n, p in lora.named_parameters() if "lora" not in n)
    assert result.lora_params_after == count(lora, trainable=True)


def test_llama_3_8b_from_an_inline_config() -> None:
    result = cost(LLAMA_3_8B)
    assert result.before.total == 8_030_261_248
    assert result.units == (("0-31", {"kv_group": 8, "ffn": 14336}),)
    assert result.after.total_ratio == pytest.approx(0.6)
    assert result.after.block_ratio == pytest.approx(0.5398, abs=1e-4)  # embeddings stay whole
    assert result.smallest.total < result.after.total


@pytest.mark.parametrize("method", ["lora", "whole", "forward"])
def test_operations_agree_with_a_flop_counter(method: str) -> None:
    config, model = tiny(**WIDE, attn_implementation="eager")  # the counter does not see inside the CPU's fused attention
    kind: dict[str, Any] = {"lora": RANK, "search": {"steps": 0}, "budget": {"keep": 1.0}, "generator": {"prior": "taylor"}}
    if method == "whole":
        kind["method"] = "finetune"
    result = cost(config, **kind, train={"batch": 2, "steps": 1}, recover={"steps": 1})
    expected = result.phases[-1].flops
    if method == "forward":  # what distillation adds is exactly one forward pass
        more = cost(config, **kind, recover={"steps": 1}, distill={"weight": 1.0, "recover": True})
        expected = more.phases[-1].flops - expected
    elif method == "lora":
        model = attach_lora(model, structure_of(model.config), recipe_of(config, lora=RANK).lora)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        ids = torch.randint(0, 97, (2, 32))
        loss = model(input_ids=ids, labels=ids).loss
        if method != "forward":
            loss.backward()
    # the first layer's inputs need no gradient, and attention's backward is more than twice its forward
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01 if method == "forward" else 0.05)


@pytest.mark.parametrize("whole", [False, True])
def test_activations_agree_with_what_autograd_saves(whole: bool) -> None:
    config, model = tiny(**WIDE)
    result = cost(config, method="finetune" if whole else "atp", lora=RANK)
    if not whole:
        model = attach_lora(model, structure_of(model.config), recipe_of(config, lora=RANK).lora)  # type: ignore[arg-type]
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=torch.randint(0, 97, (2, 32)))
    saved = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert saved == pytest.approx(result.memory["activations"], rel=0.03)


def test_a_compiled_loss_needs_no_copies_of_the_logits() -> None:
    config, tokens = tiny_config("llama", **WIDE).to_dict(), 2 * 32 * WIDE["vocab_size"]

    def logits(**sections: Any) -> int:
        return cost(config, **sections).memory["logits"]

    compiled, small = {"compile": True}, {"batch": 1}
    assert logits() == 12 * tokens
    assert logits(search={"batch": 6}) == 3 * 12 * tokens  # a decide turn of three times the windows
    assert logits(method="finetune", train=compiled) == 8 * tokens
    assert logits(train=compiled, search=small) == 8 * tokens
    assert logits(train=compiled) == 12 * tokens
    assert logits(train={**compiled, "micro_batch": 1}, search={"batch": 6}) == 12 * tokens / 2  # which cuts both
    assert logits(train=compiled, method="twostage", twostage={"scores": "taylor"}) == 12 * tokens
    assert logits(train=compiled, method="twostage", twostage={"scores": "wanda"}) == 8 * tokens  # no gradient
    assert logits(train=compiled, distill={"weight": 1.0}) == 24 * tokens


def test_checkpointing_trades_memory_for_operations() -> None:
    plain = cost(LLAMA_3_8B)
    light = cost(LLAMA_3_8B, model={"checkpointing": "non_reentrant"})
    assert light.memory["activations"] < plain.memory["activations"] / 10
    assert light.phases[0].flops == pytest.approx(1.5 * plain.phases[0].flops, rel=0.05)


def test_steps_and_tokens_by_phase() -> None:
    config, _ = tiny()
    sections = {"search": {"steps": 10, "decide_every": 3}, "recover": {"steps": 5}, "evaluate": {"dense_lora": True}}
    phases = cost(config, **sections).phases
    assert [(p.name, p.steps) for p in phases] == [("search", 10), ("recover", 5), ("dense LoRA", 15)]
    assert [p.tokens for p in phases] == [(10 + 4) * 64, 5 * 64, 15 * 64]  # decide turns at steps 0, 3, 6 and 9
    halved = cost(config, **{**sections, "search": {**sections["search"], "batch": 1}}).phases[0]
    assert halved.tokens == 10 * 64 + 4 * 32
    assert halved.flops < phases[0].flops
    primed = cost(config, **sections, generator={"prior": "taylor"}).phases[0]
    assert primed.tokens == (10 + 4 + 16) * 64
    assert primed.step_flops == phases[0].step_flops == phases[0].flops < primed.flops
    assert phases[1].flops / 5 < phases[2].flops / 15  # the smaller model's step is cheaper


@pytest.mark.parametrize(("scores", "passes"), [("magnitude", 0.0), ("wanda", 1.0), ("taylor", 2.0)])
def test_scores_cost_what_they_read(scores: str, passes: float) -> None:
    """Nothing, forward passes, or forward and backward ones (to the gates: LoRA's products stand in them twice)."""
    config, _ = tiny(**WIDE)
    keys = {"method": "twostage", "twostage": {"scores": scores, "batches": 3}, "budget": {"ffn_multiple": 4}}
    found = cost(config, **keys)
    decide = next(phase for phase in found.phases if phase.name == "decide")
    forward = cost(config, **{**keys, "twostage": {"scores": "wanda", "batches": 3}})
    unit = next(phase for phase in forward.phases if phase.name == "decide").flops
    assert decide.flops == pytest.approx(passes * unit, rel=0.15)


@pytest.mark.parametrize(("distill", "extra"), [({"recover": True}, 0.5), ({"teacher": "somewhere"}, 1.0), ({}, 0.0)])
def test_a_teacher_takes_the_memory_of_the_weights_it_does_not_share(distill: dict[str, Any], extra: float) -> None:
    config, _ = tiny(**WIDE)
    found = cost(config, distill={"weight": 1.0, **distill}, budget={"keep": 0.5, "ffn_multiple": 4}).memory
    beside = sum(value for name, value in found.items() if "teacher" in name)
    assert beside == pytest.approx(extra * found["weights"], abs=1)


def test_blocks_that_are_not_checkpointed_save_time_and_take_memory_after_the_cut() -> None:
    config, model = tiny(**WIDE)
    budget = {"keep": 0.3, "of": "block", "ffn_multiple": 4}

    def found(**words: Any) -> tuple[float, dict[str, int]]:
        result = cost(config, budget=budget, model={"checkpointing": "non_reentrant"}, data={"max_length": 512}, **words)
        return result.phases[1].step_flops, result.memory

    (all_, before), (half, _), (none, after) = (found(recover={"checkpointed": part}) for part in (1.0, 0.5, 0.0))
    assert half == pytest.approx((all_ + none) / 2)
    assert none < all_
    weights = sum(p.numel() for p in model.parameters())
    assert before["weights"] == 4 * weights, "the fullest phase is the search"
    assert after["weights"] < 0.7 * before["weights"], "and now the recovery"
    assert after["activations"] > 2 * before["activations"]


def test_compensation_costs_what_its_tensors_do() -> None:
    config, model = tiny(**WIDE)
    plain = cost(config)
    consumers = [module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    squares = sum(4 * module.in_features**2 for module in consumers)
    halves = 9 * sum(module.in_features**2 for module in consumers) // 4
    weights = sum(4 * module.weight.numel() for module in consumers)
    for compensate, bytes_ in (
        ({"weights": "adapt"}, 0),
        ({"weights": "decide"}, squares),
        ({"weights": "adapt", "offload": False}, halves + 2 * weights),
        ({"weights": "decide", "offload": False}, squares + halves + weights),
        ({"weights": "decide", "matrices": 0}, 0),
    ):
        found = cost(config, compensate=compensate)
        assert found.memory.get("compensation", 0) == bytes_
        assert found.phases[0].tokens == plain.phases[0].tokens + 16 * 64
        assert (found.phases[0].step_flops > plain.phases[0].step_flops) == (bytes_ in (squares, squares + halves + weights))
    assert "compensation" not in plain.memory


def test_a_quantised_base_costs_what_its_tensors_do() -> None:
    config, model = tiny(**WIDE)
    found = cost(config, model={"quantize": "nf4", "init": "config", "config": config}, compensate={"weights": "adapt"})
    structure = structure_of(model.config)
    tensors = [tensor for each in quantized(model, structure, "cpu").parameters() for tensor in held(each)]
    assert found.memory["weights"] == pytest.approx(sum(each.numel() * each.element_size() for each in tensors), rel=0.005)
    assert found.memory["a weight that is dequantised meanwhile"] == 4 * 128 * 256
    plain = cost(LLAMA_3_8B, device="cuda", model={"dtype": "bfloat16"})
    small = cost(LLAMA_3_8B, device="cuda", model={"dtype": "bfloat16", "quantize": "nf4"}, recover={"quantize": True})
    blocks = structure_of(load_config(recipe_of(LLAMA_3_8B).model)).prunable_params
    assert small.host_memory["original weights"] == 2 * blocks, "embeddings and head are not quantised"
    assert small.memory["weights"] < 0.4 * plain.memory["weights"], "embeddings and head stay in bf16"
    nf4, most = {"model": {"quantize": "nf4"}, "budget": {"keep": 0.9}}, {"recover": {"quantize": False}}
    later = cost(LLAMA_3_8B, device="cuda", **nf4, **most).memory
    assert later["weights"] == pytest.approx(0.9 * plain.memory["weights"], rel=1e-3), "the fullest phase is the recovery"
    assert "a weight that is dequantised meanwhile" not in later
    assert cost(LLAMA_3_8B, device="cuda", **nf4).memory == later, "auto, on a device that nobody knows"


def test_originals_that_are_mapped_files_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def originals(**model: Any) -> int:
        recipe = parse({"device": "cuda", "data": {"train": "nowhere.jsonl"}, "model": {"quantize": "nf4", **model}})
        return estimate(recipe, measure=False).host_memory["original weights"]

    base = {"path": "builtin:base-10m"}  # whose files hold bfloat16
    alone = originals(**base, dtype="bfloat16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert originals(**base, dtype="bfloat16") == alone
    assert originals(**base, dtype="float32") == 4 * alone


def test_the_recovery_is_in_4_bits_where_whole_weights_do_not_fit() -> None:
    wanted = {"model": {"quantize": "nf4", "dtype": "bfloat16"}, "device": "cuda", "train": {"precision": "bfloat16"}}
    recipe = recipe_of({**LLAMA_3_8B, "num_hidden_layers": 80}, **wanted, budget={"keep": 0.9})
    config = load_config(recipe.model)
    job = job_of(recipe, config, structure_of(config), "cuda")
    whole = sum(memory(job, "cuda").values())
    for room, tight in ((int(whole / 0.89), False), (int(whole / 0.91), True), (None, False)):
        decided = with_room(job, "cuda", room)
        assert decided.recipe.recover.quantize is tight
        assert with_room(decided, "cuda", 1) is decided
    assert estimate(recipe, gpu="h200").memory["weights"] > 2 * estimate(recipe, gpu="a10").memory["weights"]


def test_training_from_scratch_has_neither_lora_nor_generator() -> None:
    config, model = tiny()
    result = cost(config, method="finetune")
    assert (result.lora_params, result.generator_params, result.after) == (0, 0, result.before)
    assert result.memory["weights, gradients, AdamW"] == 16 * count(model)


def test_a_budget_that_cannot_be_met_is_named_and_still_estimated() -> None:
    result = cost(LLAMA_3_8B, budget={"keep": 0.1})
    assert result.problem is not None
    assert "budget.keep=0.1 of total" in result.problem
    assert "0.152" in result.problem
    assert cost(LLAMA_3_8B, budget={"keep": 0.1, "of": "block"}).problem is None


def test_what_processes_and_4_bits_do_not_go_with_is_told_before_a_gpu_is_rented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole = {"train": {"batch": 8}}
    assert cost(LLAMA_3_8B, **whole).problem is None
    assert cost(LLAMA_3_8B, train={"batch": 8, "shard": "full"}, search={"batch": 6}).problem == (
        "a decision step of 6 windows cannot be shared evenly by 4 processes, which train.shard=full needs; give it 8"
    )
    assert "leaves some of 4 processes without one" in (cost(LLAMA_3_8B, train={"batch": 2}).problem or "")
    both = cost(LLAMA_3_8B, train={"batch": 8, "shard": "full"}, model={"quantize": "nf4"}).problem
    assert "model.quantize needs whole weights and does not go with train.shard=full" in (both or "")
    compiled = cost(LLAMA_3_8B, train={"batch": 8, "compile": True}, model={"quantize": "nf4"}).problem
    assert "does not go with train.compile=true" in (compiled or "")


def test_a_refused_family_gives_its_reason() -> None:
    with pytest.raises(UserError, match="'mixtral' is refused: its MLP is already a set of experts"):
        cost({"model_type": "mixtral"})


def test_solves_cost_what_a_flop_counter_sees_and_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = tiny(**WIDE)
    job, shares = (
        job_of(recipe_of(config, compensate=words), model.config, structure_of(model.config)) for words in ({}, {"matrices": 0})
    )
    monkeypatch.setattr(least_squares, "LEAF", 1)
    counted = factor = triangle = 0.0
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            kept, gone = module.in_features // 4, module.in_features - module.in_features // 4
            takeover = Takeover.of(torch.eye(module.in_features), torch.arange(kept), 0.01)
            assert takeover is not None
            with FlopCounterMode(display=False) as counter:
                takeover.weight(module.weight.detach())
            counted, factor = counted + counter.get_total_flops(), factor + kept**3 / 3 + 2 * gone * kept**2
            with FlopCounterMode(display=False) as counter:
                least_squares._lower_inverse(takeover.root)
            triangle += counter.get_total_flops()
    assert counted > 0
    assert job.solve(0.25) == pytest.approx(counted + factor)
    assert shares.solve(0.25, judging=True) - job.solve(0.25) == pytest.approx(triangle, rel=0.01)
    widths = sum(width**3 for width in job.consumers)
    assert job.solve(1.0, judging=True) == pytest.approx((1 / 3 + 2) * widths)
    assert shares.solve(1.0, judging=True) == pytest.approx(widths)


def test_solves_come_once_a_step_of_a_search_that_compensates_and_once_at_a_rivals_cut() -> None:
    config, model = tiny(**WIDE)
    found = {}
    for name, words in {
        "none": {"compensate": {"weights": "none"}},
        "ten": {"compensate": {"weights": "adapt"}, "search": {"steps": 10}},
        "twenty": {"compensate": {"weights": "adapt"}, "search": {"steps": 20}},
        "taylor": {"method": "twostage", "twostage": {"scores": "taylor"}, "compensate": {"weights": "adapt"}},
        "taylor_ls": {"method": "twostage", "twostage": {"scores": "taylor", "least_squares": True}},
        "generator": {"method": "twostage", "twostage": {"scores": "generator"}, "compensate": {"weights": "adapt"}},
        "generator_ls": {"method": "twostage", "twostage": {"scores": "generator", "least_squares": True}},
        "every_fourth": {
            "method": "twostage",
            "twostage": {"scores": "generator"},
            "compensate": {"weights": "adapt"},
            "search": {"decide_every": 4},
        },
        "decide": {"compensate": {"weights": "decide"}, "search": {"steps": 10}},
    }.items():
        recipe = recipe_of(config, **{"budget": {"keep": 0.6}, **words})
        job = job_of(recipe, model.config, structure_of(model.config))
        found[name] = [phase.solve_flops for phase in phases(job, None)]
        slow, fast = (phases(job, Machine("a", 1e12, exact))[0].seconds or 0.0 for exact in (1e11, 1e30))
        assert slow == pytest.approx(fast + found[name][0] / 1e11)
    assert found["none"] == [0.0] * 2
    assert found["taylor"] == [0.0] * 2
    assert found["ten"][0] > 0
    assert found["ten"][1] == found["generator"][1] == found["taylor_ls"][1] == 0
    last = job.solve(job.part)  # of the Plan
    assert found["twenty"][0] - last == pytest.approx(2 * (found["ten"][0] - last), rel=0.05)
    assert found["taylor_ls"][0] == found["generator_ls"][0] == job.solve(job.part)
    assert found["every_fourth"][0] == pytest.approx(found["generator"][0] / 4, rel=0.2)
    assert found["decide"][0] > found["ten"][0] + job.solve(1.0)


def test_expected_time_is_operations_over_the_measured_rates() -> None:
    config, _ = tiny()
    result = estimate(recipe_of(config, compensate={"weights": "decide"}))
    assert result.machine
    assert result.machine.matmul > 1e7
    assert result.phases[0].solve_flops
    for phase in result.phases:
        assert phase.seconds == pytest.approx(phase.flops / result.machine.matmul + phase.solve_flops / result.machine.exact)


def test_a_machine_with_slow_memory_or_a_slow_link_takes_longer() -> None:
    config, model = tiny(**WIDE)
    job = job_of(recipe_of(config, compensate={"weights": "decide"}), model.config, structure_of(model.config))
    steps = [
        [phase.seconds or 0.0 for phase in phases(job, Machine("a", 1e12, 1e12, copied, link))]
        for copied, link in ((1e12, 1e12), (1e11, 1e12), (1e12, 1e9))
    ]
    (search, recover), (slow_search, slow_recover), (far_search, far_recover) = steps
    assert slow_search > search
    assert slow_recover > recover
    carried = phases(job, None)[0].carried
    # for each of the twenty decide turns, for the innovations of the open model before the first, and for the Plan
    each = sum(9 / 4 * width**2 + 4 * 128 * width for width in job.consumers)
    assert carried == pytest.approx(22 * each)
    assert far_search - search == pytest.approx(carried / 1e9, rel=0.01)
    assert far_recover == recover


def test_a_step_takes_at_least_what_the_host_takes_to_launch_its_blocks() -> None:
    quick, slow = (replace(named("h100"), matmul=rate, copied=rate, block=0.01) for rate in (1e30, 1e9))
    config, model = tiny(**WIDE)
    layers, structure = model.config.num_hidden_layers, structure_of(model.config)

    def steps(machine: Machine, **sections: Any) -> list[float]:
        job = job_of(recipe_of(config, **sections), model.config, structure)
        return [phase.step_seconds or 0.0 for phase in phases(job, machine)]

    apart = {"train": {"batch": 4, "micro_batch": 1}, "search": {"batch": 2}}
    assert steps(quick, train={"batch": 4}) == pytest.approx([layers * 0.01 * (2.2 + 1.4 * 2.2), layers * 0.01 * 2.2])
    assert steps(quick, **apart) == pytest.approx([layers * 0.01 * (4 * 2.2 + 2 * 1.4 * 2.2), layers * 0.01 * 4 * 2.2])
    again = {"model": {"checkpointing": "non_reentrant"}, "recover": {"checkpointed": 0.5}}
    assert steps(quick, **apart, **again)[1] == pytest.approx(layers * 0.01 * 4 * 2.7)
    assert steps(quick, method="finetune", train={"batch": 4}) == pytest.approx([0.0]), (
        "of passes without LoRA nothing is known"
    )
    assert steps(slow) == steps(replace(slow, block=None)), "kernels take longer"
    large = {"train": {"batch": 2}, "search": {"batch": 6}}
    assert steps(quick, **large) == pytest.approx([layers * 0.01 * (2.2 + 1.4 * 2.2), layers * 0.01 * 2.2]), "one pass each"
    uneven = {"train": {"batch": 4, "micro_batch": 3}}
    assert steps(quick, **uneven)[1] == pytest.approx(layers * 0.01 * 2 * 2.2), "of three windows and of one"


def test_a_pass_holds_no_more_than_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(LLAMA_3_8B, train={"batch": 32, "micro_batch": 8})
    config = load_config(recipe.model)
    for processes, expected in ((1, (32, 8)), (4, (8, 8)), (8, (4, 4)), (5, (7, 7))):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert windows(recipe, 32) == expected
        assert job_of(recipe, config, structure_of(config), "cuda").pass_tokens == 32 * expected[1]


def test_gates_gradients_and_compiled_blocks_move_what_they_move() -> None:
    config, model = tiny(**WIDE)
    structure = structure_of(model.config)
    job, again = (
        job_of(recipe_of(config, model={"checkpointing": kind}), model.config, structure) for kind in ("none", "non_reentrant")
    )
    plain = traffic.turn(job)
    gated = 8 * (128 + 256)  # A + F of eight layers
    assert traffic.turn(job, gates=traffic.LEAVES) - plain == pytest.approx(traffic.LEAVES * gated)
    assert traffic.turn(again) - plain == pytest.approx(traffic.look(job))
    head = traffic.HEAD * 1024
    assert traffic.turn(job, compiled=True) - head == pytest.approx(traffic.COMPILED * (plain - head))
    assert traffic.look(job) < traffic.turn(job, 0.5) < plain
    nf4 = job_of(recipe_of(config, model={"quantize": "nf4", "checkpointing": "non_reentrant"}), model.config, structure)
    passes = 3 * traffic.DEQUANTISED * structure.prunable_params / 2  # forward, again, backward; of half the units
    assert traffic.turn(nf4, 0.5) - traffic.turn(again, 0.5) == pytest.approx(passes / (2 * 32))


def test_host_memory_is_filled_once_before_the_first_step() -> None:
    wanted = {"device": "cuda", "compensate": {"weights": "decide"}, "search": {"steps": 2}, "recover": {"steps": 1}}
    config, one = LLAMA_3_8B, {"generator": {"prior_steps": 1}}

    recipe = recipe_of(config, **wanted, **one)
    job = job_of(recipe, load_config(recipe.model), structure_of(load_config(recipe.model)), "cuda")
    written = sum(9 / 4 * width**2 + 4 * 4096 * width for width in job.consumers)
    assert job.solves().written == pytest.approx(written)
    at_once, found = (phases(job, replace(named("h200"), host=rate))[0] for rate in (None, written / 7))
    assert (found.seconds or 0.0) - (at_once.seconds or 0.0) == pytest.approx(7)
    assert found.step_seconds == at_once.step_seconds
    device = recipe_of(config, **{**wanted, "compensate": {"weights": "decide", "offload": False}}, **one)
    assert job_of(device, job.config, job.structure, "cuda").solves().written == 0
    quantized_ = recipe_of(config, **wanted, **one, model={"quantize": "nf4"})
    more = job_of(quantized_, job.config, job.structure, "cuda").solves().written - written
    consumers, blocks = 4096 * sum(job.consumers), job.structure.prunable_params
    assert more == pytest.approx(4 * (consumers + job.part * blocks)), "originals that compensate, and those of the cut model"


@pytest.mark.parametrize(
    ("what", "phase", "seconds"),
    [
        # benchmarks/cost.py llama-3-8b on an H200: medians of its steps, of which no rows were kept
        ({"budget": {"keep": 1.0}, "search": {"steps": 0}, "generator": {"prior": "wanda"}}, "recover", 0.932),
    ],
    ids=["dense"],
)
def test_steps_measured_on_an_h200_are_expected_within_a_quarter(what: dict[str, Any], phase: str, seconds: float) -> None:
    words: dict[str, Any] = {
        "device": "cuda",
        "data": {"max_length": 1024},
        "train": {"batch": 8, "precision": "bfloat16", **what.pop("train", {})},
        "lora": {"rank": 32},
        "model": {"checkpointing": "non_reentrant", "dtype": "bfloat16"},
    }
    result = estimate(recipe_of(LLAMA_3_8B, **{**words, **what}), gpu="h200")
    (found,) = (each for each in result.phases if each.name == phase)
    assert found.step_seconds == pytest.approx(seconds, rel=0.25)
    assert result.machine == named("h200")


def test_whole_runs_measured_on_a_gpu_are_expected_within_a_quarter() -> None:
    rows = json.loads((Path(__file__).parent.parent / "docs" / "results" / "cost.json").read_text(encoding="utf-8"))
    held = [row for row in rows if row["what"] not in cost_of_a_run.EARLIER and "search_steps" in row]
    assert {"H200", "H100"} <= {row["gpu"].split()[1] for row in held}
    for row in held:
        found = estimate(cost_of_a_run.asked(row), gpu=cost_of_a_run.sheet_of(row["gpu"]))
        assert sum(phase.seconds or 0.0 for phase in found.phases) == pytest.approx(row["seconds"], rel=0.25)
        assert sum(found.memory.values()) / 2**30 == pytest.approx(row["peak_gib"], rel=0.25)
        for phase in ("search", "recover"):
            (step,) = (each.step_seconds for each in found.phases if each.name == phase)
            assert step == pytest.approx(row[f"{phase}_step_seconds"], rel=0.25)


def test_steps_that_are_compiled_are_those_measured_on_a_gpu_and_what_compiling_takes_is_counted() -> None:
    """Of an earlier program, which compiled a graph for each layer; the steps are the same."""
    rows = json.loads((Path(__file__).parent.parent / "docs" / "results" / "cost.json").read_text(encoding="utf-8"))
    (row,) = (row for row in rows if row["what"] == "compiled, a graph a width")
    recipe = cost_of_a_run.asked(row)
    assert recipe.train.compile is True
    eager = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    found, plain = (estimate(each, gpu="h100") for each in (recipe, eager))
    (recover,) = (each for each in found.phases if each.name == "recover")
    assert recover.step_seconds == pytest.approx(row["recover_step_seconds"], rel=0.25)
    assert sum(found.memory.values()) / 2**30 == pytest.approx(row["peak_gib"], rel=0.25)
    steps = row["recover_steps"] * (recover.step_seconds or 0.0)
    assert (recover.seconds or 0.0) - steps == pytest.approx(SYMBOLIC)
    taken = row["recover_seconds"] - row["recover_steps"] * row["recover_step_seconds"]
    assert taken == pytest.approx(recipe.model.config["num_hidden_layers"] * GRAPH, rel=0.25), "a graph for each layer"
    assert [each.seconds for each in found.phases[:-1]] == [each.seconds for each in plain.phases[:-1]]
    few, some = (
        recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"config": {**recipe.model.config, "num_hidden_layers": layers}})}
        )
        for layers in (4, 8)
    )
    uniform = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"layout": "uniform"})})
    for changed, wanted in ((few, FIRST_GRAPH), (some, 8 * GRAPH), (uniform, FIRST_GRAPH)):
        phase = estimate(changed, gpu="h100").phases[-1]
        assert (phase.seconds or 0.0) - phase.steps * (phase.step_seconds or 0.0) == pytest.approx(wanted)


def test_layers_are_compiled_where_that_is_expected_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the H100 of docs/results/cost.json what compiling took was paid back by some 260 steps of recovery."""

    def compiled(steps: int, gpu: str | None = "h100", **words: Any) -> bool:
        train = {"batch": 8, "precision": "bfloat16", **words.pop("train", {})}
        model = {"dtype": "bfloat16", "checkpointing": "non_reentrant", **words.pop("model", {})}
        data, recover = {"max_length": 1024}, {"steps": steps}
        recipe = recipe_of(LLAMA_3_8B, device="cuda", data=data, recover=recover, train=train, model=model, **words)
        assert recipe.train.compile == "auto", "the default"
        return estimate(recipe, measure=False, gpu=gpu).compiled

    assert [compiled(steps) for steps in (100, 200, 400, 1000)] == [False, False, True, True]
    assert not compiled(1000, gpu=None), "on a GPU that nobody knows"
    assert not compiled(1000, model={"quantize": "nf4"})
    assert compiled(1000, train={"shard": "full"}), "no effect on one process"
    tuned = {"method": "finetune", "train": {"steps": 1000}}
    assert compiled(1, model={"path": "builtin:base-10m", "init": "pretrained", "config": {}}, **tuned)
    assert not compiled(1, **tuned), "all weights"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compiled(1000), "each with the whole model"
    assert not compiled(1000, train={"shard": "full"})
    assert not estimate(recipe_of(LLAMA_3_8B, recover={"steps": 10**6})).compiled, "on a CPU"


def test_a_device_is_known_by_its_data_sheet_by_the_name_it_gives_itself() -> None:
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A10G",
    )
    assert sheet_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert [sheet_of(name) for name in names] == ["h100", "a100", "a100-40gb", "rtx-4090", None]


@pytest.mark.parametrize("made_by", [growth, scale])
def test_steps_of_other_sizes_and_of_several_gpus_are_expected_within_a_quarter(
    made_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two constants are from a row of growth (4 windows: launches); by both it was seen which fits are not the steps'.

    Rows of an earlier program are left out: one of them (``no block ahead``, fp32) took 1.6 times what is expected. What
    processes send one another is not counted: four sharded GPUs, which had most to send, took 1.6 and 1.95 times that.
    """
    file = Path(__file__).parent.parent / "docs" / "results" / f"{made_by.__name__}.json"
    held = [row for row in json.loads(file.read_text(encoding="utf-8")) if not row.get("program")]
    assert len(held) > 3
    for row in held:
        monkeypatch.setenv("WORLD_SIZE", str(row.get("gpus", 1)))
        found = estimate(made_by.asked(row), gpu=cost_of_a_run.sheet_of(row["gpu"]))
        steps = [phase.step_seconds or 0.0 for phase in found.phases]
        taken = [row["decide_seconds"] + row["adapt_seconds"], row["recover_seconds"]]
        if (row.get("way"), row.get("gpus")) == ("full", 4):
            assert all(took > 1.25 * expected for took, expected in zip(taken, steps, strict=True)), "what it sends is counted"
        else:
            assert steps == pytest.approx(taken, rel=0.25)
        peak = row["atp_peak_gib"] if made_by is growth else row["peak_gib"]
        assert sum(found.memory.values()) / 2**30 == pytest.approx(peak, rel=0.25)


def test_a_gpu_that_is_not_in_the_table_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"--gpu 'h20' is unknown. Did you mean 'h200'.* Known: a10, a100"):
        estimate(recipe_of(LLAMA_3_8B), gpu="h20")


def test_tables_and_json_show_the_figures() -> None:
    recipe = recipe_of(LLAMA_3_8B)
    result = estimate(recipe, measure=False)
    out = io.StringIO()
    render(result, recipe, Console(file=out, width=120))
    for figure in ("8,030,261,248", "(0.540)", "14,336", "search", "Nothing was timed for cpu, float32"):
        assert figure in out.getvalue()
    assert json.loads(json.dumps(result.to_dict()))["before"]["total"] == 8_030_261_248


def test_a_model_that_does_not_fit_is_told_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(gpu: str, **words: Any) -> str:
        recipe = recipe_of({**LLAMA_3_8B, "num_hidden_layers": 160}, device="cuda", **words)
        out = io.StringIO()
        render(estimate(recipe, gpu=gpu), recipe, Console(file=out, width=400))
        return out.getvalue()

    wide = told("a10")
    for way in ("times what the a10 has: try a smaller train.micro_batch", "model.quantize=nf4", "train.shard=full on several"):
        assert way in wide
    assert "of one process" in wide
    assert "times what" not in told("b200")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = told("a10", train={"shard": "full"}, model={"checkpointing": "non_reentrant"})
    assert "try more processes." in shared, "micro-batches are of one window, blocks checkpointed"
    assert "of one of 2 processes" in shared


def test_lora_aware_settles_on_the_uncut_model_out_of_the_recoverys_steps() -> None:
    aware = {"lora": {"semantics": "lora_aware", "settle": 0.5}}
    rows = {phase.name: phase for phase in cost(LLAMA_3_8B, **aware).phases}
    plain = {phase.name: phase for phase in cost(LLAMA_3_8B).phases}
    assert rows["settle"].steps + rows["recover"].steps == plain["recover"].steps
    assert rows["settle"].flops / rows["settle"].steps > rows["recover"].flops / rows["recover"].steps


def test_what_tune_refuses_is_a_problem_here() -> None:
    result = cost(LLAMA_3_8B, budget={"keep": 0.611, "layout": "uniform", "ffn_multiple": 2048})
    assert result.problem is not None
    assert "budget.layout=uniform" in result.problem


def test_windows_beyond_the_model_are_a_problem_here_too() -> None:
    config = {**WIDE, "model_type": "llama", "max_position_embeddings": 16}
    problem = cost(config).problem
    assert problem is not None
    assert "data.max_length=32 exceeds the model's max_position_embeddings=16" in problem


def test_the_70b_plan_on_paper_is_what_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    shape = json.loads((root / "benchmarks" / "shapes.json").read_text())["llama-3-70b"]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 8192}))
    changes = [f"model.path={tmp_path}", "train.micro_batch=1", "train.shard=full"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = estimate(load(root / "recipes" / "llama-3-8b-casehold.yaml", changes), gpu="h100")
    text = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    told = {name: float(number) for name, number in re.findall(r"^\| ([a-zA-Z, ]+) \| ([\d.]+) \|", text, re.MULTILINE)}
    expected = {**found.memory, **found.host_memory, "sum": sum(found.memory.values())}
    assert told == {name: round(value / 1e9, 2) for name, value in expected.items()}
    (passing,) = re.findall(r"activations ([\d.]+), logits ([\d.]+), whole meanwhile ([\d.]+)", text)
    monkeypatch.setattr("slimtune.estimate.memory.SOLVE", 0)
    names = ("activations", "logits", "weights that are whole meanwhile")
    short = estimate(load(root / "recipes" / "llama-3-8b-casehold.yaml", changes), gpu="h100").memory
    assert list(map(float, passing)) == [round(short[name] / 1e9, 2) for name in names]
    assert f"{sum(short[name] for name in names) / 1e9:.2f} GB" in text


def test_processes_that_share_a_model_have_a_part_of_its_weights_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    model, compensate = {"checkpointing": "non_reentrant"}, {"weights": "decide"}
    whole, part = (
        cost(LLAMA_3_8B, model=model, compensate=compensate, train={"shard": shard, "batch": 8}) for shard in ("none", "full")
    )
    assert part.memory["weights"] == pytest.approx(whole.memory["weights"] / 4)
    for name in ("LoRA, gradients, AdamW", "compensation"):  # of which innovations are all
        assert part.memory[name] == whole.memory[name], "replicated"
    assert part.phases[0].solve_flops == whole.phases[0].solve_flops
    monkeypatch.delenv("WORLD_SIZE")
    alone = cost(LLAMA_3_8B, model=model, compensate=compensate, train={"batch": 8})
    assert part.phases[0].solve_flops == pytest.approx(alone.phases[0].solve_flops / 4), "each fits its own layers"

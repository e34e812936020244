"""Learning rates by hand, and optimiser moments that survive a physical cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated import random_model, random_plan, sample_ids
from slimtune.models.hooks import place_gates
from slimtune.models.surgery import cut
from slimtune.prune.budget import masks_of
from slimtune.prune.gates import MaskBank
from slimtune.sections import TrainConfig
from slimtune.train.optimizers import adamw, carry_over, model_optimizers
from slimtune.train.schedule import generator_factor, lr_factor, set_lr

# --- schedules -------------------------------------------------------------------------------------------------------


def factors(steps: int, **keys: Any) -> list[float]:
    return [lr_factor(step, steps, TrainConfig(**keys)) for step in range(steps)]


def test_warm_up_then_cosine() -> None:
    values = factors(100, warmup=0.04, final_lr=0.1)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[51] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the 96 decaying steps are done
    assert values[27] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert values[99] == pytest.approx(0.1)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_linear_decay_over_the_last_part() -> None:
    values = factors(10, warmup=0.0, schedule="linear", decay=0.4, final_lr=0.2)
    assert values == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_constant() -> None:
    assert factors(5, warmup=0.4, schedule="constant") == pytest.approx([0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_short_runs_and_extreme_parts_stay_between_0_and_1(steps: int, warmup: float, decay: float) -> None:
    assert all(0 < value <= 1 for value in factors(steps, warmup=warmup, decay=decay))


def test_the_generators_rate_falls_in_the_last_fifth() -> None:
    assert [generator_factor(step, 10) for step in range(10)] == [1.0] * 8 + [0.2] * 2


def test_set_lr_scales_the_peak_of_every_group() -> None:
    optimizer = adamw([nn.Parameter(torch.zeros(1))], 0.5, 0.0)
    assert set_lr(optimizer, 0.5) == 0.25
    assert set_lr(optimizer, 0.5) == 0.25, "of the peak, not of the last rate"


# --- optimisers over a cut -------------------------------------------------------------------------------------------


def loss_of(model: nn.Module) -> Tensor:
    ids = sample_ids()
    logits = model(input_ids=ids).logits  # fp64: cut and masked then agree to 1e-12, and AdamW cannot blow that up
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("name", ["llama-bias", "phi"])
def test_moments_are_carried_over_a_cut(name: str) -> None:
    outcomes = []
    for is_cut in (False, True):
        model, structure = random_model(name, rank=3)
        model.double()
        plan, bank = random_plan(structure, 6), MaskBank()
        handles = place_gates(model, structure, bank.consumer, bank.base)
        bank.close({site: mask.double() for site, mask in masks_of(plan).items()})
        optimizer = adamw(model.parameters(), 1e-2, 0.1)
        for _ in range(3):
            update(model, optimizer)
        order = [id(p) for p in optimizer.param_groups[0]["params"]]
        if is_cut:
            for handle in handles:
                handle.remove()
            replaced = cut(model, structure, plan)
            carry_over(optimizer, replaced)
            assert {id(item.new) for item in replaced} <= {id(p) for p in model.parameters()}
            assert len(optimizer.param_groups[0]["params"]) == len(order)
        losses = [update(model, optimizer), update(model, optimizer)]
        if not is_cut:
            cut(model, structure, plan)  # only to compare the kept entries
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in trained]
            assert set(optimizer.state) == set(trained), "no moments of parameters that are gone"
        outcomes.append((losses, {key: p.detach() for key, p in model.named_parameters()}))
    (masked_losses, masked), (cut_losses, small) = outcomes
    assert cut_losses == pytest.approx(masked_losses, rel=1e-9)
    for key, value in masked.items():
        assert torch.allclose(small[key], value, atol=1e-9), key


def test_forgotten_moments_would_be_noticed() -> None:
    def after(forget: bool) -> dict[str, Tensor]:
        model, structure = random_model("llama", rank=3)
        optimizer = adamw(model.parameters(), 1e-2, 0.0)
        update(model, optimizer)
        replaced = cut(model, structure, random_plan(structure, 6))
        carry_over(optimizer, replaced)
        if forget:
            for item in replaced:
                optimizer.state.pop(item.new)
        update(model, optimizer)
        return {key: p.detach() for key, p in model.named_parameters() if "lora_" in key}

    kept, forgotten = after(False), after(True)
    assert max(float((kept[key] - forgotten[key]).abs().max()) for key in kept) > 1e-4


def test_a_saved_state_loads_after_the_cut() -> None:
    model, structure = random_model("llama", rank=3)
    optimizer = adamw(model.parameters(), 1e-2, 0.0)
    update(model, optimizer)
    carry_over(optimizer, cut(model, structure, random_plan(structure, 6)))
    again = adamw(model.parameters(), 1e-2, 0.0)
    again.load_state_dict(optimizer.state_dict())
    for parameter in optimizer.param_groups[0]["params"]:
        assert again.state[parameter]["exp_avg"].shape == parameter.shape
        assert torch.equal(again.state[parameter]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon needs torch >= 2.9")
    model, _ = random_model("llama-bias")
    muon, rest = model_optimizers(model, TrainConfig(optimizer="muon"))
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    others = {id(p) for p in rest.param_groups[0]["params"]}
    assert matrices | others == {id(p) for p in model.parameters()}
    assert not matrices & others
    named = {id(p): name for name, p in model.named_parameters()}
    assert all(".layers." in named[key] and named[key].endswith("proj.weight") for key in matrices)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {named[key] for key in others}

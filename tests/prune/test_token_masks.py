from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.prune.experts import ExpertGenerator
from slimtune.prune.sampling import topped
from slimtune.prune.token_masks import NAMES, TokenMasks, head_logits
from slimtune.sections import MoeConfig
from slimtune.structure.heads import STATE


@pytest.fixture
def masks() -> TokenMasks:
    torch.manual_seed(0)
    made = TokenMasks(24, 2, 16)
    with torch.no_grad():
        for each in made.makes:
            each.mul_(1000)
    return made


def x_of(seed: int = 1) -> Tensor:
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_every_token_has_its_own_dimensions_and_all_equally_many(masks: TokenMasks, noise: float) -> None:
    masks.configure(5, 0.4, noise)
    found = masks.mask(0, x_of(), masks.states[0])
    assert torch.equal(found.sum(-1), torch.full((3, 7), 5.0))
    assert len({tuple(row) for row in found.flatten(0, 1).tolist()}) > 5
    logits = masks.logits(0, x_of(), masks.states[0])
    best = torch.zeros_like(logits).scatter_(-1, logits.topk(5, -1).indices, 1.0)
    assert torch.equal(found, best) == (noise == 0)
    masks.eval()
    assert torch.equal(masks.mask(0, x_of(), masks.states[0]), best), "noise is for training"


def test_masks_have_the_gradient_of_the_sigmoid_above_the_last_one(masks: TokenMasks) -> None:
    masks.configure(5, 0.4)
    pull = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    (masks.mask(1, x_of(), masks.states[1]) * pull).sum().backward()
    logits = masks.logits(1, x_of(), masks.states[1]).detach()
    soft = ((logits - logits.topk(5, -1).values[..., -1:]) / 0.4).sigmoid()
    slope = soft * (1 - soft)
    felt = (pull * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)  # by the level, which moves with them
    torch.testing.assert_close(masks.biases[1].grad, ((pull - felt) * slope / 0.4).sum((0, 1)))
    for name, parameter in masks.named_parameters():
        here = name.split(".")[1] == "1"
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == here, name


def test_free_widths_begin_with_nearly_all_and_have_a_price(masks: TokenMasks) -> None:
    with torch.no_grad():
        masks.makes[0].mul_(1e-3)
    masks.configure(0, 0.4, 0.0, offset=3.0)
    assert masks.mask(0, x_of(), masks.states[0]).min() == 1.0
    masks.price, masks.target = 2.0, 8
    mask = masks.mask(0, x_of(), masks.states[0])
    (0.0 * mask.sum()).backward()
    assert masks.biases[0].grad is not None
    assert (masks.biases[0].grad > 0).all(), "less of all: the widest token has 16 of 8"
    masks.configure(5, 0.4)
    masks.zero_grad()
    (0.0 * masks.mask(0, x_of(), masks.states[0]).sum()).backward()
    assert masks.biases[0].grad.abs().max() == 0, "a width that is fixed costs nothing"


def test_what_the_generator_says_stands_for_the_own_state_until_that_is_settled(masks: TokenMasks) -> None:
    masks.configure(5, 0.4)
    said = torch.randn(2, STATE, generator=torch.Generator().manual_seed(3))
    masks.follow(0, x_of(), said[0])
    before = masks.masks[0]
    masks.follow(0, x_of(), torch.empty(0))
    assert not torch.equal(masks.masks[0], before)
    masks.settle(said)
    masks.follow(0, x_of(), torch.empty(0))
    assert torch.equal(masks.masks[0], before)
    assert masks.tensors().keys() == {f"{layer}.{name}" for layer in range(2) for name in NAMES}
    masks.forget()
    assert not masks.masks


def test_pairs_are_the_best_of_each_layer() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    found = topped(logits, 5, 0.4)
    assert torch.equal(found.sum(1), torch.full((3,), 5.0))
    assert torch.equal(found[0].nonzero().flatten(), logits[0].topk(5).indices.sort().values)
    found[1, 2].backward()
    assert logits.grad is not None
    assert logits.grad[1, 2] > 0
    assert logits.grad[1].sum().abs() < 1e-6, "the others' are as much less: as many stay"
    assert logits.grad[[0, 2]].count_nonzero() == 0
    assert torch.equal(topped(logits, 0, 0.4, offset=3.0).detach(), (logits > -3).float())


def test_logits_of_scores_keep_their_order_and_have_the_scale() -> None:
    scores = torch.tensor([[1e-3, 2.0, 1e3, 0.0], [4.0, 3.0, 2.0, 1.0]])
    found = head_logits(scores, 4.0)
    assert torch.equal(found.argsort(1), scores.argsort(1))
    torch.testing.assert_close(found.std(1), torch.full((2,), 4.0))


@pytest.mark.parametrize("kind", ["gru", "direct"])
def test_with_pairs_the_generator_goes_through_attention_and_mlp_by_turns(kind: str) -> None:
    torch.manual_seed(0)
    config = MoeConfig(generator=kind)
    made = ExpertGenerator(3, 20, 4, config, pairs=8)
    made.pair_prior.fill_(2.0)
    found = made.made()
    assert (found.channels.shape, found.pairs.shape, found.states.shape) == ((3, 20, 4), (3, 8), (3, STATE))
    assert (found.pairs - 2.0).abs().max() < 1.0
    assert torch.equal(made(), found.channels)
    (found.pairs[1].square().sum() + found.states[1].sum()).backward()
    if kind == "gru":
        gradient = made.inputs.grad
        assert gradient is not None
        assert made.inputs.shape == (6, 4, 32)
        assert (gradient.abs().amax((1, 2)) > 0).all(), "attention of a layer hears of the layers before and behind"
        with torch.no_grad():
            states, _ = made.gru(made.inputs)
            torch.testing.assert_close(found.states, states[[0, 2, 4]].mean(1))
    torch.manual_seed(0)
    assert not [name for name in ExpertGenerator(3, 20, 4, config).state_dict() if "pair" in name or "states" in name]

from __future__ import annotations

import pytest
import torch

from slimtune.prune.experts import ExpertGenerator, partitioned, union_loss
from slimtune.prune.sampling import topped
from slimtune.sections import MoeConfig

SIZES = torch.tensor([10, 6, 6, 6, 4])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 32, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_each_channel_is_in_one_slot_and_slots_are_full(logits: torch.Tensor) -> None:
    masks = partitioned(logits, SIZES, 0.4)
    assert torch.equal(masks.detach().sum(-1), torch.ones(2, 32))
    assert torch.equal(masks.detach().sum(1), SIZES.float().expand(2, -1))


def test_what_raises_a_whole_slot_has_no_gradient(logits: torch.Tensor) -> None:
    masks = partitioned(logits, SIZES, 0.4)
    pull = torch.randn(masks.shape, generator=torch.Generator().manual_seed(1))
    (masks * pull).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad.sum(2), torch.zeros(2, 32), atol=1e-5, rtol=0)  # of a softmax, before centring
    assert logits.grad.abs().max() > 1e-3
    assert torch.equal(partitioned(logits + 7.0, SIZES, 0.4), masks)


def test_gradients_point_to_where_a_channel_is_wanted(logits: torch.Tensor) -> None:
    masks = partitioned(logits, SIZES, 0.4)
    masks[0, 3, 2].backward()
    assert logits.grad is not None
    assert logits.grad[0, 3, 2] > 0
    assert logits.grad[1].abs().max() == 0


def test_overlapping_experts_have_their_width(logits: torch.Tensor) -> None:
    masks = topped(logits, 7, 0.4, dim=1)
    assert torch.equal(masks.detach().sum(1), torch.full((2, 5), 7.0))


def test_what_raises_a_whole_expert_changes_nothing_and_has_no_gradient(logits: torch.Tensor) -> None:
    """As many channels stay whatever the level, so that a loss that wants all of them must not drive logits up for ever."""
    masks = topped(logits, 7, 0.4, dim=1)
    assert torch.equal(topped(logits + 7.0, 7, 0.4, dim=1), masks)
    weights = torch.rand(masks.shape, generator=torch.Generator().manual_seed(2))
    (weights * masks).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    assert logits.grad.abs().max() > 1e-3
    logits.grad = None
    topped(logits, 7, 0.4, dim=1).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-5, rtol=0)


def test_the_union_by_hand() -> None:
    masks = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]])  # three of four channels
    assert union_loss(masks).item() == pytest.approx(torch.log(torch.tensor(1.001 / 0.751)).item(), rel=1e-6)
    assert union_loss(torch.ones(2, 4, 2)).item() == 0.0


@pytest.mark.parametrize("kind", ["gru", "direct"])
def test_a_generator_starts_from_its_prior_and_reaches_every_layer(kind: str) -> None:
    torch.manual_seed(0)
    made = ExpertGenerator(3, 20, 4, MoeConfig(generator=kind))
    prior = torch.randn(3, 20, 4)
    made.set_prior(prior)
    found = made()
    assert found.shape == (3, 20, 4)
    assert (found - prior).abs().max() < 1.0
    found[2].square().sum().backward()
    parameters = dict(made.named_parameters())
    if kind == "gru":
        assert parameters["gru.weight_ih_l0"].grad.abs().max() > 0  # along the depth
        assert parameters["inputs"].grad[0].abs().max() > 0
    else:
        assert parameters["free"].grad[2].abs().max() > 0

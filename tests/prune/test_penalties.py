"""Group lasso: norms and loss by hand, the proximal step against its closed form, joint groups, hard zero; mask banks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gated import random_model, random_plan
from slimtune.models.surgery import linears_of, lora_slices
from slimtune.prune.budget import masks_of
from slimtune.prune.gates import MaskBank, mean_over_ranks
from slimtune.prune.penalties import group_norms, lasso_loss, proximal

SITE = (0, "ffn")


@dataclass
class Piece:
    tensor: Tensor
    dim: int
    rows: int


def hand_made() -> dict[tuple[int, str], list[Piece]]:
    """Two units: rows of B (two rows a unit) and columns of A (one a unit). Joint norms 5 and 13."""
    b = torch.tensor([[1.0, 2.0], [2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    a = torch.tensor([[4.0, 12.0]])
    return {SITE: [Piece(b, 0, 2), Piece(a, 1, 1)]}


# --- norms and loss --------------------------------------------------------------------------------------------------


def test_norms_are_joint_over_coupled_matrices() -> None:
    assert group_norms(hand_made())[SITE].tolist() == pytest.approx([5.0, 13.0])


def test_the_lasso_loss_by_hand() -> None:
    groups = {**hand_made(), (1, "ffn"): [Piece(torch.tensor([[3.0], [4.0]]), 0, 1)]}
    masks = {SITE: torch.tensor([1.0, 0.0]), (1, "ffn"): torch.tensor([0.0, 0.0])}
    assert float(lasso_loss(groups, masks)) == pytest.approx((13 + 3 + 4) / 2)  # mean over two layers


def test_the_lasso_gradient_is_the_unit_vector_of_pruned_groups_and_finite_at_zero() -> None:
    groups = hand_made()
    for piece in groups[SITE]:
        piece.tensor.requires_grad_()
    lasso_loss(groups, {SITE: torch.tensor([1.0, 0.0])}).backward()
    b, a = groups[SITE][0].tensor.grad, groups[SITE][1].tensor.grad
    assert torch.allclose(b, torch.tensor([[0.0, 0], [0, 0], [3 / 13, 4 / 13], [0, 0]]))
    assert torch.allclose(a, torch.tensor([[0.0, 12 / 13]]))
    empty = torch.zeros(2, 3, requires_grad=True)
    lasso_loss({SITE: [Piece(empty, 0, 1)]}, {SITE: torch.zeros(2)}).backward()
    assert torch.equal(empty.grad, torch.zeros(2, 3))


def test_groups_of_a_model_hold_the_lora_entries_of_a_unit() -> None:
    model, structure = random_model("phi", rank=3)
    groups = lora_slices(model, structure)
    assert set(groups) == set(structure.sites())
    norms = group_norms(groups)
    modules = {row.path: module for layer, row, module in linears_of(model, structure) if layer == 1}
    rows, heads = slice(32, 64), slice(16, 32)  # unit 1: two query heads of 16, one key/value head
    group = [modules["self_attn.q_proj"].lora_B["default"].weight[rows]]
    group += [modules[f"self_attn.{name}_proj"].lora_B["default"].weight[heads] for name in "kv"]
    group.append(modules["self_attn.dense"].lora_A["default"].weight[:, rows])
    expected = torch.cat([part.flatten() for part in group]).norm()
    assert float(norms[1, "kv_group"][1].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    channel = [modules["mlp.fc1"].lora_B["default"].weight[7], modules["mlp.fc2"].lora_A["default"].weight[:, 7]]
    expected = torch.cat([part.flatten() for part in channel]).norm()
    assert float(norms[1, "ffn"][7].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


# --- the proximal step -----------------------------------------------------------------------------------------------


def test_the_proximal_step_is_the_prox_of_the_group_lasso() -> None:
    # prox of tau |x|: x times max(1 - tau / |x|, 0), the minimiser of tau |y| + |y - x|^2 / 2
    model, structure = random_model("llama-bias", rank=4)
    groups, masks = lora_slices(model, structure), masks_of(random_plan(structure, 2))
    before = {site: [item.tensor.detach().clone() for item in items] for site, items in groups.items()}
    norms = {site: value.detach() for site, value in group_norms(groups).items()}
    left = proximal(groups, masks, 0.5)
    largest = 0.0
    for site, items in groups.items():
        tau = 0.5 * norms[site][masks[site] > 0.5].median()
        for item, old in zip(items, before[site], strict=True):
            for unit in range(len(masks[site])):
                span = slice(unit * item.rows, (unit + 1) * item.rows)
                new, x = (t[span] if item.dim == 0 else t[:, span] for t in (item.tensor.detach(), old))
                factor = 1.0 if masks[site][unit] else max(1 - float(tau / norms[site][unit]), 0.0)
                assert torch.allclose(new, factor * x, atol=1e-7)
        pruned = masks[site] < 0.5
        if pruned.any():
            largest = max(largest, float((norms[site] - tau).clamp(min=0)[pruned].max()))
    assert left == pytest.approx(largest, rel=1e-5)


def test_the_proximal_step_minimises_its_objective() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5)
    piece = Piece(x.clone(), 0, 1)
    tau = 0.3 * float(x[0].norm())
    proximal({SITE: [piece]}, {SITE: torch.tensor([1.0, 0.0])}, 0.3)

    def objective(y: Tensor) -> float:
        return float(tau * y.norm() + (y - x[1]).square().sum() / 2)

    assert torch.equal(piece.tensor[0], x[0])
    assert all(objective(piece.tensor[1]) <= objective(piece.tensor[1] + 0.05 * torch.randn(5)) for _ in range(50))


@pytest.mark.parametrize("pruned", [1, 5, 7])
def test_repeated_steps_empty_pruned_groups_exactly_however_many_they_are(pruned: int) -> None:
    torch.manual_seed(0)
    groups = {SITE: [Piece(torch.rand(8, 6) + 0.1, 0, 1), Piece(torch.rand(3, 8) + 0.1, 1, 1)]}
    kept = [piece.tensor.clone() for piece in groups[SITE]]
    masks = {SITE: (torch.arange(8) >= pruned).float()}
    assert min(proximal(groups, masks, 0.1) for _ in range(25)) == 0.0
    assert not groups[SITE][0].tensor[:pruned].any()
    assert not groups[SITE][1].tensor[:, :pruned].any()
    assert torch.equal(groups[SITE][0].tensor[pruned:], kept[0][pruned:])
    assert torch.equal(groups[SITE][1].tensor[:, pruned:], kept[1][:, pruned:])


def test_nothing_pruned_changes_nothing() -> None:
    groups = hand_made()
    assert proximal(groups, {SITE: torch.ones(2)}, 1.0) == 0.0
    proximal(groups, {SITE: torch.ones(2)}, 0.0, share=1.0)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(groups[SITE], hand_made()[SITE], strict=True))


def test_a_bank_serves_one_kind_of_gate_at_a_time() -> None:
    bank, mask = MaskBank(), torch.tensor([1.0, 0.0])
    assert bank.consumer(0, "ffn") is bank.base(0, "ffn") is None
    bank.close({SITE: mask.requires_grad_()})
    assert bank.base(0, "ffn") is None
    assert bank.consumer(1, "ffn") is None
    assert torch.equal(bank.consumer(0, "ffn"), mask)
    assert not bank.consumer(0, "ffn").requires_grad
    bank.close({SITE: mask}, "base")
    assert bank.consumer(0, "ffn") is None
    assert torch.equal(bank.base(0, "ffn"), mask)
    bank.open()
    assert bank.consumer(0, "ffn") is bank.base(0, "ffn") is None


def test_leaves_are_cut_off_from_the_generators_graph() -> None:
    bank, logits = MaskBank(), torch.zeros(2, requires_grad=True)
    masks = {SITE: logits * 2 + 1}
    leaves = bank.leaves(masks)
    assert leaves[SITE].is_leaf
    (bank.consumer(0, "ffn") * torch.tensor([3.0, 4.0])).sum().backward()
    assert logits.grad is None
    assert mean_over_ranks(leaves)[SITE].tolist() == [3.0, 4.0]
    torch.autograd.backward([masks[SITE]], [mean_over_ranks(leaves)[SITE]])
    assert logits.grad.tolist() == [6.0, 8.0]
    assert bank.leaves(masks)[SITE].grad is None, "gradients do not pile up from step to step"


def test_leaves_without_a_gradient_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="not on the model's path"):
        mean_over_ranks(MaskBank().leaves({SITE: torch.ones(2)}))


def test_a_share_of_one_over_the_steps_left_ends_at_exactly_zero() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    piece = Piece(weight.clone(), 0, 1)
    masks = {SITE: torch.tensor([1.0, 0.0, 1.0, 0.0])}
    left = [proximal({SITE: [piece]}, masks, 0.0, 1 / steps) for steps in (4, 3, 2, 1)]
    largest = float(weight[[1, 3]].norm(dim=1).max())
    assert left == pytest.approx([largest * rest for rest in (0.75, 0.5, 0.25, 0.0)], abs=1e-6)
    assert left[-1] == 0.0
    assert torch.equal(piece.tensor[[0, 2]], weight[[0, 2]])

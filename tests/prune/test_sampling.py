"""Hard samples: exact values, probabilities by counting, gradients against numbers by hand and the general ReinMax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimtune.prune.sampling import draw_noise, keep_probability, sample

KINDS = ("logistic", "gumbel")
ESTIMATORS = ("reinmax", "ste")
CPU = torch.device("cpu")


def gradient(logits: Tensor, noise: Tensor, kind: str, estimator: str, temperature: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    sample(leaf, noise, kind, estimator, temperature).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def general_reinmax(logits: Tensor, hard: Tensor) -> Tensor:
    """d keep / d logit of ReinMax (Liu et al. 2023, algorithm 2) for the two classes (keep: logit, prune: 0)."""
    theta = torch.stack([logits, torch.zeros_like(logits)], -1).double().requires_grad_()
    one_hot = torch.stack([hard, 1 - hard], -1).double()
    first = torch.softmax(theta, -1)
    middle = (one_hot + first) / 2
    middle = torch.softmax((middle.log() - theta).detach() + theta, -1)
    (2 * middle - first / 2)[..., 0].sum().backward()
    assert theta.grad is not None
    return theta.grad[..., 0]


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("temperature", [0.2, 0.4, 1.0])
def test_samples_are_exactly_zero_or_one_and_open_where_logit_and_noise_are_positive(
    kind: str, estimator: str, temperature: float
) -> None:
    logits = torch.randn(5000) * 3
    noise = draw_noise((5000,), kind, torch.Generator().manual_seed(1), CPU)
    mask = sample(logits, noise, kind, estimator, temperature)
    assert torch.equal(mask, (logits + noise >= 0).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logit", [-2.0, -0.5, 0.0, 1.5])
def test_the_share_of_ones_is_the_keep_probability(kind: str, logit: float) -> None:
    n = 400_000
    noise = draw_noise((n,), kind, torch.Generator().manual_seed(7), CPU)
    kept = float(sample(torch.full((n,), logit), noise, kind, "ste", 0.4).mean())
    expected = 1 / (1 + math.exp(-logit)) if kind == "logistic" else 1 - math.exp(-math.exp(logit))
    assert float(keep_probability(torch.tensor(logit), kind)) == pytest.approx(expected, rel=1e-6)
    assert abs(kept - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_the_papers_offset_keeps_more_than_a_logistic_would() -> None:
    # specification 1.3: z = -3 with offset 3 is kept with 0.632, not 0.5
    assert float(keep_probability(torch.tensor(0.0), "gumbel")) == pytest.approx(0.63212, abs=1e-5)
    assert float(keep_probability(torch.tensor(0.0), "logistic")) == 0.5


def test_noise_by_hand() -> None:
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()
    logistic = draw_noise((3,), "logistic", torch.Generator().manual_seed(5), CPU)
    gumbel = draw_noise((3,), "gumbel", torch.Generator().manual_seed(5), CPU)
    assert logistic.tolist() == pytest.approx([math.log(u) - math.log(1 - u) for u in uniform], rel=1e-6)
    assert gumbel.tolist() == pytest.approx([-math.log(-math.log(u)) for u in uniform], rel=1e-6)
    assert logistic.dtype == gumbel.dtype == torch.float32


# --- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0])
def test_binary_reinmax_is_the_general_two_class_formula_at_temperature_one(temperature: float) -> None:
    logits = torch.linspace(-6, 6, 401)
    noise = draw_noise((401,), "logistic", torch.Generator().manual_seed(3), CPU)
    hard = (logits + noise >= 0).float()
    assert 0.2 < hard.mean() < 0.8
    ours = gradient(logits, noise, "logistic", "reinmax", temperature)
    assert (ours - general_reinmax(logits, hard)).abs().max() <= 1e-7
    assert (ours > 0).all(), "an estimator that turns the gradient round drives logits away from the budget"


def test_reinmax_at_temperature_one_by_hand() -> None:
    logits, p = torch.tensor([math.log(4.0)] * 2), 0.8
    slopes = gradient(logits, torch.tensor([0.0, -10.0]), "logistic", "reinmax", 1.0)
    assert slopes.tolist() == pytest.approx([(1 - p) / 2, p / 2], abs=1e-7)


def test_reinmax_is_exact_for_a_quadratic() -> None:
    # E f(B) = p f(1) + (1-p) f(0), so d/dz = p (1-p) (f(1) - f(0)); plain straight-through is not exact here
    z = torch.tensor([-1.0, 0.3, 2.0])
    p = torch.sigmoid(z)
    kept, dropped = (gradient(z, torch.full((3,), noise), "logistic", "reinmax", 1.0) for noise in (9.0, -9.0))
    derivative = {1: 2 * 3.0 + 1.0, 0: 1.0}  # f(b) = 3 b^2 + b
    expected = p * kept * derivative[1] + (1 - p) * dropped * derivative[0]
    assert torch.allclose(expected, p * (1 - p) * 4.0, atol=1e-6)


def test_reinmax_under_gumbel_noise_follows_the_gumbel_probability() -> None:
    z = torch.linspace(-5, 1.5, 14)
    leaf = z.clone().requires_grad_()
    keep_probability(leaf, "gumbel").sum().backward()
    p = keep_probability(z, "gumbel")
    kept, dropped = (gradient(z, torch.full((14,), noise), "gumbel", "reinmax", 1.0) for noise in (9.0, -9.0))
    assert leaf.grad is not None
    assert torch.allclose(p * kept + (1 - p) * dropped, leaf.grad, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_by_hand(kind: str) -> None:
    logits, noise, temperature = torch.tensor([0.5, -1.0]), torch.tensor([0.1, 0.2]), 0.4
    soft = [1 / (1 + math.exp(-x / temperature)) for x in (0.6, -0.8)]
    expected = [s * (1 - s) / temperature for s in soft]
    assert gradient(logits, noise, kind, "ste", temperature).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_logits_stay_finite(kind: str, estimator: str) -> None:
    logits = torch.tensor([-1e4, -200.0, -104.0, -30.0, 4.5, 30.0, 200.0, 1e4])
    noise = torch.zeros(8)
    assert sample(logits, noise, kind, estimator, 0.4).tolist() == [0.0] * 4 + [1.0] * 4
    assert gradient(logits, noise, kind, estimator, 0.4).isfinite().all()
    assert keep_probability(logits, kind).isfinite().all()

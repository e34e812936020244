"""Hard 0/1 samples of gates with a surrogate gradient.

Sources: ATP code-derived specification (single Gumbel, straight-through), ReinMax (Liu et al. 2023, binary closed form).
A logit z keeps its unit with P = sigmoid(z) under ``logistic`` noise and 1 - exp(-exp(z)) under one ``gumbel`` draw.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Noise = Literal["logistic", "gumbel"]
Estimator = Literal["reinmax", "ste"]


def draw_noise(shape: tuple[int, ...], kind: Noise, generator: torch.Generator, device: torch.device) -> Tensor:
    """Logistic noise log U - log(1-U), or Gumbel noise -log(-log U); fp32, drawn on CPU so that all ranks agree."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    noise = uniform.logit() if kind == "logistic" else -torch.log(-torch.log(uniform))
    return noise.float().to(device)


def keep_probability(logits: Tensor, kind: Noise) -> Tensor:
    """P(keep) of each unit."""
    return torch.sigmoid(logits) if kind == "logistic" else -torch.expm1(-torch.exp(logits))


def sample(logits: Tensor, noise: Tensor, kind: Noise, estimator: Estimator, temperature: float) -> Tensor:
    """A hard sample in {0, 1} (forward) with the estimator's gradient (backward).

    ``ste``: d = sigmoid'((z + noise)/T)/T. ``reinmax``: with p = P(keep) as a logistic of its effective logit u,
    d/du = (1-p)/2 for a kept unit and p/2 for a pruned one: second-order accurate. It has no temperature: the general
    formula 2 pi (1 - pi) - p (1 - p)/2, pi = (B + sigmoid(u/T))/2, turns negative for T < 1 (at u = 3, T = 0.4 a kept
    unit would get -0.022 in place of +0.024), which pushes logits away from the budget.
    """
    if estimator == "ste":
        soft = torch.sigmoid((logits + noise) / temperature)
        # soft - soft first: (1 + soft) - soft is not exactly 1 in fp32
        return (logits + noise >= 0).float() + (soft - soft.detach())
    # P = 1 - exp(-exp z) is the logistic of log(exp(exp z) - 1): one formula then serves both kinds of noise;
    # clamped where exp(exp z) overflows or log(0) would be NaN, P being 0 or 1 in fp32 long before
    effective = logits if kind == "logistic" else torch.log(torch.expm1(torch.exp(logits.clamp(-30.0, 4.0))))
    hard = (logits + noise >= 0).float()
    p = torch.sigmoid(effective.detach())
    slope = torch.where(hard > 0, 1 - p, p) / 2
    return hard + slope * (effective - effective.detach())


def topped(logits: Tensor, width: int, temperature: float, dim: int = -1, offset: float = 0.0) -> Tensor:
    """The ``width`` largest along ``dim``, of equals the first: 0/1, with the gradient of sigmoid above the last of them.

    That level moves with the logits so that as many stay: what raises all of them changes nothing, so it has no gradient.

    Args:
        width: 0: those of at least ``-offset``, a level that stays.
    """
    if width:
        order = torch.sort(logits.detach(), dim=dim, descending=True, stable=True)
        hard = torch.zeros_like(logits).scatter_(dim, order.indices.narrow(dim, 0, width), 1.0)
        level = order.values.narrow(dim, width - 1, 1)
    else:
        level = logits.new_tensor(-offset)
        hard = (logits.detach() >= level).to(logits.dtype)
    if not torch.is_grad_enabled():
        return hard
    if width:
        near = torch.sigmoid((logits.detach() - level) / temperature)
        slope = near * (1 - near)  # at the level itself a quarter, so the sum is no zero
        level = level + (slope / slope.sum(dim, keepdim=True) * (logits - logits.detach())).sum(dim, keepdim=True)
    soft = torch.sigmoid((logits - level) / temperature)
    return hard + (soft - soft.detach())

"""Where a search for experts begins: channels split by what they add for which tokens, and a router fitted to that.

By turns: the router says which experts a token uses, each channel goes where the tokens that use it lose least without it, and
the router is fitted to what the experts then add. Of a token t and a channel f that is e_tf = (h_tf |W_down,f|)^2, the square
of what it adds to the stream; a channel's score is the sum of e_tf over the tokens of an expert, over all tokens for the shared
one, nothing for those that are left out. Shapes: T tokens, F mlp channels, D model, E experts, S slots (1 + E + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.prune.assign import assign, widest

ROUNDS = 8
_RIDGE = 1e-2
_EVEN = 0.8
"""How much of an expert's lead over the others, by what it adds on average, its router leaves out: else few take all tokens."""
_SPREAD = 0.5
"""Standard deviation of the router's logits over the tokens, so that the weights of the chosen experts begin near one."""


@dataclass(frozen=True)
class Split:
    """Of one layer: ``scores`` [F, S], whose assignment it is, and the router's ``weight`` [E, D]."""

    scores: Tensor
    weight: Tensor


@torch.no_grad()
def split(energy: Tensor, x: Tensor, sizes: Tensor, top_k: int, seed: int, overlap: bool = False) -> Split:
    """Split the channels of a layer.

    Args:
        energy: e [T, F].
        x: inputs of the MLP [T, D].
        sizes: of the slots [S]: shared, experts, left out.
        top_k: experts of a token.
        seed: of the first clusters.
        overlap: a channel may be in several experts, each of which takes those of its best scores.
    """
    number = len(sizes) - 2
    energy = energy.float() / energy.float().sum(1).mean().clamp(min=1e-30)
    x = x.float()
    inverse = inverse_of(x)
    used = _clusters(x, number, seed)
    scores = _scores(energy, used)
    weight = x.new_zeros(number, x.shape[1])
    for _ in range(ROUNDS):
        if overlap:
            experts = widest(scores[None, :, 1:-1], int(sizes[1]))[0].to(energy)
        else:
            experts = F.one_hot(assign(scores[None], sizes)[0], len(sizes)).to(energy)[:, 1:-1]
        weight = (inverse @ (x.T @ lead(energy, experts))).T
        logits = x @ weight.T
        used = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, 1).indices, 1.0)
        scores = _scores(energy, used)
    return Split(scores, _scaled(weight, x))


def logits_of(scores: Tensor, scale: float) -> Tensor:
    """Logits [L, F, S] of a generator from scores [L, F, S], with a standard deviation of ``scale`` in each layer.

    A power below one, by which many small scores and few large ones become more comparable.
    """
    spread = scores.clamp(min=0).pow(0.75)
    centred = spread - spread.mean((1, 2), keepdim=True)
    return scale * centred / centred.flatten(1).std(1)[:, None, None].clamp(min=1e-12)


def _scores(energy: Tensor, used: Tensor) -> Tensor:
    parts = [energy.sum(0)[:, None], energy.T @ used, energy.new_zeros(energy.shape[1], 1)]
    scores = torch.cat(parts, 1)
    return scores / scores[:, :1].mean().clamp(min=1e-30)


def lead(energy: Tensor, experts: Tensor) -> Tensor:
    """By how much more an expert of ``experts`` [F, E] adds for a token than others, in logarithms, partly evened: [T, E]."""
    added = (energy @ experts + 1e-4).log()
    added = added - added.mean(1, keepdim=True)
    return added - _EVEN * added.mean(0)


def ridge(x: Tensor, wanted: Tensor) -> Tensor:
    """The router [E, D] whose logits come nearest to ``wanted`` [T, E] up to what all experts have in common."""
    return _scaled((inverse_of(x) @ (x.T @ (wanted - wanted.mean(1, keepdim=True)))).T, x)


def _scaled(weight: Tensor, x: Tensor) -> Tensor:
    return weight * (_SPREAD / (x @ weight.T).std(0).mean().clamp(min=1e-6))


def inverse_of(x: Tensor) -> Tensor:
    """Of the damped second moments of ``x`` [T, D]: [D, D]."""
    moments = x.T @ x
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
    return torch.linalg.inv(moments)


def _clusters(x: Tensor, number: int, seed: int) -> Tensor:
    """Tokens in ``number`` clusters of equal size by the direction of ``x``: 0/1 [T, E]."""
    near = F.normalize(x, dim=1)
    rng = torch.Generator().manual_seed(seed)
    centres = near[torch.randperm(len(x), generator=rng)[:number].to(x.device)]
    sizes = torch.full((number,), len(x) // number)
    sizes[: len(x) % number] += 1
    belongs = torch.zeros(len(x), number, device=x.device)
    for _ in range(5):
        belongs = F.one_hot(assign((near @ centres.T)[None], sizes)[0], number).to(near)
        centres = F.normalize(belongs.T @ near, dim=1)
    return belongs

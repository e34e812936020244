"""Least squares among the inputs of a consumer: what the kept ones say about the removed ones, and what only one unit says.

For a linear with weight W and inputs x = (x_k kept, x_g gone) with second moments G = E x x^T, the D that minimises
``E |W_g x_g - D x_k|^2 + damping |D|^2`` is ``W_g T`` with ``T = G_gk (G_kk + damping)^-1``; D is added to W_k. This is
the closed form of Optimal Brain Surgeon (Hassibi & Stork 1993) for many weights of a row at once, as SparseGPT (Frantar &
Alistarh 2023) takes one after another.

Shapes: d inputs of the consumer, k of them kept, g gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 4096
"""Above as many kept inputs the solve is in fp32: fp64 is slow on all but the largest cards, and wide MLPs, unlike narrow
attention outputs, lose nothing by it (relative error 1e-6 at damping 0.01)."""


LEAF = 1024
"""A triangle that is inverted as it is."""


@dataclass(frozen=True)
class Takeover:
    """How the kept inputs of one consumer stand in for the others.

    Attributes:
        kept, gone: indices of inputs [k], [g].
        onto: T [g, k], in the precision of the solve.
        root: L [k, k], the lower Cholesky factor of G_kk + damping. Its inverse, P in what follows, is not taken where it is
            not wanted whole: it costs as much as all else together.
        damped: what was added to the diagonal of G_kk.
    """

    kept: Tensor
    gone: Tensor
    onto: Tensor
    root: Tensor
    damped: Tensor

    @classmethod
    def of(cls, moments: Tensor, kept: Tensor, damping: float) -> Takeover | None:
        """Solve, in fp64 up to ``WIDE``; None where nothing is left to take over.

        Args:
            moments: G up to a factor [d, d].
            kept: indices [k].
            damping: in units of the mean of G_kk's diagonal.
        """
        left = torch.ones(len(moments), dtype=torch.bool, device=moments.device)
        left[kept] = False
        gone = left.nonzero().flatten()
        if not len(kept):
            return None
        exact = torch.float64 if len(kept) <= WIDE else torch.float32
        inside = moments[kept][:, kept].to(exact)
        # a model whose units are dead has a zero diagonal, which any damping would leave singular
        damped = damping * inside.diagonal().mean() + torch.finfo(torch.float32).tiny
        inside.diagonal().add_(damped)
        root = torch.linalg.cholesky(inside)
        onto = torch.cholesky_solve(moments[kept][:, gone].to(exact), root).T if len(gone) else inside[:0]
        return cls(kept, gone, onto, root, damped)

    def weight(self, weight: Tensor) -> Tensor:
        """``weight`` [out, d] with D added to its kept columns; the others, whose inputs are gone, stay."""
        changed, exact = weight.clone(), self.onto.dtype
        if not len(self.gone):
            return changed
        added = weight[:, self.gone].to(exact) @ self.onto
        changed[:, self.kept] = (weight[:, self.kept].to(exact) + added).to(weight.dtype)
        return changed

    def innovation(self, rows: int) -> Tensor:
        """What each unit's inputs say beyond the kept units: M [d, d], fp32, ``M x`` the residual of each input.

        For a gone input ``x_g - T x_k``; for those of a kept unit i the residual of its prediction from the other kept ones,
        ``(P_ii)^-1 (P x_k)_i`` with P the inverse and P_ii its block of that unit's ``rows`` inputs.
        """
        size = len(self.kept) + len(self.gone)
        matrix = torch.zeros(size, size, dtype=self.onto.dtype, device=self.kept.device)
        matrix[self.gone, self.gone] = 1.0
        matrix[self.gone[:, None], self.kept[None]] = -self.onto
        inverse = torch.cholesky_inverse(self.root).view(-1, rows, len(self.kept))
        own = inverse.view(len(inverse), rows, len(inverse), rows).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        residual = torch.linalg.solve(own, inverse) if rows > 1 else inverse / own
        matrix[self.kept[:, None], self.kept[None]] = residual.reshape(len(self.kept), -1)
        return matrix.float()

    def share(self, moments: Tensor, rows: int) -> Tensor:
        """Of each input what its innovation is at best, as a multiple of the input itself: [d] in 0..1, fp32.

        ``E (M x)_j x_j / E x_j^2``: the part of its power that the kept units do not explain. With ``(G_kk + damping)`` times
        its inverse written out that is ``(((P_ii)^-1)_jj - damping) / G_jj`` of a kept input, and ``1 - (T G_kg)_jj / G_jj``
        of one that is gone.

        Args:
            moments: G as the solve had it [d, d].
            rows: inputs of a unit.
        """
        power = moments.diagonal().to(self.onto.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        found = torch.empty_like(power)
        columns = _lower_inverse(self.root).T.view(-1, rows, len(self.kept))  # of L^-1; P = L^-T L^-1
        own = torch.linalg.inv(columns @ columns.mT) if rows > 1 else 1 / columns.square().sum(-1, keepdim=True)
        found[self.kept] = (own.diagonal(dim1=-2, dim2=-1).flatten() - self.damped) / power[self.kept]
        explained = (self.onto * moments[self.gone][:, self.kept]).sum(1)
        found[self.gone] = 1 - explained / power[self.gone]
        return found.clamp(0.0, 1.0).float()


def _lower_inverse(root: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [k, k], in large products, which a GPU does fastest.

    Of ``[[A, 0], [B, C]]`` it is ``[[A', 0], [-C' B A', C']]`` with A', C' the inverses of A and C.
    """
    size = len(root)
    found = torch.zeros_like(root)
    if size <= LEAF:
        return torch.linalg.solve_triangular(root, found.fill_diagonal_(1.0), upper=False)
    half = size // 2
    found[:half, :half] = _lower_inverse(root[:half, :half])
    found[half:, half:] = _lower_inverse(root[half:, half:])
    found[half:, :half] = -(found[half:, half:] @ root[half:, :half]) @ found[:half, :half]
    return found

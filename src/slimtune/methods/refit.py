"""While experts are found: o_proj and down_proj fitted by least squares, so that what a token sees adds what the whole would.

Of a consumer with weight W and inputs x, of which gates leave y = m x, the W + D that minimises
``E |W x - (W + D) y|^2 + damping |D|^2`` has ``D = W E (x - y) y^T (E y y^T + damping)^-1``. Where m is the same for all tokens
that is ``prune.least_squares``; here a router chooses it for each. W is always the base's: a fit does not build on the last.
Shapes: N tokens, d inputs of a consumer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.methods.passes import Passes
from slimtune.models.head_hooks import attend_before
from slimtune.models.surgery import linears_of
from slimtune.prune.gates import MaskBank, Masks, Site, of_rank_0
from slimtune.prune.least_squares import WIDE
from slimtune.structure.axes import KV_GROUP, Side, Structure
from slimtune.structure.heads import VALUE
from slimtune.train.session import Batches, Session


class Fits:
    """Weights of all consumers that follow the experts: the ``follower`` of a bank, whose model is gated and not cut yet.

    Open gates: the base's. Masks that are fixed or sampled: those of the last fit, whatever masks that was made for.

    Attributes:
        fitted: {site: weight [out, d]}; none before the first fit.
    """

    def __init__(self, session: Session, model: nn.Module, bank: MaskBank):
        self.session, self.model, self.bank = session, model, bank
        self.sides: dict[Site, Side] = {}
        self.modules: dict[Site, Any] = {}
        for layer, row, module in linears_of(model, session.structure):
            if row.into:
                self.sides[layer, row.into.axis], self.modules[layer, row.into.axis] = row.into, module
        self.original = {site: _inner(module).weight for site, module in self.modules.items()}
        self.fitted: dict[Site, nn.Parameter] = {}
        bank.follower = self

    def opened(self) -> None:
        """The base's weights."""
        self._put(self.original)

    def closed(self, masks: Masks) -> None:
        """Those of the last fit."""
        self._put(self.fitted)

    def sampled(self) -> None:
        """The same, by which sampled masks are judged."""
        self._put(self.fitted)

    def settled(self) -> None:
        """What is fitted stays, and nothing else is held: the bank has no follower any more."""
        self._put(self.fitted)
        self.bank.follower = None
        for held in (self.modules, self.original, self.fitted):
            held.clear()

    def innovation(self, site: Site) -> None:
        """Gradients of sampled masks are taken by the whole input."""

    @torch.no_grad()
    def renew(self, masks: Masks, batches: Batches, steps: int, damping: float) -> int:
        """Fit all consumers to what the base's weights, LoRA added, make of their whole inputs; the tokens read.

        Inputs are those of the model as it was fitted last. Layers whose moments do not fit in memory together come one part
        after another, each read anew.
        """
        self.bank.close(masks)
        passes, layers = Passes(self.session, self.model, batches, steps), len(self.session.structure.layers)
        together = _together(self.session)
        for first in range(0, layers, together):
            self._renew(passes, range(first, min(layers, first + together)), damping)
        return passes.tokens

    def _renew(self, passes: Passes, layers: range, damping: float) -> None:
        left, gone = self._moments(passes, layers)
        passes.check(left, "moe.refit=false")
        for site in list(left):
            moments, missing = (self.session.accelerator.reduce(sums.pop(site)) for sums in (left, gone))
            weight = self.original[site]
            change = _correction(_effective(self.modules[site], weight), moments, missing, damping)
            made = {site: (weight.float() + change.float()).to(weight)}
            self.fitted[site] = _frozen(of_rank_0(made)[site])  # other kinds of GPUs may solve it otherwise in the last bit
        self._put(self.fitted)

    def _moments(self, passes: Passes, layers: range) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """E y y^T and E (x - y) y^T [d, d], up to one factor."""
        left: dict[Site, Tensor] = {}
        gone: dict[Site, Tensor] = {}
        unmasked: dict[int, Tensor] = {}

        def watchers(real: Tensor) -> dict[str, Any]:
            at = real.flatten().nonzero().flatten()

            def see(layer: int, axis: str, x: Tensor) -> None:
                if axis == KV_GROUP and self.bank.is_lifted:
                    unmasked[layer] = x
                    return
                mask = self.bank.consumer(layer, axis) if layer in layers else None
                if mask is None:
                    return
                spread = self._spread(layer, axis, mask, at)
                given = x.flatten(0, 1)[at].float()
                whole = unmasked.pop(layer).flatten(0, 1)[at].float() if axis == KV_GROUP and unmasked else given
                with torch.autocast(x.device.type, enabled=False):
                    kept = given * spread
                    found = (kept.T @ kept, (whole - kept).T @ kept)
                for sums, value in zip((left, gone), found, strict=True):
                    sums[layer, axis] = sums[layer, axis].add_(value) if (layer, axis) in sums else value

            return {"consumers": see}

        masked = self.bank.values is not None  # then o_proj's inputs lack what other tokens' masks took, too
        again = attend_before(self.model, self.session.structure, layers, self.bank.lifted) if masked else []
        passes.run(watchers)
        for handle in again:
            handle.remove()
        return left, gone

    def _spread(self, layer: int, axis: str, mask: Tensor, at: Tensor) -> Tensor:
        """What multiplies the consumer's inputs at positions ``at``: [d], or [N, d] where it differs from token to token.

        Of o_proj that is the query's own mask on value dimensions, too.
        """
        rows = self.session.structure.rows(self.sides[layer, axis])
        spread = mask.repeat_interleave(rows, dim=-1) if mask.ndim == 1 else mask.flatten(0, 1)[at]
        own = self.bank.head(layer, VALUE) if axis == KV_GROUP else None
        if own is None:
            return spread
        return spread * own.flatten(0, 1)[at].repeat(1, spread.shape[-1] // own.shape[-1])

    def _put(self, weights: Mapping[Site, nn.Parameter]) -> None:
        for site, weight in weights.items():
            _inner(self.modules[site]).weight = weight

    def capture(self) -> dict[Site, Tensor]:
        """State for a checkpoint."""
        return {site: weight.detach() for site, weight in self.fitted.items()}

    def restore(self, saved: Mapping[Site, Tensor]) -> None:
        """Continue from a ``capture``."""
        self.fitted = {site: _frozen(weight.to(self.original[site])) for site, weight in saved.items()}


def _together(session: Session) -> int:
    """Layers whose moments may lie on the device at once: in half of what is free there, the same of all processes."""
    layers = session.structure.layers
    if session.device.type != "cuda":
        return len(layers)
    rows = [row.into for row in session.structure.family.linears if row.into]
    widths = [layers[0].units[side.axis] * session.structure.rows(side) for side in rows]
    free = torch.tensor(float(torch.cuda.mem_get_info(session.device)[0]), device=session.device)
    if session.accelerator.num_processes > 1:
        torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
    return max(1, min(len(layers), int(float(free) / 2 / sum(8 * width**2 for width in widths))))


def taken_refit(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """The weights of all consumers, by layer and path: of a model whose attention is cut already."""
    return {f"{layer}.{path}": inner.weight.detach() for layer, path, inner in _consumers(model, structure)}


@torch.no_grad()
def put_refit(model: nn.Module, structure: Structure, saved: dict[str, Tensor]) -> None:
    """Give the consumers what ``taken_refit`` took."""
    for layer, path, inner in _consumers(model, structure):
        inner.weight = _frozen(saved[f"{layer}.{path}"].to(inner.weight))


def _consumers(model: nn.Module, structure: Structure) -> Iterator[tuple[int, str, Any]]:
    for layer, row, module in linears_of(model, structure):
        if row.into:
            yield layer, row.path, _inner(module)


def _inner(module: Any) -> Any:
    return module.base_layer if isinstance(module, LoraLayer) else module


def _frozen(weight: Tensor) -> nn.Parameter:
    """Another parameter: a teacher may share the one that was there."""
    return nn.Parameter(weight, requires_grad=False)


def _effective(module: Any, weight: Tensor) -> Tensor:
    """``weight`` with the module's LoRA merged, fp32."""
    found = weight.float()
    for name in module.active_adapters if isinstance(module, LoraLayer) else ():
        left, right = module.lora_B[name].weight, module.lora_A[name].weight
        found = found + float(module.scaling[name]) * left.float() @ right.float()
    return found


def _correction(weight: Tensor, moments: Tensor, missing: Tensor, damping: float) -> Tensor:
    """D [out, d], by ``E y y^T`` and ``E (x - y) y^T`` [d, d] up to one factor."""
    exact = torch.float64 if len(moments) <= WIDE else torch.float32
    inside = moments.to(exact)
    damped = damping * inside.diagonal().mean() + torch.finfo(torch.float32).tiny
    inside.diagonal().add_(damped)
    added = weight.to(exact) @ missing.to(exact)
    return torch.cholesky_solve(added.T, torch.linalg.cholesky(inside)).T

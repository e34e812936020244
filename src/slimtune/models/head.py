"""The output head, asked for the loss in place of logits: those of a large vocabulary never stand in memory at once.

Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""Label that a loss leaves out."""
MOST = 1 << 26
"""Logits that may stand in memory at once: 256 MB in fp32, of which a loss needs several copies."""
MOST_COMPILED = 1 << 29
"""The same of a compiled loss, which by count moves a fifth of the bytes that chunks do: 1 GB in bf16."""
AFTERWARDS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Keys of configs of what is done to logits after the head."""


def head_of(model: nn.Module) -> nn.Linear | None:
    """The head of a model, wrapped or not, where its output is the logits and it is not trained itself; else None."""
    inner: Any = getattr(model, "module", model)
    if not hasattr(inner, "get_output_embeddings"):
        return None
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return None
    return None if any(getattr(inner.config, key, None) not in (None, 1, 1.0) for key in AFTERWARDS) else head


@contextmanager
def loss_in_head(head: nn.Linear, labels: Tensor, at: Tensor | None) -> Iterator[None]:
    """Inside, the model gives the summed cross-entropy where it gave logits.

    Args:
        head: of the model.
        labels: what each position shall predict, shifted and flattened [B T]; ``IGNORE`` where nothing.
        at: positions [N] of those that predict something, where they are known; the others are passed over then.
    """

    def forward(hidden: Tensor) -> Tensor:
        flat, wanted = hidden.flatten(0, 1), labels
        if at is not None:
            flat, wanted = flat.index_select(0, at), labels.index_select(0, at)
        loss: Tensor = _Loss.apply(flat, head.weight, head.bias, wanted)
        return loss

    head.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward


class _Loss(torch.autograd.Function):
    """Cross-entropy [] of ``hidden`` [N, D] through the head, fp32; its gradient is taken on the way, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        rows = max(1, MOST // len(weight))
        total = torch.zeros((), device=hidden.device)
        slope = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            chances = torch.log_softmax(logits, -1, dtype=torch.float32)
            total += F.nll_loss(chances, labels[part], ignore_index=IGNORE, reduction="sum")
            if slope is not None:
                chances.exp_()
                counts = labels[part, None] != IGNORE
                chances.scatter_add_(1, labels[part, None].clamp(min=0), -torch.ones_like(counts, dtype=torch.float32))
                slope[part] = chances.mul_(counts).to(logits.dtype) @ weight.to(logits.dtype)
        if slope is not None:
            ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None

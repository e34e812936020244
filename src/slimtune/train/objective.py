"""Losses on a batch, and the mean over a step's targets whatever its micro-batches and ranks.

Shapes: B batch, T tokens, V vocabulary, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from slimtune.models import head as heads
from slimtune.models.head import IGNORE

Batch = Mapping[str, Tensor]
"""What a model is called with, and besides ``labels`` [B, T] and, maybe, ``targets`` [N]: where, in the flattened batch, a
position predicts a label (``find_targets``)."""


def forward(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """Logits [B, T, V]; ``more`` are arguments for the model, as ``logits_to_keep``."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "targets")}
    return model(**inputs, use_cache=False, **more).logits


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and labels [N] of the positions that are predicted."""
    wanted = labels[:, 1:] != IGNORE
    return logits[:, :-1][wanted], labels[:, 1:][wanted]


def _following(labels: Tensor) -> Tensor:
    """What each position predicts, flattened: the labels are shifted, not the logits, whose slice would be copied."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()


def find_targets(labels: Tensor) -> Tensor:
    """``targets`` of a batch. On the device this would wait for it, so batches bring them."""
    return (_following(labels) != IGNORE).nonzero().flatten()


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy in fp32 over the targets."""
    return F.cross_entropy(logits.flatten(0, 1).float(), _following(labels), ignore_index=IGNORE, reduction="sum")


def loss_sum(
    model: nn.Module, batch: Batch, dense: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum, most: int | None = None
) -> Tensor:
    """Summed next-token cross-entropy of a batch, in fp32.

    Args:
        dense: of logits and labels, for batches whose logits are few. The others are taken by the head chunk by chunk, where
            it is frozen and nothing comes after it.
        most: logits that are few; default: ``models.head.MOST``.
    """
    head, at = heads.head_of(model), batch.get("targets")
    many = batch["labels"].numel() if at is None else len(at)
    if head is None or many * len(head.weight) <= (most or heads.MOST):
        return dense(forward(model, batch), batch["labels"])
    with heads.loss_in_head(head, _following(batch["labels"]), at):
        return forward(model, batch)


def compiled_cross_entropy(backend: str = "inductor") -> Callable[[Tensor, Tensor], Tensor]:
    """The same through ``torch.compile``: without the fp32 copies of the logits, a step's largest tensors where V is large."""
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(cross_entropy_sum, backend=backend)
    return compiled


def distillation_sum(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Summed KL(teacher || student) at the targets, times temperature squared (Hinton et al. 2015)."""
    ours, _ = _shifted(student, labels)
    theirs, _ = _shifted(teacher, labels)
    log_ours = F.log_softmax(ours.float() / temperature, dim=-1)
    log_theirs = F.log_softmax(theirs.float() / temperature, dim=-1)
    return F.kl_div(log_ours, log_theirs, reduction="sum", log_target=True) * temperature**2


def count_targets(batches: Sequence[Batch], accelerator: Accelerator) -> int:
    """Targets of a step over all micro-batches and ranks."""
    here = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    total = accelerator.reduce(torch.tensor(float(here), device=accelerator.device))
    return max(1, int(total))


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    loss: Callable[[Batch], Tensor],
    sync: bool = True,
) -> Tensor:
    """Backward of ``loss`` (a sum over targets) over micro-batches, scaled to the mean over the whole step, in train mode.

    Args:
        sync: let DDP average parameter gradients at the last micro-batch; off for turns without parameter gradients.

    Returns:
        The mean loss over all ranks, detached.
    """
    # a model and what wraps it are told apart; to go through thousands of modules takes milliseconds of every step
    if not all(module.training for module in (model, *model.children())):
        model.train()
    targets = count_targets(batches, accelerator)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with accelerator.no_sync(model) if not (sync and last) else nullcontext():
            with accelerator.autocast():
                value = loss(batch) / targets
            # DDP and the leaf masks take the mean over ranks; the sum over ranks is the mean over targets
            (value * accelerator.num_processes).backward()
        total += value.detach()
    reduced: Tensor = accelerator.reduce(total)
    return reduced

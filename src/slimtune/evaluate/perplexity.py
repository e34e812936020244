"""Perplexity over windows, with its standard error."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from slimtune.data.batches import Windows
from slimtune.train.objective import IGNORE, forward


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Windows,
    limit: int,
    batch: int,
    device: torch.device,
    bf16: bool = False,
    influences: list[float] | None = None,
) -> dict[str, float]:
    """Next-token loss and perplexity over at most ``limit`` evenly spaced windows.

    Args:
        influences: gains one number a window, what it adds to the loss in the linearised ratio of sums, (sum - loss * count) /
            mean count. Their standard error is that of the loss; that of their difference between two models on the
            same windows is that of the difference of their losses.

    Returns:
        ``loss`` (nats a token), ``ppl`` = exp(loss), ``ppl_se`` (standard error of ppl, from the spread between windows),
        ``tokens`` (targets counted).
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flash_attention_2":
        batch = 1  # it tells packed examples apart in one row alone; one row a window, for the sums are taken by window
    chosen = windows.spread(limit)
    sums, counts = [], []
    training = model.training
    model.eval()
    for start in range(0, len(chosen), batch):
        part = {key: value.to(device) for key, value in windows.collate(chosen[start : start + batch]).items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = forward(model, part)
        labels = part["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        sums.append(losses.sum(1).double().cpu())
        counts.append((labels != IGNORE).sum(1).double().cpu())
    model.train(training)
    return _figures(torch.cat(sums), torch.cat(counts), influences)


def _figures(sums: torch.Tensor, counts: torch.Tensor, influences: list[float] | None = None) -> dict[str, float]:
    """Ratio estimate sum/count over windows and its linearised standard error."""
    total = float(counts.sum())
    if total == 0:
        return {"loss": math.nan, "ppl": math.nan, "ppl_se": math.nan, "tokens": 0.0}
    loss = float(sums.sum()) / total
    n = len(sums)
    influence = (sums - loss * counts) * n / total
    error = math.sqrt(float((influence**2).sum()) / max(1, n - 1) / n)
    if influences is not None:
        influences += influence.tolist()
    return {
        "loss": loss,
        "ppl": math.exp(min(loss, 700.0)),
        "ppl_se": math.exp(min(loss, 700.0)) * error,
        "tokens": total,
    }

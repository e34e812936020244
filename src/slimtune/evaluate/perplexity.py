"""Perplexity over windows, with its standard error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from slimtune.data.batches import Windows
from slimtune.train.objective import IGNORE, forward


@dataclass
class Influences:
    """What each window adds to a loss.

    Attributes:
        numbers: for each window (sum - loss * count) / mean count, the linearised ratio of sums. Their standard error is that
            of the loss; that of their difference between two models is that of the difference of their losses.
        windows: digest of the windows' tokens and targets: numbers of other windows cannot be paired.
    """

    numbers: list[float] = field(default_factory=list)
    windows: str = ""


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Windows,
    limit: int,
    batch: int,
    device: torch.device,
    bf16: bool = False,
    influences: Influences | None = None,
) -> dict[str, float]:
    """Next-token loss and perplexity over at most ``limit`` evenly spaced windows.

    Args:
        influences: is filled.

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
    if influences is not None:
        influences.windows = _digest(windows, chosen)
    return _figures(torch.cat(sums), torch.cat(counts), influences)


def _digest(windows: Windows, chosen: Sequence[int]) -> str:
    found = hashlib.sha256()
    for index in chosen:  # one by one: padding depends on the neighbours
        window = windows.collate([index])
        for key in ("input_ids", "labels"):
            found.update(window[key].numpy().tobytes())
    return found.hexdigest()[:12]


def _figures(sums: torch.Tensor, counts: torch.Tensor, influences: Influences | None = None) -> dict[str, float]:
    """Ratio estimate sum/count over windows and its linearised standard error."""
    total = float(counts.sum())
    if total == 0:
        return {"loss": math.nan, "ppl": math.nan, "ppl_se": math.nan, "tokens": 0.0}
    loss = float(sums.sum()) / total
    n = len(sums)
    influence = (sums - loss * counts) * n / total
    error = math.sqrt(float((influence**2).sum()) / max(1, n - 1) / n)
    if influences is not None:
        influences.numbers = influence.tolist()
    return {
        "loss": loss,
        "ppl": math.exp(min(loss, 700.0)),
        "ppl_se": math.exp(min(loss, 700.0)) * error,
        "tokens": total,
    }

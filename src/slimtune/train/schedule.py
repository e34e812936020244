"""Learning rates as pure functions of the step, so that nothing needs saving to resume."""

from __future__ import annotations

import math

import torch

from slimtune.sections import TrainConfig


def lr_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Warm-up to 1, constant until the decay begins, then down to ``final_lr``."""
    warm = max(1, round(train.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    start = max(warm, round((1 - train.decay) * steps))
    if train.schedule == "constant" or step < start:
        return 1.0
    part = (step - start + 1) / max(1, steps - start)
    shape = 0.5 * (1 + math.cos(math.pi * part)) if train.schedule == "cosine" else 1 - part
    return train.final_lr + (1 - train.final_lr) * shape


def generator_factor(step: int, steps: int) -> float:
    """Constant, then 0.2 in the last fifth of the search (specification 5.4)."""
    return 0.2 if step >= 0.8 * steps else 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to ``factor`` times its peak (``initial_lr``); returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])

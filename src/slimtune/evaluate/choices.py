"""Accuracy on multiple-choice rows: the choice with the highest log-likelihood after the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class ChoiceRow(Protocol):
    """A row with choices and the index of the right one."""

    @property
    def prompt(self) -> str | None: ...
    @property
    def completion(self) -> str | None: ...
    @property
    def choices(self) -> tuple[str, ...] | None: ...
    @property
    def label(self) -> int | None: ...


@torch.no_grad()
def accuracy(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[ChoiceRow],
    max_length: int,
    device: torch.device,
    bf16: bool = False,
) -> dict[str, float]:
    """Share of rows whose labelled choice is the likeliest (summed log-likelihood of its tokens, ties to the first).

    Returns:
        ``accuracy``, ``accuracy_se`` (binomial), ``majority`` (share of the most frequent label), ``rows``.
    """
    hits, labels = 0, []
    training = model.training
    model.eval()
    for row in rows:
        assert row.prompt is not None
        assert row.choices is not None
        assert row.label is not None
        lead = _lead(row)
        scores = _scores(model, tokenizer, row.prompt, [lead + choice for choice in row.choices], max_length, device, bf16)
        hits += int(int(scores.argmax()) == row.label)
        labels.append(row.label)
    model.train(training)
    n = len(rows)
    rate = hits / n
    majority = max(labels.count(label) for label in set(labels)) / n
    return {"accuracy": rate, "accuracy_se": math.sqrt(rate * (1 - rate) / n), "majority": majority, "rows": float(n)}


def _lead(row: ChoiceRow) -> str:
    """The white space that the training completions put before an answer."""
    completion = row.completion or ""
    return completion[: len(completion) - len(completion.lstrip())]


def _scores(
    model: nn.Module, tokenizer: Any, prompt: str, choices: list[str], max_length: int, device: torch.device, bf16: bool
) -> torch.Tensor:
    """Summed log-likelihood of each choice [C]."""
    start = len(tokenizer(prompt)["input_ids"])
    rows = [tokenizer(prompt + choice)["input_ids"] for choice in choices]
    targets = [max(1, len(row) - start) for row in rows]
    rows = [row[-max_length:] for row in rows]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logp = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.stack(
        [logp[index, len(row) - 1 - n : len(row) - 1].sum() for index, (row, n) in enumerate(zip(rows, targets, strict=True))]
    )

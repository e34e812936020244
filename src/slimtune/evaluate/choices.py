"""Accuracy on multiple-choice rows: the choice with the highest log-likelihood after the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from slimtune.data.prompts import Encoded, encode_examples, pad_id
from slimtune.data.sources import Row


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
        assert row.label is not None
        scores = _scores(model, tokenizer, row.prompt, answers(row), max_length, device, bf16)
        hits += int(int(scores.argmax()) == row.label)
        labels.append(row.label)
    model.train(training)
    n = len(rows)
    rate = hits / n
    majority = max(labels.count(label) for label in set(labels)) / n
    return {"accuracy": rate, "accuracy_se": math.sqrt(rate * (1 - rate) / n), "majority": majority, "rows": float(n)}


def answers(row: ChoiceRow) -> list[str]:
    """The choices as they stand behind the prompt: with the white space of the training completions."""
    lead = _lead(row)
    return [choice if choice.startswith(lead) else lead + choice for choice in row.choices or ()]


def _lead(row: ChoiceRow) -> str:
    """The white space that the training completions put before an answer (choices may carry it already)."""
    completion = row.completion or ""
    return completion[: len(completion) - len(completion.lstrip())]


def _scores(
    model: nn.Module, tokenizer: Any, prompt: str, choices: list[str], max_length: int, device: torch.device, bf16: bool
) -> torch.Tensor:
    """Summed log-likelihood of each choice [C]."""
    examples = encode_examples([Row(prompt=prompt, completion=choice) for choice in choices], tokenizer)
    rows = [_fitted(example, tokenizer.eos_token_id, max_length) for example in examples]
    width = max(len(ids) for ids, _ in rows)
    pad = pad_id(tokenizer)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logp = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.stack([logp[index, max(0, head - 1) : len(row) - 1].sum() for index, (row, head) in enumerate(rows)])


def _fitted(example: Encoded, eos: int | None, max_length: int) -> tuple[list[int], int]:
    """Ids and where the choice begins: tokenised as in training, without EOS, the prompt cut from the left to fit."""
    ids, head = example.ids.tolist(), example.head
    if len(ids) > head + 1 and ids[-1] == eos:
        ids.pop()
    cut = max(0, min(len(ids) - max_length, head - example.prefix))
    return (ids[: example.prefix] + ids[example.prefix + cut :])[:max_length], head - cut

"""Greedy texts of a model in torch, and how far another runtime's go along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


@torch.no_grad()
def continued(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """``tokens`` greedy ones after ``prompt``, by the logits alone: a folder's own generation config may ask for penalties."""
    ends = {key: getattr(model.generation_config, key) for key in ("eos_token_id", "pad_token_id")}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **ends)
    found: list[int] = model.generate(torch.tensor([list(prompt)]), generation_config=greedy)[0, len(prompt) :].tolist()
    return found


def same(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same up to the first that differs."""
    equal = [one == other for one, other in zip(mine, theirs, strict=False)]
    return equal.index(False) if False in equal else len(equal)

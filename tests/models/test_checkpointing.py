"""Activation checkpointing of some blocks: the same numbers, fewer second forward passes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from gated import random_model, sample_ids
from slimtune.models.load import enable_checkpointing
from slimtune.models.surgery import blocks_of, checkpoint_fewer


def turn(part: float | None) -> tuple[int, dict[str, Tensor]]:
    """Forward passes of three blocks in a turn, and the gradients."""
    model, structure = random_model("llama", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a name that transformers will drop
        enable_checkpointing(model, "non_reentrant")
    if part is not None:
        checkpoint_fewer(model, structure, part)
    seen, blocks = list[int](), list[Any](blocks_of(model, structure))
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    ids = sample_ids(rows=2)
    torch.nn.functional.cross_entropy(model.train()(ids).logits.flatten(0, 1), ids.flatten()).backward()
    return len(seen), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("part", "passes"), [(1.0, 6), (0.5, 5), (0.0, 3)])
def test_blocks_left_out_run_once_and_change_no_number(part: float, passes: int) -> None:
    every, expected = turn(None)
    some, found = turn(part)
    assert (every, some) == (6, passes)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

"""What a model reads and computes is counted from its shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cuts import UNEVEN, cut_model
from mixtures import tiny_sparse
from slimtune.bench.work import Work

HIDDEN, HEAD, WORDS = 64, 16, 97


@pytest.mark.parametrize("tied", [False, True])
def test_a_cut_llama_by_hand(tied: bool) -> None:
    model, _ = cut_model("llama", UNEVEN, tie_word_embeddings=tied)
    work = Work.of(model)
    groups, channels = (1, 2, 1), (40, 33, 96)
    weights = sum(HIDDEN * HEAD * (2 + 1 + 1 + 2) * kept for kept in groups) + sum(3 * HIDDEN * wide for wide in channels)
    table, norms = WORDS * HIDDEN, 7 * HIDDEN
    assert work.parameters == weights + norms + (1 if tied else 2) * table
    assert work.weight_bytes == 4 * work.parameters
    assert work.step_bytes == 4 * (weights + norms + table)
    assert work.kv_bytes == tuple(2 * 4 * HEAD * kept for kept in groups)
    assert work.block_flops == 2 * weights
    assert work.head_flops == 2 * table
    assert work.pair_flops == tuple(4 * HEAD * 2 * kept for kept in groups)
    assert work.decode_bytes(3, 50) == work.step_bytes + 3 * 50 * sum(work.kv_bytes)
    assert work.decode_flops(3, 50) == 3 * (work.block_flops + work.head_flops + 50 * sum(work.pair_flops))
    assert work.facts()["kv_bytes"] == sum(work.kv_bytes)


def test_windows_are_not_looked_beyond() -> None:
    model, _ = cut_model("gemma3_text", None)  # windows of 16 in the first and last of three layers
    work = Work.of(model)
    assert work.windows == (16, 0, 16)
    layer = work.kv_bytes[0]
    assert work.decode_bytes(1, 50) - work.step_bytes == layer * (16 + 50 + 16)
    pairs = work.prefill_flops(1, 20) - 20 * work.block_flops - work.head_flops
    assert pairs == work.pair_flops[0] * (2 * (16 * 17 // 2 + 4 * 16) + 20 * 21 // 2)
    assert work.prefill_flops(1, 10) - 10 * work.block_flops - work.head_flops == 3 * work.pair_flops[0] * 55


def test_of_experts_those_that_are_chosen() -> None:
    """Two of five a word: a step of one row reads two, of two rows on the average 3.2, of many all."""
    model = tiny_sparse()
    work = Work.of(model)
    one = 3 * 64 * 96
    assert work.expert_bytes == 4 * 2 * 5 * one
    assert work.block_flops == 2 * 2 * (64 * 24 * (4 + 2 + 2 + 4) + 5 * 64 + 2 * one)
    whole = sum(work.kv_bytes) * 50
    read = [work.step_bytes + rows * whole - work.decode_bytes(rows, 50) for rows in (1, 2, 40)]
    assert read == [4 * 2 * 3 * one, round(4 * 2 * (5 - 3.2) * one), 0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "mixtral"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    model = tiny_sparse(experts_implementation="eager") if name == "mixtral" else cut_model(name, UNEVEN)[0]
    model.set_attn_implementation("eager")
    work, tokens = Work.of(model), 10
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, tokens, dtype=torch.long), use_cache=False, logits_to_keep=1)
    heads = tokens * tokens - tokens * (tokens + 1) // 2  # eager attention computes the pairs that the mask hides, too
    rotary = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] - 2 * tokens * tokens * sum(work.pair_flops)
    assert 0 <= rotary < 0.01 * counter.get_total_flops()
    assert counter.get_total_flops() - rotary - 2 * heads * sum(work.pair_flops) == work.prefill_flops(2, tokens)

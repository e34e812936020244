"""Perplexity and its standard error, against hand-made numbers and a bootstrap."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimtune.data.prompts import Encoded
from slimtune.data.windows import Windows
from slimtune.evaluate import perplexity as module
from slimtune.evaluate.perplexity import perplexity

CPU = torch.device("cpu")
V = 7


class Bigram(nn.Module):
    """Logits [V] that depend on the present token alone."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table
        self.batches: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool, **_: Any) -> Any:
        assert not self.training
        self.batches.append(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])


def texts(*rows: list[int], max_length: int = 4) -> Windows:
    return Windows.build([np.array(row, np.int32) for row in rows], [], max_length)


def by_hand(table: Tensor, windows: list[list[int]]) -> tuple[list[float], list[int]]:
    logp = torch.log_softmax(table.double(), -1)
    losses = [-sum(float(logp[a, b]) for a, b in pairwise(row)) for row in windows]
    return losses, [len(row) - 1 for row in windows]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_value_by_hand(batch: int) -> None:
    table = torch.randn(V, V)
    stream = [1, 2, 3, 4, 5, 6, 1, 3, 5, 2, 4, 6]
    model = Bigram(table)
    model.train()
    figures = perplexity(model, texts(stream), 10, batch, CPU)
    assert model.training
    sums, counts = by_hand(table, [stream[:4], stream[4:8], stream[8:]])
    loss = sum(sums) / sum(counts)
    assert figures["tokens"] == 9
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert figures["ppl"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert len(model.batches) == math.ceil(3 / batch)


def test_flash_attention_gets_one_window_at_a_time() -> None:
    windows = texts([1, 2, 3, 4] * 5)
    model, flash = Bigram(torch.randn(V, V)), Bigram(torch.zeros(0))
    flash.table = model.table
    flash.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    assert perplexity(flash, windows, 10, 4, CPU) == pytest.approx(perplexity(model, windows, 10, 4, CPU))
    assert [len(batch) for batch in flash.batches] == [1] * 5
    assert [len(batch) for batch in model.batches] == [4, 1]


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    figures = perplexity(Bigram(torch.zeros(V, V)), texts([1, 2, 3, 4] * 5), 10, 4, CPU)
    assert figures["ppl"] == pytest.approx(V)
    assert figures["ppl_se"] == pytest.approx(0.0, abs=1e-5)


def test_only_targets_count_and_windows_weigh_by_them() -> None:
    table = torch.randn(V, V)
    long = Encoded(np.array([1, 2, 3, 4, 5], np.int32), np.array([0, 0, 1, 1, 1], np.bool_), 0, 2)
    short = Encoded(np.array([6, 5, 4], np.int32), np.array([0, 0, 1], np.bool_), 0, 2)
    windows = Windows.build([], [long, short], 5, packing=False)
    figures = perplexity(Bigram(table), windows, 10, 2, CPU)
    logp = torch.log_softmax(table.double(), -1)
    picked = [float(logp[a, b]) for a, b in ((2, 3), (3, 4), (4, 5), (5, 4))]
    assert figures["tokens"] == 4
    assert figures["loss"] == pytest.approx(-sum(picked) / 4, rel=1e-6)


def test_the_standard_error_is_about_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 200).astype(float)
    sums = counts * rng.normal(3.0, 0.8, 200)
    figures = module._figures(torch.tensor(sums), torch.tensor(counts))
    draws = rng.integers(0, 200, (4000, 200))
    ratios = np.exp(sums[draws].sum(1) / counts[draws].sum(1))
    assert figures["ppl_se"] == pytest.approx(ratios.std(), rel=0.1)
    assert figures["ppl"] == pytest.approx(math.exp(sums.sum() / counts.sum()))


def test_the_standard_error_by_hand() -> None:
    figures = module._figures(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([2.0, 2.0, 4.0]))
    loss = 15 / 8
    residuals = [2 - 2 * loss, 4 - 2 * loss, 9 - 4 * loss]
    error = math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 8
    assert figures["ppl_se"] == pytest.approx(math.exp(loss) * error)
    module._figures(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([2.0, 2.0, 4.0]), found := module.Influences())
    assert found.numbers == pytest.approx([3 * r / 8 for r in residuals])


def test_windows_are_told_apart_by_their_tokens_and_targets() -> None:
    def seen(stream: list[int], batch: int = 2) -> str:
        perplexity(Bigram(torch.zeros(V, V)), texts(stream), 10, batch, CPU, influences=(found := module.Influences()))
        assert len(found.numbers) == 4
        return found.windows

    stream = [1, 2, 3, 4] * 4
    assert seen(stream) == seen(stream, batch=4) != seen([*stream[:-1], 5])


def test_a_limit_takes_windows_from_all_over() -> None:
    model = Bigram(torch.zeros(V, V))
    windows = texts([i % V for i in range(400)])
    figures = perplexity(model, windows, 10, 4, CPU)
    assert figures["tokens"] == 30
    chosen = windows.spread(10)
    assert chosen == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    seen = torch.cat(model.batches).tolist()
    assert seen == [[(4 * index + offset) % V for offset in range(4)] for index in chosen]


def test_a_model_that_is_certain_and_wrong_overflows_nothing() -> None:
    table = torch.full((V, V), 0.0)
    table[:, 0] = 1e4
    figures = perplexity(Bigram(table), texts([1, 2, 3, 4]), 1, 1, CPU)
    assert figures["loss"] == pytest.approx(1e4)
    assert math.isfinite(figures["ppl"])
    json_safe = all(math.isfinite(value) for value in figures.values())
    assert json_safe


def test_windows_without_targets_give_no_number() -> None:
    only = Encoded(np.array([1, 2], np.int32), np.array([0, 0], np.bool_), 0, 2)
    figures = perplexity(Bigram(torch.zeros(V, V)), Windows.build([], [only], 4), 4, 4, CPU)
    assert math.isnan(figures["ppl"])
    assert figures["tokens"] == 0

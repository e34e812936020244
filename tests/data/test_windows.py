from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from families import FAMILY_NAMES, tiny_config
from slimtune.data.prompts import Encoded
from slimtune.data.windows import IGNORE, MIN_TAIL, Windows, pack

PAD = 0


def example(length: int, answer: int, seed: int = 0) -> Encoded:
    ids = np.random.default_rng([seed, length]).integers(3, 97, length).astype(np.int32)
    target = np.arange(length) >= length - answer
    return Encoded(ids, target, prefix=1, head=length - answer)


EXAMPLES = [example(length, answer) for length, answer in [(9, 3), (24, 10), (5, 5), (13, 1), (17, 16), (7, 2), (3, 1)]]


def model_of(family: str, attention: str | None) -> Any:
    torch.manual_seed(0)
    config = tiny_config(family)
    if attention is not None:
        config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).eval()


def loss_sum(model: Any, windows: Windows, size: int, flatten: bool = False) -> float:
    """Sum of the loss over all targets, in batches of ``size``."""
    total = 0.0
    for start in range(0, len(windows), size):
        batch = windows.collate(range(start, min(start + size, len(windows))), flatten)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        total += loss.item()
    return total


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), *((name, None) for name in FAMILY_NAMES[1:])]
)
def test_packed_examples_have_the_loss_of_single_ones(family: str, attention: str | None) -> None:
    model = model_of(family, attention)
    single = Windows.build([], EXAMPLES, 32, PAD, packing=False)
    packed = Windows.build([], EXAMPLES, 32, PAD, packing=True)
    assert len(single) == 7
    assert len(packed) == 3
    assert single.targets == packed.targets == sum(int(item.target[1:].sum()) for item in EXAMPLES)
    alone = loss_sum(model, single, size=1) / single.targets
    for windows, size in [(packed, 3), (packed, 1), (single, 4)]:
        assert loss_sum(model, windows, size) / windows.targets == pytest.approx(alone, abs=1e-5)
    assert loss_sum(model, packed, 3, flatten=True) / packed.targets == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_one_another(attention: str) -> None:
    model = model_of("llama", attention)
    first, second, other = example(10, 4), example(9, 4), example(10, 4, seed=1)
    outputs = []
    for neighbour in (first, other):
        batch = Windows.build([], [neighbour, second, example(15, 2), example(2, 1)], 19, PAD).collate([1, 0])
        assert batch["position_ids"].tolist() == [[*range(10), *range(9)], [*range(15), 0, 1, 2, 3]]
        batch.pop("labels")
        outputs.append(model(**batch, use_cache=False).logits)
    assert not torch.allclose(outputs[0][0, :10], outputs[1][0, :10], atol=1e-3)
    torch.testing.assert_close(outputs[0][0, 10:], outputs[1][0, 10:])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])


def test_a_packed_batch_in_full() -> None:
    windows = Windows.build([], [example(4, 2), example(3, 3), example(5, 1)], 8, pad=2)
    assert (len(windows), windows.tokens, windows.targets) == (2, 12, 5)
    batch = windows.collate([0, 1])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    a, b, c = (item.ids.tolist() for item in (example(4, 2), example(3, 3), example(5, 1)))
    x = IGNORE
    assert batch["input_ids"].tolist() == [[*c, *b], [*a, 2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[x, x, x, x, c[4], x, b[1], b[2]], [x, x, a[2], a[3], x, x, x, x]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    flat = windows.collate([1, 0], flatten=True)
    assert flat["input_ids"].tolist() == [[*a, *c, *b]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert flat["labels"].tolist() == [[x, x, a[2], a[3], x, x, x, x, c[4], x, b[1], b[2]]]


def test_unpacked_examples_are_padded_right_with_a_mask() -> None:
    windows = Windows.build([], [example(4, 2), example(2, 1), example(4, 1)], 8, pad=2, packing=False)
    batch = windows.collate([0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [*example(2, 1).ids, 2, 2]
    assert "attention_mask" not in windows.collate([0, 2])


@pytest.mark.parametrize("packing", [True, False])
def test_text_is_joined_and_cut(packing: bool) -> None:
    texts = [np.arange(50, dtype=np.int32), np.arange(50, 150, dtype=np.int32)]
    windows = Windows.build(texts, [example(5, 2)], 64, PAD, packing)
    assert (len(windows), windows.tokens) == (3, 64 + 64 + 5)  # a tail of 22 tokens is left out
    batch = windows.collate([1, 0])
    assert batch["input_ids"].tolist() == [list(range(64, 128)), list(range(64))]
    assert batch["labels"].tolist() == [[IGNORE, *range(65, 128)], [IGNORE, *range(1, 64)]]
    assert batch["position_ids"].tolist() == [list(range(64))] * 2
    assert windows.targets == 63 + 63 + 2


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(0, []), (1, [1]), (10, [10]), (64, [64]), (64 + MIN_TAIL - 1, [64]), (96, [64, 32])]
)
def test_the_last_window_of_text(tokens: int, lengths: list[int]) -> None:
    windows = Windows.build([np.ones(tokens, np.int32)], [], 64)
    assert np.diff(windows.offsets).tolist() == lengths
    assert windows.targets == sum(length - 1 for length in lengths)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_pack_is_first_fit_decreasing(lengths: list[int]) -> None:
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        room = (group for group in expected if sum(lengths[i] for i in group) + lengths[index] <= 40)
        group = next(room, None)
        if group is None:
            expected.append([index])
        else:
            group.append(index)
    assert pack(lengths, 40) == expected


def test_packing_many_examples_is_fast_and_tight() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 20_000).tolist()
    groups = pack(lengths, 512)
    assert sum(lengths) / (512 * len(groups)) > 0.99


@given(st.integers(1, 200), st.integers(1, 300))
def test_spread_is_a_sorted_sample_over_the_whole_range(windows: int, count: int) -> None:
    built = Windows.build([np.zeros(2 * windows, np.int32)], [], 2)
    indices = built.spread(count)
    assert len(set(indices)) == len(indices) == min(count, windows)
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= windows / len(indices)
    assert windows - windows / len(indices) - 1 <= indices[-1] < windows


def test_spread_of_nothing_is_empty() -> None:
    assert Windows.build([], [], 8).spread(4) == []


def test_a_short_last_text_window_keeps_the_plain_causal_attention() -> None:
    windows = Windows.build([np.arange(100, dtype=np.int32) % 97], [], 64, PAD)
    batch = windows.collate([0, 1])
    assert batch["input_ids"].shape == (2, 64)
    assert find_packed_sequence_indices(batch["position_ids"]) is None
    model = model_of("llama", "sdpa")
    alone = loss_sum(model, windows, size=1)
    assert loss_sum(model, windows, size=2) == pytest.approx(alone, rel=1e-6)

"""Losses by hand, and the mean over a step's targets whatever its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from gated import random_model
from slimtune.train.objective import (
    IGNORE,
    Batch,
    accumulate,
    compiled_cross_entropy,
    count_targets,
    cross_entropy_sum,
    distillation_sum,
    forward,
)

ROWS, TOKENS = 5, 9


def batch() -> dict[str, Tensor]:
    """Rows with 8, 7, 5, 2 and 0 targets."""
    ids = torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, hidden in enumerate((1, 2, 4, 7, 9)):
        labels[row, :hidden] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def split(sizes: Sequence[int]) -> list[Batch]:
    parts: list[Batch] = []
    for start, size in zip((sum(sizes[:number]) for number in range(len(sizes))), sizes, strict=True):
        parts.append({key: value[start : start + size] for key, value in batch().items()})
    return parts


def gradients(sizes: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    model, _ = random_model("llama-bias", rank=2)
    accelerator = Accelerator(cpu=True)

    def loss(part: Batch) -> Tensor:
        return cross_entropy_sum(forward(model, part), part["labels"])

    value = accumulate(model, split(sizes), accelerator, loss)
    assert not value.requires_grad
    return float(value), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (4, 1)])
def test_micro_batches_equal_one_big_batch(sizes: Sequence[int]) -> None:
    value, found = gradients(sizes)
    whole, expected = gradients((ROWS,))
    assert value == pytest.approx(whole, rel=1e-6)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_the_value_is_the_mean_over_targets() -> None:
    model, _ = random_model("llama-bias", rank=2)
    part = batch()
    with torch.no_grad():
        logits = forward(model, part)
        rows = [cross_entropy_sum(logits[row : row + 1], part["labels"][row : row + 1]) for row in range(ROWS)]
    assert gradients((1,) * ROWS)[0] == pytest.approx(float(sum(rows)) / (8 + 7 + 5 + 2), rel=1e-5)


def test_targets_are_counted_after_the_shift() -> None:
    assert count_targets(split((2, 3)), Accelerator(cpu=True)) == 8 + 7 + 5 + 2
    labels = torch.full((1, 4), IGNORE)
    labels[0, 0] = 5  # the first token is never predicted
    assert count_targets([{"labels": labels}], Accelerator(cpu=True)) == 1, "never zero: the loss would be NaN"


def test_a_step_without_targets_has_a_loss_and_gradient_of_zero() -> None:
    model, _ = random_model("llama", rank=2)
    part = {**batch(), "labels": torch.full((ROWS, TOKENS), IGNORE)}
    loss = lambda part: cross_entropy_sum(forward(model, part), part["labels"])  # noqa: E731
    assert float(accumulate(model, [part], Accelerator(cpu=True), loss)) == 0.0
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_forward_hides_labels_and_switches_the_cache_off() -> None:
    seen: dict[str, Any] = {}

    class Spy(torch.nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            seen.update(kwargs)
            return type("Output", (), {"logits": torch.zeros(1)})

    forward(Spy(), {"input_ids": torch.ones(1), "position_ids": torch.ones(1), "labels": torch.ones(1)})
    assert set(seen) == {"input_ids", "position_ids", "use_cache"}
    assert seen["use_cache"] is False


# --- losses ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    # V = 2; position t predicts label t + 1; the last position and the ignored label do not count
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [9.0, -9.0]]])
    labels = torch.tensor([[1, 1, IGNORE, 0]])
    expected = math.log(1 + math.exp(-1.0)) + math.log(2)
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(expected, rel=1e-6)
    assert float(cross_entropy_sum(logits, torch.full((1, 4), IGNORE))) == 0.0


def test_the_compiled_loss_and_its_gradient_are_the_same() -> None:
    logits, labels = torch.randn(2, 9, 97, dtype=torch.bfloat16), torch.randint(0, 97, (2, 9))
    labels[0, :4] = IGNORE
    found = []
    for loss in (cross_entropy_sum, compiled_cross_entropy("aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        found.append((value.detach(), leaf.grad))
    (eager, slope), (compiled, other) = found
    assert compiled.dtype == torch.float32
    assert float(compiled) == pytest.approx(float(eager), rel=1e-6)
    torch.testing.assert_close(other, slope, rtol=1e-2, atol=1e-6)  # a unit in the last place of bf16 is 0.8%


def test_cross_entropy_is_computed_in_fp32() -> None:
    logits, labels = torch.randn(1, 50, 97), torch.randint(0, 97, (1, 50))
    half = cross_entropy_sum(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(cross_entropy_sum(logits.bfloat16().float(), labels)), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_by_hand(temperature: float) -> None:
    student = torch.tensor([[[0.0, 1.0], [5.0, -5.0], [0.5, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[2.0, 0.0], [9.0, 0.0], [0.0, 3.0]]])
    labels = torch.tensor([[0, 1, IGNORE]])  # only position 0 predicts a target
    ours = torch.softmax(student[0, 0].detach() / temperature, 0)
    theirs = torch.softmax(teacher[0, 0] / temperature, 0)
    expected = temperature**2 * float((theirs * (theirs / ours).log()).sum())
    value = distillation_sum(student, teacher, labels, temperature)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert torch.allclose(student.grad[0, 0], temperature * (ours - theirs), atol=1e-6)
    assert not student.grad[0, 1:].any()


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    logits = torch.randn(2, 6, 11, requires_grad=True)
    value = distillation_sum(logits, logits.detach(), torch.randint(0, 11, (2, 6)), 2.0)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(logits.grad.abs().max()) < 1e-5
    other = distillation_sum(logits, torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6)), 2.0)
    assert float(other.detach()) > 0.1

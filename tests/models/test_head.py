"""The loss that a head gives chunk by chunk, against the logits' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from families import FAMILY_NAMES
from gated import random_model, sample_ids
from slimtune.models import head as heads
from slimtune.train.objective import IGNORE, cross_entropy_sum, find_targets, forward, loss_sum


def batch(known: bool) -> dict[str, Tensor]:
    ids = sample_ids(rows=3)
    labels = ids.clone()
    labels[0, :5] = labels[1] = IGNORE
    return {"input_ids": ids, "labels": labels, **({"targets": find_targets(labels)} if known else {})}


def loss_and_gradients(model: nn.Module, part: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_sum(model, part) / 7
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("known", [True, False], ids=["targets known", "not known"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_chunks_give_the_loss_of_the_logits(name: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_model(name, rank=2)
    part = batch(known)
    expected, slopes = loss_and_gradients(model, part)
    seen = list[int]()
    monkeypatch.setattr(heads, "MOST", 4 * model.get_output_embeddings().weight.shape[0])  # four positions at once
    real = torch.log_softmax
    monkeypatch.setattr(
        torch, "log_softmax", lambda logits, *args, **rest: seen.append(len(logits)) or real(logits, *args, **rest)
    )
    found, others = loss_and_gradients(model, part)
    if name in ("gemma2", "granite"):  # their logits are changed after the head
        assert heads.head_of(model) is None
        assert not seen
    else:
        assert max(seen) == 4
        assert sum(seen) == (len(part["targets"]) if known else part["labels"].numel())
    assert found == pytest.approx(expected, rel=1e-6)
    assert slopes.keys() == others.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(others[key], slope, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    assert forward(model, part).shape == (*part["labels"].shape, model.config.vocab_size), "the head is as it was"


def test_few_logits_are_taken_whole() -> None:
    model, _ = random_model("llama", rank=2)
    used = list[Tensor]()
    loss_sum(model, batch(True), lambda logits, labels: used.append(logits) or cross_entropy_sum(logits, labels))
    assert len(used) == 1


def test_a_head_that_is_trained_gives_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_model("llama")
    monkeypatch.setattr(heads, "MOST", 1)
    assert heads.head_of(model) is None
    _, slopes = loss_and_gradients(model, batch(True))
    assert any("embed" in name or "lm_head" in name for name in slopes)


def test_half_precision_is_as_good_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, dtype=torch.bfloat16), torch.randn(97, 16, dtype=torch.bfloat16)
    labels = torch.randint(0, 97, (50,))
    exact = hidden.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.double().T, labels, reduction="sum").backward()
    assert exact.grad is not None
    monkeypatch.setattr(heads, "MOST", 97 * 8)
    leaf = hidden.clone().requires_grad_()
    heads._Loss.apply(leaf, weight, None, labels).backward()
    assert leaf.grad is not None
    assert float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()) < 1e-2

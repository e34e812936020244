"""Accuracy on multiple-choice rows, on a model whose likelihoods are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bases import make_tokenizer
from slimtune.data.sources import Row
from slimtune.evaluate.choices import accuracy

CPU = torch.device("cpu")


class Toy(nn.Module):
    """The next token does not depend on what was read: ``logits`` for all; ``after`` overrides those behind a token."""

    def __init__(self, logits: Tensor, after: dict[int, Tensor] | None = None):
        super().__init__()
        self.logits, self.after = logits, after or {}
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not self.training
        self.seen.append((input_ids.tolist(), attention_mask.tolist()))
        out = self.logits.expand(*input_ids.shape, -1).clone()
        for token, logits in self.after.items():
            out[input_ids == token] = logits
        return SimpleNamespace(logits=out)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def favouring(tokenizer: Any, *texts: str, by: float = 3.0) -> Tensor:
    logits = torch.zeros(len(tokenizer))
    for text in texts:
        logits[ids(tokenizer, text)] = by
    return logits


def row(prompt: str, choices: list[str], label: int, lead: str = " ") -> Row:
    return Row(prompt=prompt, completion=lead + choices[label], choices=tuple(choices), label=label)


def test_choices_that_carry_their_space_are_scored_as_they_are(tokenizer: Any) -> None:
    bare, spaced = Toy(favouring(tokenizer, " X")), Toy(favouring(tokenizer, " X"))
    accuracy(bare, tokenizer, [row("Q?", ["X", "Y"], 0)], 32, CPU)
    accuracy(spaced, tokenizer, [row("Q?", [" X", " Y"], 0, lead="")], 32, CPU)
    assert bare.seen == spaced.seen


def test_the_likelier_choice_wins(tokenizer: Any) -> None:
    model = Toy(favouring(tokenizer, " X"))
    rows = [row("Q?", ["X", "Y"], 0), row("Q!", ["X", "Y"], 1), row("Q.", ["Y", "X"], 1), row("Q,", ["Y", "X"], 1)]
    model.train()
    figures = accuracy(model, tokenizer, rows, 32, CPU)
    assert model.training
    assert figures == {
        "accuracy": 0.75,
        "accuracy_se": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "majority": 0.75,
        "rows": 4.0,
    }


def test_a_tie_goes_to_the_first(tokenizer: Any) -> None:
    model = Toy(torch.zeros(len(tokenizer)))
    assert accuracy(model, tokenizer, [row("Q?", ["X", "Y"], 0)], 32, CPU)["accuracy"] == 1.0
    assert accuracy(model, tokenizer, [row("Q?", ["X", "Y"], 1)], 32, CPU)["accuracy"] == 0.0


def test_only_the_choice_counts_not_the_prompt_nor_padding(tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    logits = favouring(tokenizer, " Z", by=2.0)
    logits[pad] = 50.0  # were padding counted, the short choice would win or lose by it
    model = Toy(logits)
    short, long = "Z", "Z" * 9
    assert accuracy(model, tokenizer, [row(" Z Z Z", [long, short], 1)], 64, CPU)["accuracy"] == 1.0
    tokens, mask = model.seen[0]
    assert [len(line) for line in tokens] == [len(line) for line in mask]
    assert [sum(line) for line in mask] == [len(ids(tokenizer, f" Z Z Z {choice}")) for choice in (long, short)]
    assert tokens[1][sum(mask[1]) :] == [pad] * (len(tokens[1]) - sum(mask[1]))


def test_the_first_token_of_a_choice_counts(tokenizer: Any) -> None:
    """Both choices end alike; only their first token, predicted by the prompt's last one, differs."""
    last = ids(tokenizer, "Q?")[-1]
    model = Toy(torch.zeros(len(tokenizer)), {last: favouring(tokenizer, "Y")})
    assert accuracy(model, tokenizer, [row("Q?", ["Xa", "Ya"], 1, lead="")], 32, CPU)["accuracy"] == 1.0
    assert accuracy(model, tokenizer, [row("Q?", ["Ya", "Xa"], 0, lead="")], 32, CPU)["accuracy"] == 1.0


def test_eos_is_not_scored(tokenizer: Any) -> None:
    model = Toy(favouring(tokenizer, "Y"))
    accuracy(model, tokenizer, [row("Q?", ["Y", "X"], 0)], 32, CPU)
    tokens, _ = model.seen[0]
    assert tokenizer.eos_token_id not in [token for line in tokens for token in line]
    assert tokens == [ids(tokenizer, "Q? Y"), ids(tokenizer, "Q? X")]


@pytest.mark.parametrize("length", [4, 8, 12])
def test_a_long_prompt_is_cut_from_the_left(tokenizer: Any, length: int) -> None:
    model = Toy(favouring(tokenizer, " X"))
    prompt = "#" * 100 + "Q?"
    assert accuracy(model, tokenizer, [row(prompt, ["Y", "X"], 1)], length, CPU)["accuracy"] == 1.0
    tokens, mask = model.seen[0]
    assert all(sum(line) == length for line in mask)
    assert tokens[0] == ids(tokenizer, prompt + " Y")[-length:]


def test_the_beginning_token_stays_when_a_prompt_is_cut() -> None:
    tokenizer = make_tokenizer(bos=True)
    model = Toy(torch.zeros(len(tokenizer)))
    accuracy(model, tokenizer, [row("#" * 50, ["Y", "X"], 1)], 8, CPU)
    for tokens, choice in zip(model.seen[0][0], ("Y", "X"), strict=True):
        assert tokens == [tokenizer.bos_token_id, *ids(tokenizer, "#" * 50 + f" {choice}")[-7:]]


def test_a_choice_longer_than_the_window_is_scored_by_its_beginning(tokenizer: Any) -> None:
    model = Toy(favouring(tokenizer, "X", by=5.0))
    choices = ["Y" * 40, "X" * 40]
    assert accuracy(model, tokenizer, [row("Q?", choices, 1, lead="")], 8, CPU)["accuracy"] == 1.0
    tokens, _ = model.seen[0]
    assert tokens == [ids(tokenizer, choice)[:8] for choice in choices]


def test_white_space_before_answers_is_that_of_training(tokenizer: Any) -> None:
    model = Toy(torch.zeros(len(tokenizer)))
    accuracy(model, tokenizer, [row("Q?", ["no", "yes"], 1, lead="\n")], 32, CPU)
    assert model.seen[0][0][0][: len(ids(tokenizer, "Q?\nno"))] == ids(tokenizer, "Q?\nno")

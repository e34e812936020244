"""Metrics against hand-made numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimtune.evaluate import metrics


def test_the_likeliest_choice_and_ties() -> None:
    assert metrics.choice({"label": 1}, [(-3.0, False), (-2.0, True)]) == {"accuracy": 1.0, "macro_f1": [1, 1]}
    assert metrics.choice({"label": 1}, [(-2.0, False), (-2.0, True)]) == {"accuracy": 0.0, "macro_f1": [1, 0]}


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_that_of_scikit_learn(seed: int) -> None:
    from sklearn.metrics import f1_score  # slow to import: not in every process that collects

    labels, answers = np.random.default_rng(seed).integers(0, 4, (2, 12)).tolist()
    assert metrics.macro_f1(list(zip(labels, answers, strict=True))) == pytest.approx(
        f1_score(labels, answers, average="macro")
    )


def test_rouge_by_hand() -> None:
    found = metrics.rouge({"completion": " the doctor helps"}, [" the doctor sleeps \n"])
    assert found == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})


def test_perplexity_weighs_texts_by_their_size() -> None:
    docs = [{"tokens": 2, "bytes": 8}, {"tokens": 6, "bytes": 24}]
    pairs = [metrics.perplexity(doc, [(score, False)]) for doc, score in zip(docs, (-4.0, -4.0), strict=True)]
    assert metrics.token_perplexity([pair["perplexity"] for pair in pairs]) == pytest.approx(math.e)
    assert metrics.bits_per_byte([pair["bits_per_byte"] for pair in pairs]) == pytest.approx(8 / (32 * math.log(2)))


def test_a_loss_beyond_all_bounds_has_a_perplexity() -> None:
    assert metrics.token_perplexity([[-9000.0, 2]]) == math.exp(700)

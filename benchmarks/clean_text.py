"""Whether leads in a file of rows hold on the test text whose wording no row to learn from has.

    python benchmarks/clean_text.py docs/results/retention.json recipes/health-docs.yaml recipes/legal-docs.yaml

The guard leaves out rows to learn from that are nearly a test row; single runs of words that stand in both remain. Here the
test windows are parted by whether one of their runs of ``data.ngram`` words stands anywhere in the train or decision rows, and
the perplexities of both parts are made of what each window added to the loss (three digits of it stand in the rows). Recipes:
those of the rows' texts, in their order. Needs what the recipes name: SLIMTUNE_DATA.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

import slimtune
from slimtune.comparison.rows import Row, read
from slimtune.comparison.stats import OURS, PPL, Board, boards
from slimtune.data.batches import divide, load_splits
from slimtune.data.ngrams import chunks
from slimtune.data.overlap import apart
from slimtune.data.sources import Row as Text
from slimtune.preflight import guarded

Parted = tuple[NDArray[np.bool_], NDArray[np.float64]]


def parts_of(recipe: slimtune.Recipe) -> Parted:
    """Of the test windows that a run measures: whether each shares a run of words with the rows to learn from; its tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.model.tokenizer or recipe.model.path)
    config, need = guarded(recipe), frozenset({"train", "decision", "test"})
    rows, _ = apart(divide(config, need, Counter()), config, Counter())
    learned = np.unique(np.concatenate([chunk.gram for chunk in chunks([*rows["train"], *rows["decision"]], config.ngram)]))
    windows = load_splits(config, tokenizer, frozenset({"test"})).test
    chosen = windows.spread(recipe.evaluate.windows)
    collated = [windows.collate([index]) for index in chosen]
    texts = [Text(text=tokenizer.decode(window["input_ids"][0], skip_special_tokens=True)) for window in collated]
    shared = np.zeros(len(chosen), bool)
    for chunk in chunks(texts, config.ngram):
        shared[chunk.unit[np.isin(chunk.gram, learned)] // 2] = True
    return shared, np.array([(window["labels"][0, 1:] >= 0).sum().item() for window in collated], float)


def of_part(row: Row, board: Board, tokens: NDArray[np.float64], part: NDArray[np.bool_]) -> float:
    """The perplexity of a run over a part of its windows."""
    added = np.array(board.windows(row["method"], row["keep"])[row["seed"]][1])
    if len(added) != len(tokens):
        raise SystemExit(f"{row['method']}: {len(added)} windows in the rows, {len(tokens)} by the recipe")
    sums = added * tokens.sum() / len(tokens) + math.log(row["value"]) * tokens  # perplexity.Influences
    return math.exp(sums[part].sum() / tokens[part].sum())


def lines(board: Board, shared: NDArray[np.bool_], tokens: NDArray[np.float64]) -> list[str]:
    """Perplexity by method and budget on both parts, and what ATP is ahead by there."""
    rows = {(row["method"], row["keep"], row["seed"]): row for row in board.rows if row["metric"] == PPL and row.get("windows")}
    names = ("no run of words in train", "the others")
    found = [f"{board.domain}: {(~shared).sum()} of {len(shared)} windows have {names[0]}"]
    by_part = {
        name: {key: of_part(row, board, tokens, part) for key, row in rows.items()}
        for name, part in zip(names, (~shared, shared), strict=True)
    }
    for method, keep in sorted({key[:2] for key in rows}, key=lambda it: (-it[1], it[0])):
        cells = []
        for values in by_part.values():
            own = {seed: value for (name, size, seed), value in values.items() if (name, size) == (method, keep)}
            lead = [value - values[OURS, keep, seed] for seed, value in own.items() if (OURS, keep, seed) in values]
            ahead = f" ({statistics.mean(lead):+.2f}, {sum(each > 0 for each in lead)} of {len(lead)})" if lead else ""
            cells.append(f"{statistics.mean(own.values()):.2f}{'' if method == OURS else ahead}")
        found.append(f"{keep:g} {method:20s} {cells[0]:26s} {cells[1]}")
    return found


def main() -> None:
    """Print both texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("recipes", nargs="+")
    given = parser.parse_args()
    for board, recipe in zip(boards(read(given.rows)), given.recipes, strict=True):
        print("\n".join(lines(board, *parts_of(slimtune.load_recipe(recipe)))), end="\n\n")


if __name__ == "__main__":
    main()

"""The figures that a run reports of a model: on validation windows while it runs, on the test split before and after."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from slimtune.data.batches import Splits
from slimtune.data.windows import spread
from slimtune.evaluate.choices import accuracy
from slimtune.evaluate.perplexity import perplexity
from slimtune.recipe import Recipe
from slimtune.train.session import Figures, figures_in_bf16


class Measure:
    """Takes figures as the recipe's ``evaluate`` section says, the same way for every model of the run."""

    def __init__(self, recipe: Recipe, splits: Splits, tokenizer: Any, accelerator: Accelerator):
        self.recipe, self.splits, self.tokenizer = recipe, splits, tokenizer
        self.device = accelerator.device
        self.bf16 = figures_in_bf16(accelerator)

    def valid(self, model: nn.Module) -> Figures:
        """Perplexity on the validation split."""
        evaluate = self.recipe.evaluate
        with self.eager():
            return perplexity(model, self.splits.valid, evaluate.windows, evaluate.batch, self.device, self.bf16)

    def test(self, model: nn.Module) -> Figures:
        """Perplexity on the test split, and the accuracy on its multiple-choice rows where it has some."""
        evaluate, rows = self.recipe.evaluate, self.splits.choice_rows
        chosen = [rows[index] for index in spread(len(rows), evaluate.choices)]
        with self.eager():
            figures = perplexity(model, self.splits.test, evaluate.windows, evaluate.batch, self.device, self.bf16)
            if chosen:
                length = self.recipe.data.max_length
                figures |= accuracy(model, self.tokenizer, chosen, length, self.device, self.bf16)
        return figures

    def eager(self) -> AbstractContextManager[Any]:
        """A few passes in other shapes and modes than training's: not worth a compilation of their own."""
        return torch.compiler.set_stance("force_eager") if self.recipe.train.compile else nullcontext()

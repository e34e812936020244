"""The figures that a run reports of a model: on validation windows while it runs, on the test split before and after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from slimtune.data.batches import Splits, Windows
from slimtune.data.sources import Row
from slimtune.data.windows import spread
from slimtune.evaluate.choices import accuracy
from slimtune.evaluate.folder import directions
from slimtune.evaluate.harness import check_installed, evaluate_tasks, flat
from slimtune.evaluate.perplexity import Influences, perplexity
from slimtune.evaluate.protection import tell_of_base
from slimtune.evaluate.rows import Prepared, prepare, window_of
from slimtune.evaluate.tasks import find_task
from slimtune.recipe import Recipe
from slimtune.train.session import Figures, figures_in_bf16

Say = Callable[[str], None]


class Measure:
    """Takes figures as the recipe's ``evaluate`` section says, the same way for every model of the run.

    Raises:
        UserError: a task of ``evaluate.tasks`` is unknown, its rows cannot be read, or the harness is not installed.
    """

    def __init__(self, recipe: Recipe, splits: Splits, tokenizer: Any, accelerator: Accelerator, config: Any, say: Say):
        self.recipe, self.splits, self.tokenizer = recipe, splits, tokenizer
        self.device = accelerator.device
        self.bf16 = figures_in_bf16(accelerator)
        names, window, length = recipe.evaluate.tasks, window_of(config), recipe.data.max_length
        if names:
            check_installed()
        tasks = [find_task(name) for name in names]
        limit = recipe.evaluate.rows
        followed = tasks if recipe.evaluate.every else []  # else no validation figure is ever taken
        self._valid_tasks = [prepare(task, "valid", tokenizer, window, limit, length) for task in followed]
        self._test_tasks = [prepare(task, "test", tokenizer, window, max_length=length) for task in tasks]
        tell_of_base(recipe, self._test_tasks, say)

    @property
    def summary(self) -> dict[str, Any]:
        """``task_rows``: {task: SHA-256 of all its test rows}, which this run keeps from what it learns.

        ``lower_is_better``: those of the tasks' figures that are; all others are the better the higher they are.
        """
        ways = [(task.name, *item) for task in self._test_tasks for item in directions(task).items()]
        lower = [f"{task}.{name}" for task, name, way in ways if way == "lower"]
        return {"task_rows": {task.name: task.whole for task in self._test_tasks}, "lower_is_better": lower}

    @property
    def names(self) -> list[str]:
        """The figures that ``test`` takes, without those that stand beside a figure."""
        own = {"loss": True, "ppl": True, "valid_ppl": self.splits.valid.targets, "accuracy": self._choices()}
        tasks = [f"{task.name}.{name}" for task in self._test_tasks for name in directions(task)]
        return [*(name for name, taken in own.items() if taken), *tasks]

    def valid(self, model: nn.Module) -> Figures:
        """Perplexity on the validation split, and the chosen tasks on some of their validation rows."""
        with self.eager():
            figures = self._perplexity(model, self.splits.valid)
            return figures | self._tasks(model, self._valid_tasks, False)

    def test(self, model: nn.Module, influences: Influences | None = None) -> Figures:
        """Perplexity on the test split, the accuracy on its multiple-choice rows, and the chosen tasks with intervals.

        ``valid_ppl`` beside them is for choosing between settings: what was chosen by the test split has seen it.

        Args:
            influences: is filled with what each test window adds to the loss.
        """
        chosen = self._choices()
        with self.eager():
            figures = self._perplexity(model, self.splits.test, influences)
            if self.splits.valid.targets:
                figures["valid_ppl"] = self._perplexity(model, self.splits.valid)["ppl"]
            if chosen:
                length = self.recipe.data.max_length
                figures |= accuracy(model, self.tokenizer, chosen, length, self.device, self.bf16)
            return figures | self._tasks(model, self._test_tasks, True)

    def _choices(self) -> list[Row]:
        rows = self.splits.choice_rows
        return [rows[index] for index in spread(len(rows), self.recipe.evaluate.choices)]

    def _perplexity(self, model: nn.Module, windows: Windows, influences: Influences | None = None) -> Figures:
        evaluate = self.recipe.evaluate
        return perplexity(model, windows, evaluate.windows, evaluate.batch, self.device, self.bf16, influences)

    def glance(self, model: nn.Module) -> Figures:
        """Loss and perplexity on one batch of test windows."""
        evaluate = self.recipe.evaluate
        with self.eager():
            return perplexity(model, self.splits.test, evaluate.batch, evaluate.batch, self.device, self.bf16)

    def _tasks(self, model: nn.Module, tasks: list[Prepared], intervals: bool) -> Figures:
        figures, batches = Figures(), dict[int, list[Prepared]]()
        for task in tasks:
            batches.setdefault(self._rows_in_a_pass(task), []).append(task)
        for batch, some in batches.items():
            found = evaluate_tasks(
                model, self.tokenizer, some, batch=batch, seed=self.recipe.seed, bf16=self.bf16, intervals=intervals
            )
            figures |= flat(found)
        if tasks and self.device.type == "cuda":
            torch.cuda.empty_cache()  # passes of other shapes than training's: nothing would find a use for their memory
        return figures | ({f"{task.name}.rows": float(len(task.docs)) for task in tasks} if intervals else {})

    def _rows_in_a_pass(self, task: Prepared) -> int:
        """No more positions than in a pass of the run's own, for the harness scores each (but of a task that writes, one)."""
        batch = self.recipe.evaluate.batch
        if task.task.file.kind in ("rouge", "own"):
            return batch
        return max(1, min(batch, batch * self.recipe.data.max_length // task.longest))

    def eager(self) -> AbstractContextManager[Any]:
        """A few passes in other shapes and modes than training's: not worth a compilation of their own."""
        return torch.compiler.set_stance("force_eager") if self.recipe.train.compile is True else nullcontext()

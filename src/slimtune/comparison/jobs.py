"""From a comparison to its runs, each checked as a recipe before the first one starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slimtune.comparison.config import Comparison, Method
from slimtune.errors import UserError, nearest
from slimtune.evaluate.scoring import words as task_words
from slimtune.evaluate.tasks import find_task
from slimtune.recipe import Recipe, load
from slimtune.version import versions
from slimtune.yaml_file import read_yaml

OUT = "{out}"
"""In a text of a method: the folder of the runs."""
Key = tuple[str, str, str, float, int]
"""What a run is in the rows: base, domain, method, keep, seed."""


@dataclass(frozen=True)
class Job:
    """One run: what it is called in the rows, and the words of ``slimtune tune`` that make it.

    Attributes:
        shared: the text of the shared recipe; measured: of the tasks that it measures. Both are part of the digest.
        reads: runs whose folders it reads, with theirs.
        first: a model that is made for others and has no rows.
        whose: what tells its label from those of another comparison.
    """

    base: str
    domain: str
    method: str
    keep: float
    seed: int
    file: str
    words: tuple[str, ...]
    folder: Path
    recipe: Recipe = field(compare=False, repr=False)
    shared: str = field(default="", repr=False)
    measured: tuple[str, ...] = field(default=(), repr=False)
    reads: tuple[Job, ...] = field(default=(), compare=False, repr=False)
    first: bool = False
    whose: str = field(default="", compare=False, repr=False)

    @property
    def key(self) -> Key:
        """Base, domain, method, keep, seed."""
        return self.base, self.domain, self.method, self.keep, self.seed

    @property
    def label(self) -> str:
        """For a line of progress."""
        return f"{self.whose}{self.method}{'' if self.keep == 1 else f' {self.keep:g}'} seed {self.seed}"

    def fill(self, text: str) -> str:
        """A text with the folder of the runs in the place of ``{out}``."""
        return text.replace(OUT, self.folder.parent.as_posix())

    @property
    def filled(self) -> tuple[str, ...]:
        """The words as the run gets them."""
        return tuple(map(self.fill, self.words))

    @cached_property
    def digest(self) -> str:
        """Of the shared recipe's text, all words but ``out``, what is measured and what is read: the same on every machine."""
        parts = [self.shared, *self.words, self.seed, *self.measured, *(source.digest for source in self.reads)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Optimiser steps of the model."""
        return self.recipe.tuning_steps

    @property
    def windows(self) -> int:
        """Windows that the run reads, those of its decision counted."""
        return self.steps * self.recipe.train.batch if self.recipe.method == "finetune" else self.recipe.windows

    @property
    def tokens(self) -> int:
        """At most: short windows hold fewer."""
        return self.windows * self.recipe.data.max_length


def jobs_of(comparison: Comparison, out: str | Path | None = None) -> list[Job]:
    """All runs of a comparison, seed by seed, so that an early end leaves whole comparisons.

    Raises:
        UserError: a run is not a valid recipe; names the method and the key.
    """
    folder, common = Path(out or comparison.out), words_of(comparison.set)
    _checked("set", comparison.recipe, common)
    shared = shared_text(comparison.recipe)
    parts: list[tuple[str, float, tuple[str, ...], Recipe]] = []
    for name, method in comparison.methods.items():
        for keep in _budgets(comparison, name, method, common):
            words, recipe = _run(comparison, name, method, keep, common)
            parts.append((name, 1.0 if keep is None else keep, words, recipe))
    measured = {tasks: tasks_text(tasks) for tasks in {recipe.evaluate.tasks for *_, recipe in parts}}
    return [
        Job(
            comparison.base,
            comparison.domain,
            name,
            keep,
            seed,
            comparison.recipe,
            tuple(word.replace("{seed}", str(seed)) for word in words),
            folder / (f"{name}-{seed}" if keep == 1 else f"{name}-{keep:g}-{seed}"),
            _seeded(recipe, seed),
            shared,
            measured[recipe.evaluate.tasks],
        )
        for seed in comparison.seeds
        for name, keep, words, recipe in parts
    ]


def first_of(comparison: Comparison) -> list[Job]:
    """The models that are made before the methods that name them. Raises UserError as :func:`jobs_of` does."""
    found = []
    for item in comparison.first:
        words, folder = words_of(item.changes), Path(item.out)
        recipe = _checked(f"first: {item.out}", item.recipe, words)
        where = ("", "", folder.name, 1.0, recipe.seed)  # nobody's: comparisons share it
        texts = shared_text(item.recipe), tasks_text(recipe.evaluate.tasks)
        found.append(Job(*where, item.recipe, tuple(words), folder, recipe, *texts, first=True))
    return found


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with the seed in the texts that may name another run's folder."""

    def seeded(text: str | None) -> str | None:
        return text and text.replace("{seed}", str(seed))

    model = recipe.model.model_copy(update={"path": seeded(recipe.model.path), "tokenizer": seeded(recipe.model.tokenizer)})
    distill = recipe.distill.model_copy(update={"teacher": seeded(recipe.distill.teacher)})
    return recipe.model_copy(update={"model": model, "distill": distill})


def tasks_text(names: Sequence[str]) -> tuple[str, ...]:
    """What the figures of tasks depend on besides the program: their files and functions, and the versions of what measures."""
    if not names:
        return ()
    return (
        *(word for name in names for word in task_words(find_task(name))),
        *(f"{name} {number}" for name, number in versions(("lm_eval", "rouge_score")).items()),
    )


def shared_text(file: str | Path) -> str:
    """A recipe file's content without its comments and order."""
    return json.dumps(read_yaml(file, "recipe", "recipes/demo.yaml"), sort_keys=True, default=str)


def _budgets(comparison: Comparison, name: str, method: Method, common: list[str]) -> Sequence[float | None]:
    """The budgets of a method; ``None`` for one that cuts nothing."""
    if method.keep is not None:
        return method.keep
    words = words_of(method.changes, comparison.keep[0])
    if _checked(f"methods.{name}", comparison.recipe, [*common, *words]).method != "finetune":
        return comparison.keep
    if words != words_of(method.changes):
        raise UserError(f"comparison: methods.{name} uses {{keep}} but has no budget; say which, e.g. keep: [0.6]")
    return (None,)


def _run(
    comparison: Comparison, name: str, method: Method, keep: float | None, common: list[str]
) -> tuple[tuple[str, ...], Recipe]:
    where, own = f"methods.{name}", words_of(method.changes, keep)
    words = [*common, "evaluate.dense_lora=false", *own]
    recipe = _checked(where, comparison.recipe, words)
    extra = [] if keep is None else [f"budget.keep={keep:g}"]
    if recipe.method == "finetune":
        given = any(word.startswith("train.steps=") for word in words)
        extra = [] if given else [f"train.steps={_equal_steps(comparison, common, recipe)}"]
    words += extra
    return tuple(words), _checked(where, comparison.recipe, words)


def _equal_steps(comparison: Comparison, common: list[str], recipe: Recipe) -> int:
    """Steps that read as many windows as ``atp`` with the shared recipe, the windows of its search counted."""
    atp = _checked("train.steps at equal cost", comparison.recipe, [*common, "method=atp"])
    return atp.windows // recipe.train.batch


def _checked(where: str, file: str, words: list[str]) -> Recipe:
    try:
        return load(file, words)
    except UserError as error:
        raise UserError(f"comparison: {where}: {str(error).removeprefix('recipe: ')}") from error


def words_of(changes: dict[str, Any], keep: float | None = None) -> list[str]:
    """``key=value`` words; with a budget in the place of ``{keep}``."""
    return [f"{key}={_word(_filled(value, keep))}" for key, value in changes.items()]


def _filled(value: Any, keep: float | None) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, keep) for item in value]
    return value.replace("{keep}", f"{keep:g}") if isinstance(value, str) and keep is not None else value


def _word(value: Any) -> str:
    """A value as YAML on one line; a text as it stands where it reads back as itself."""
    if isinstance(value, str):
        try:
            plain = bool(value) and yaml.safe_load(value) == value
        except yaml.YAMLError:
            plain = False
        if plain and "\n" not in value:
            return value
    return json.dumps(value, ensure_ascii=False)


def chosen(jobs: list[Job], only: Iterable[str] = (), keep: Iterable[float] = (), seeds: Iterable[int] = ()) -> list[Job]:
    """The runs of these methods, budgets and seeds (empty: all), as :class:`Part` has it.

    Raises:
        UserError: the comparison has no such method, budget or seed.
    """
    part = Part(tuple(only), tuple(keep), tuple(seeds))
    part.check([job.key for job in jobs], "the comparison")
    return [job for job in jobs if part.holds(job.key)]


@dataclass(frozen=True)
class Part:
    """Methods, budgets and seeds that are asked for; empty: all. What cuts nothing belongs to every budget."""

    only: tuple[str, ...] = ()
    keep: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    def holds(self, key: Key) -> bool:
        """Whether a run belongs to it."""
        _, _, method, keep, seed = key
        budget = not self.keep or keep in self.keep or keep == 1
        return budget and (not self.only or method in self.only) and (not self.seeds or seed in self.seeds)

    def check(self, keys: Sequence[Key], who: str) -> None:
        """Raises UserError where ``who`` has no run of a method, a budget or a seed."""
        _known("--only", self.only, list(dict.fromkeys(method for _, _, method, _, _ in keys)), who)
        _known("--keep", self.keep, sorted({keep for *_, keep, _ in keys if keep < 1}, reverse=True), who)
        _known("--seeds", self.seeds, sorted({seed for *_, seed in keys}), who)

    def __str__(self) -> str:
        """As it was asked for."""
        given = (("--only", self.only), ("--keep", self.keep), ("--seeds", self.seeds))
        return " ".join(f"{option} {','.join(map(str, values))}" for option, values in given if values)


ALL = Part()


def _known(option: str, asked: Sequence[Any], known: Sequence[Any], who: str) -> None:
    for item in asked:
        if item not in known:
            names = [f"{value}" for value in known]
            hint = nearest(str(item), names) if isinstance(item, str) else ""
            raise UserError(f"{option} {item}: {who} has no such run.{hint} It has: {', '.join(names) or 'none'}")

"""What a run makes of its figures: held to the recipe's guards on the way and at the end, and the speed of what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from slimtune.bench.command import bench_model
from slimtune.bench.measure import Settings
from slimtune.bench.named import speeds
from slimtune.errors import UserError
from slimtune.guard.judge import Figures, Judge
from slimtune.models.load import locate
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, rank
from slimtune.train.judgement import Judgement

Say = Callable[[str], None]
_KEY = "valid"
"""Of stages.json: validation figures of the models that guards are relative to."""


class Appraisal:
    """The guards of a run, and its speed.

    Args:
        recipe: its guards are checked.
        folder: where ``bench.json`` goes.
        stages: what stages.json holds; gains the references' validation figures.
        say: gets lines.

    Raises:
        UserError: a guard or the alarm cannot be used.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, stages: dict[str, Any], say: Say):
        self.recipe, self.folder, self.stages, self.say = recipe, folder, stages, say
        self.judge = Judge(recipe, say)

    def refer(self, word: str, measure: Callable[[], Figures]) -> None:
        """Take validation figures of a model that guards at steps are relative to, where there are such."""
        known = self.stages.setdefault(_KEY, {})
        if word in self._needed and word not in known:
            known[word] = dict(measure())

    @property
    def missing(self) -> list[str]:
        """Words of guards at steps whose validation figures are not known: guards that came with a resume."""
        return [word for word in self._needed if word not in self.stages.get(_KEY, {})]

    @property
    def _needed(self) -> list[str]:
        bounds = self.judge.bounds.values() if self.judge.at_steps else ()
        return list(dict.fromkeys(word for guards in bounds for _, condition in guards for word in condition.words))

    def start(self) -> None:
        """Before the method: what it is relative to is known now, or never will be.

        Raises:
            UserError: it is not, or a guard names a figure that no model has.
        """
        if self.missing:
            raise UserError(
                f"guard: what is relative to {self.missing[0]} was added when that had been measured and was gone; leave such "
                "guards to the end (alarm.begin=end), or start anew with --overwrite"
            )
        self.judge.references = self.stages.get(_KEY, {})
        for figures in self.judge.references.values():
            if rank() == 0:
                self.judge.check_names(figures)

    def at_step(self, figures: Figures, phase: str, step: int) -> Judgement:
        """As rank 0 finds it, which alone has the figures of tasks."""
        if not self.judge.at_steps:
            return Judgement()
        return _shared(self.judge.at_step(figures, phase, step) if rank() == 0 else Judgement())

    def at_end(
        self, result: Figures, base: Figures, dense_lora: Figures, speed: Mapping[str, Figures]
    ) -> tuple[Any, Judgement]:
        """The rulings on the written model as summary.json has them, and what follows from them."""
        references = {"dense": {**base, **speed.get("base", {})}, "dense_lora": dense_lora}
        if rank() != 0:
            return [], _shared(Judgement())
        rulings, judged = self.judge.at_end({**result, **speed.get("result", {})}, references)
        return [ruling.to_dict() for ruling in rulings], _shared(judged)

    def speed(self, accelerator: Accelerator) -> dict[str, dict[str, float]]:
        """Time the written model beside its base, by turns, and write ``bench.json``; figures of ``result`` and ``base``."""
        if not self.judge.wants_speed:
            return {}
        found: dict[str, dict[str, float]] = {}
        if rank() == 0:
            found = self._timed(accelerator.device.type)
        accelerator.wait_for_everyone()
        return found

    def _timed(self, device: str) -> dict[str, dict[str, float]]:
        self.say("speed: the written model beside its base, by turns ...")
        wanted, base = self.recipe.speed, None
        if self.recipe.model.init == "pretrained":
            base = locate(self.recipe.model.path)[0]
        settings = Settings(wanted.batches, wanted.prompt, wanted.context, wanted.steps, wanted.repeats)
        dtype = self.recipe.model.dtype
        found = bench_model(self.folder.path, against=base, settings=settings, device=device, dtype=dtype)
        self.folder.write_json("bench.json", found)
        by_model = speeds(found)
        names = [each["name"] for each in found["models"]]
        return dict(zip(("result", "base"), (by_model[name] for name in names), strict=False))


def _shared(judged: Judgement) -> Judgement:
    told = [judged]
    broadcast_object_list(told)
    return told[0]

"""What a run makes of its figures: held to the recipe's guards on the way and at the end, and the speed of what was written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from slimtune.bench.command import bench_model
from slimtune.bench.measure import Settings
from slimtune.bench.named import speeds
from slimtune.errors import UserError, out_of_memory
from slimtune.guard.judge import Judge
from slimtune.guard.ruling import Figures
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
        config: of the base.
        folder: where ``bench.json`` goes.
        stages: what stages.json holds; gains the references' validation figures.
        say: gets lines.

    Raises:
        UserError: a guard, the alarm or ``speed`` cannot be used.
    """

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, folder: RunFolder, stages: dict[str, Any], say: Say):
        self.recipe, self.folder, self.stages, self.say = recipe, folder, stages, say
        self.judge = Judge(recipe, say)
        if self.judge.wants_speed:
            _check_length(recipe, config)

    def check(self, taken: Collection[str], device: str) -> None:
        """Raise UserError where a guard names a figure that this run will not have: not of those ``taken`` of every model."""
        self.judge.check_names(taken, device == "cuda")

    def refer(self, word: str, measure: Callable[[], Figures]) -> None:
        """Take validation figures of a model that guards at steps are relative to, where there are such."""
        if word in self.missing:
            self.stages[_KEY] = {**self.stages.get(_KEY, {}), word: dict(measure())}

    @property
    def missing(self) -> list[str]:
        """Words of guards at steps whose validation figures are not known."""
        return [word for word in self.judge.needed if word not in self.stages.get(_KEY, {})]

    def start(self, base: Figures, dense_lora: Figures, again: Mapping[str, Callable[[], Any]]) -> None:
        """Before the method: what guards are relative to is known now.

        Args:
            base, dense_lora: test figures; of tasks on rank 0 alone.
            again: measures the model of a word once more, for guards that came with a resume.

        Raises:
            UserError: it is not, or a model has no figure that a guard is relative to.
        """
        if missing := self.missing:
            for word in missing:
                if word == "dense_lora" and not (self.folder / "checkpoint-dense_lora.pt").is_file():
                    raise UserError(
                        "guard: what is relative to dense_lora came with --resume, and checkpoint-dense_lora.pt is gone; leave "
                        "such guards to the end (alarm.begin=end), or start anew with --overwrite"
                    )
                again[word]()
            self.folder.write_json("stages.json", self.stages)
        self.judge.references = self.stages.get(_KEY, {})
        found = [self._unheld({"dense": base, "dense_lora": dense_lora}) if rank() == 0 else None]
        broadcast_object_list(found)
        if found[0]:
            raise found[0]

    def _unheld(self, references: Mapping[str, Figures]) -> UserError | None:
        judge = self.judge
        try:
            judge.check_references(references, judge.bounds, "test rows")
            judge.check_references(judge.references, judge.followed, "validation rows")
        except UserError as error:
            return error
        return None

    def at_step(self, figures: Figures, phase: str, step: int) -> Judgement:
        """As rank 0 finds it, which alone has the figures of tasks."""
        if not self.judge.followed:
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
        try:
            found = bench_model(self.folder.path, against=base, settings=settings, device=device, dtype=dtype)
        except Exception as error:  # the base may not fit beside the model, and all that was trained is not lost for that
            if not out_of_memory(error):
                raise
            self.say("[yellow]speed: not measured, for the two models do not fit in memory; smaller speed.batches may[/yellow]")
            return {}
        self.folder.write_json("bench.json", found)
        by_model = speeds(found)
        names = [each["name"] for each in found["models"]]
        return dict(zip(("result", "base"), (by_model[name] for name in names), strict=False))


def _check_length(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError where a prompt or a context is longer than the model was made for: found now, not at the end."""
    speed, limit = recipe.speed, getattr(config, "max_position_embeddings", None)
    longest = max(speed.prompt, speed.context + speed.steps)
    if limit and longest > limit:
        raise UserError(
            f"the model was made for {limit} positions, and speed.prompt={speed.prompt} or speed.context={speed.context} with "
            f"speed.steps={speed.steps} needs {longest}; give smaller ones"
        )


def _shared(judged: Judgement) -> Judgement:
    told = [judged]
    broadcast_object_list(told)
    return told[0]

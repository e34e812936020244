"""One tracker: how TensorBoard, trackio, Weights & Biases, MLflow and others are begun, gone on with, told and ended."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from slimtune.recipe import Recipe
from slimtune.runtime import locked

PROJECT = "slimtune"
"""Project or experiment, where the tracker's own environment variable names none."""

Scalar = bool | int | float | str


def config_of(recipe: Recipe) -> dict[str, Any]:
    """What trackers are told of a recipe: all of it but ``alarm``, which may hold addresses that are secrets."""
    raw: dict[str, Any] = recipe.model_dump(mode="json", exclude={"alarm"})
    return raw


def flat(value: Any, between: str = ".") -> dict[str, Scalar]:
    """``{section.key: value}``, with the place of a mapping in a list as a key; what is no scalar is JSON."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {"": value if isinstance(value, (bool, int, float, str)) else json.dumps(value, ensure_ascii=False)}
    return {
        f"{key}{between}{name}" if name else str(key): leaf
        for key, item in value.items()
        for name, leaf in flat(item, between).items()
    }


def figures_in(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, under names that every tracker takes."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in numbers.items()}


class Tracker:
    """One of accelerate's trackers, of which nothing more is known.

    Args:
        name: accelerate's name for it.
        out: the run's folder, whose name the tracker's run gets.
        earlier: ``id`` of the tracker's run that a resumed run goes on with; None: a new one.
    """

    remedy = ""
    """What a person may try where it does not start."""

    def __init__(self, name: str, out: Path, earlier: str | None = None):
        self.name, self.out, self.earlier = name, out, earlier
        self.inner: Any = None
        self.silent_until, self.told_of = -math.inf, False

    def start(self, recipe: Recipe) -> None:
        """Begin the tracker's run, or go on with it; a new one is told the recipe."""
        self.inner = self._made(recipe)
        self.inner.start()
        if self.earlier is None:
            self._configure(recipe)

    def _made(self, recipe: Recipe) -> Any:
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        return kind(PROJECT, str(self.out)) if kind.requires_logging_directory else kind(PROJECT)

    def _configure(self, recipe: Recipe) -> None:
        self.inner.store_init_configuration(flat(config_of(recipe)))

    @property
    def id(self) -> str:
        """By which a resumed run finds the tracker's run again; empty: it does not, and a new one begins."""
        return ""

    @property
    def _run_name(self) -> str:
        return self.out.resolve().name

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.inner.log(figures, step=step)

    def end(self, failed: bool) -> None:
        """Everything is on its way, and the tracker's run is over."""
        self.inner.finish()


class _TensorBoard(Tracker):
    """Event files in the run's folder: ``tensorboard``, or ``tensorboard-2`` where an earlier run left its own."""

    def _made(self, recipe: Recipe) -> Any:
        number, self.folder = 1, self.earlier or "tensorboard"
        while not self.earlier and (self.out / self.folder).exists():
            number += 1
            self.folder = f"tensorboard-{number}"
        return LOGGER_TYPE_TO_CLASS[self.name](self.folder, self.out)

    def _configure(self, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard.summary import hparams
        except ModuleNotFoundError:  # tensorboardX, which accelerate takes for it
            return super()._configure(recipe)
        # accelerate makes two folders for it, which TensorBoard shows as runs; and without its list of metrics (the first
        # of three parts) the page of hyperparameters has those that were logged
        _, begun, _ = hparams(flat(config_of(recipe)), {})
        self.inner.tracker.file_writer.add_summary(begun)
        self.inner.tracker.flush()

    @property
    def id(self) -> str:
        return self.folder


class _Trackio(Tracker):
    """Where ``TRACKIO_DIR``, ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` say; else in trackio's own folder."""

    def _made(self, recipe: Recipe) -> Any:
        resume = "allow" if self.earlier else "never"
        # each start writes the config anew, and accelerate's way to give it adds a key to it
        config = flat(config_of(recipe))
        return LOGGER_TYPE_TO_CLASS[self.name](PROJECT, name=self._run_name, config=config, resume=resume)

    def start(self, recipe: Recipe) -> None:
        super().start(recipe)
        if self.earlier:  # trackio goes on with the latest run of that name, which may be another's
            self.inner.tracker.id = self.earlier

    def _configure(self, recipe: Recipe) -> None:
        pass

    @property
    def id(self) -> str:
        return str(self.inner.tracker.id)

    def end(self, failed: bool) -> None:
        import trackio

        trackio.finish()  # accelerate's way leaves the run in its context, and it is finished once more when Python ends


class _WandB(Tracker):
    """In ``wandb`` in the run's folder and on the server; ``WANDB_PROJECT``, ``WANDB_NAME``, ``WANDB_DIR``... come first."""

    remedy = "run wandb login, or set WANDB_MODE=offline"

    def _made(self, recipe: Recipe) -> Any:
        ours = {"name": self._run_name, "dir": str(self.out)}
        ours |= {"run_id": self.earlier, "resume": "allow"} if self.earlier else {}
        given = {key: value for key, value in ours.items() if f"WANDB_{key.upper()}" not in os.environ}
        if "run_id" in given:
            given["id"] = given.pop("run_id")
        return LOGGER_TYPE_TO_CLASS[self.name](os.environ.get("WANDB_PROJECT", PROJECT), **given)

    def start(self, recipe: Recipe) -> None:
        super().start(recipe)
        # its own steps only go up: it would drop the run's figures after the reference's, and those after a resume
        self.inner.tracker.define_metric("step")
        self.inner.tracker.define_metric("*", step_metric="step")

    def _configure(self, recipe: Recipe) -> None:
        self.inner.store_init_configuration(config_of(recipe))

    @property
    def id(self) -> str:
        return str(self.inner.tracker.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.inner.log({**figures, "step": step})

    def end(self, failed: bool) -> None:
        self.inner.tracker.finish(exit_code=int(failed))


class _MLflow(Tracker):
    """Where ``MLFLOW_TRACKING_URI`` or a caller's ``set_tracking_uri`` says; else in ``mlflow.db`` beside the run's folder."""

    remedy = "look at MLFLOW_TRACKING_URI"
    db: Path | None = None

    def start(self, recipe: Recipe) -> None:
        import mlflow

        if mlflow.is_tracking_uri_set():
            return super().start(recipe)
        self.db = self.out.resolve().parent / "mlflow.db"
        mlflow.set_tracking_uri(f"sqlite:///{self.db}")
        with open(f"{self.db}.lock", "w") as alone:  # two that make its tables at the same time disturb each other
            locked(alone.fileno(), wait=True)
            super().start(recipe)

    def _made(self, recipe: Recipe) -> Any:
        given = {"logging_dir": str(self.db.with_name("mlflow-artifacts"))} if self.db else {}
        return LOGGER_TYPE_TO_CLASS[self.name](PROJECT, run_id=self.earlier, run_name=self._run_name, **given)

    @property
    def id(self) -> str:
        return str(self.inner.tracker.info.run_id)

    def end(self, failed: bool) -> None:
        import mlflow

        try:
            if getattr(self.inner, "active_run", None):  # where it did not start, the one that goes on is a caller's
                mlflow.end_run("FAILED" if failed else "FINISHED")
        finally:
            if self.db:  # the next run of this process may have another place
                mlflow.set_tracking_uri(None)


KINDS: dict[str, type[Tracker]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _WandB, "mlflow": _MLflow}

"""``slimtune evaluate``: a model by path or object, suites by name or file, one dictionary with everything that was found."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.errors import UserError, nearest
from slimtune.evaluate import folder, harness, protection
from slimtune.evaluate.intervals import DRAWS
from slimtune.evaluate.rows import Prepared, Unread, prepare, window_of
from slimtune.evaluate.shipped import built_in
from slimtune.evaluate.tasks import Split, Task, find_suites, find_task
from slimtune.models.load import load_config, load_tokenizer, locate, pretrained, straight_to
from slimtune.runtime import pick_device, pick_dtype, seed_everything
from slimtune.sections import ModelConfig
from slimtune.version import versions

_PACKAGES = ("slimtune", "lm_eval", "transformers", "torch", "datasets", "rouge_score", "tokenizers")
_GIVEN = "MODEL"
"""What messages call the model: the user gave an argument, and no key of a recipe."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How tasks are run; see ``slimtune evaluate --help``."""

    split: str = "test"
    limit: int | None = None
    max_length: int | None = None
    batch: int = 8
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("test", "valid"):
            raise UserError(f"--split {self.split!r} is not known; give test or valid")
        for name, least, what in (("limit", 1, "rows"), ("max_length", 8, "tokens"), ("batch", 1, "rows")):
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {value} is less than {least}; give a number of {what}" + _leave_out(name))
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype!r} is not known; give auto, float32 or bfloat16")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is not in 0 .. 2**32 - 1")


def _leave_out(name: str) -> str:
    return {"limit": ", or leave it out for all", "max_length": ", or leave it out for the model's window"}.get(name, "")


def evaluate_model(
    model_or_path: Any,
    suites: str | Sequence[str] = (),
    *,
    tasks: str | Sequence[str] = (),
    tokenizer: Any = None,
    data: Mapping[str, str] | None = None,
    write_tasks: str | Path | None = None,
    options: Options | None = None,
    say: Say = lambda _: None,
    see: harness.See = lambda what, done, total: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model on suites of tasks through lm-evaluation-harness.

    Args:
        model_or_path: a Hugging Face folder, hub id or ``builtin:`` name, pruned or not; or a model object.
        suites: names of suites, or their files.
        tasks: names of tasks, or their files, besides those of the suites.
        tokenizer: of a model object; by default that of the folder it was loaded from.
        data: ``{task: file}`` to read instead of the task's own data.
        write_tasks: also write the tasks to this folder, for plain ``lm_eval``.
        options: how; or by keyword: ``split``, ``limit`` (rows of a task), ``max_length`` (tokens of a
            prompt and its answer), ``batch``, ``device``, ``dtype``, ``seed``.
        say: gets a line as the work goes on.
        see: gets what is being done, how many requests are through, and of how many, as they come.

    Returns:
        ``model``, ``parameters``, ``suites``, ``tasks`` ({name: rows, source, sha256, figures, ...}), ``skipped`` ({name:
        reason} of tasks of a suite whose rows cannot be had), ``not_protected`` (of a run's model: the tasks whose rows its
        recipe did not keep from being learned; else None), ``versions``, and how it was run. A figure has ``value``,
        ``low``, ``high``, ``better`` (``higher`` or ``lower``) and, where there is one, ``majority`` (of ROUGE and functions of
        the user's: ``chance``).

    Raises:
        UserError: anything the user can mend.
    """
    started = time.perf_counter()
    options = options or Options(**settings)
    groups = _groups(suites, tasks, data or {})
    harness.check_installed()
    pick_device(options.device)
    seed_everything(options.seed)
    found, where = _found(model_or_path)
    config = found.config if isinstance(found, nn.Module) else load_config(found, _GIVEN)
    tokenizer = tokenizer or load_tokenizer(ModelConfig(path=where), _GIVEN)
    say("reading rows ...")  # before the weights, which may have to be fetched
    prepared, skipped = _prepared(groups, _named(tasks, data or {}), tokenizer, window := window_of(config), options, say)
    not_protected = protection.tell(where, prepared, min(window, options.max_length or window), say)
    model = _sound(found if isinstance(found, nn.Module) else _loaded(found, options), where)
    if write_tasks is not None:
        folder.write(Path(write_tasks), prepared, lm_eval_command(where, prepared, options, model))
    say(f"tasks: {len(prepared)}, rows: {sum(len(task.docs) for task in prepared):,}, on {model.device} ...")
    figures = harness.evaluate_tasks(model, tokenizer, prepared, batch=options.batch, seed=options.seed, see=see)
    return {
        "model": where,
        **_how(model, window, options),
        **_by_suite(groups, prepared, options.split, figures),
        "skipped": skipped,
        "not_protected": not_protected,
        "lm_eval": lm_eval_command(where, prepared, options, model),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _how(model: Any, window: int, options: Options) -> dict[str, Any]:
    """What was run, and how."""
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "window": window,
        "split": options.split,
        "limit": options.limit,
        "max_length": options.max_length,
        "batch": options.batch,
        "seed": options.seed,
        "decoding": "greedy, no examples in the prompt",
        "intervals": f"95%, bootstrap over rows, {DRAWS} draws; exact of an accuracy of 0 or 1",
        "versions": dict.fromkeys(_PACKAGES, "not installed") | versions(_PACKAGES),
    }


def _by_suite(
    groups: Mapping[str, Sequence[Task]], prepared: Sequence[Prepared], split: str, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured: the names by suite, and all there is to say of each task."""
    run = {task.name: task for task in prepared}
    suites = {group: [task.name for task in members if task.name in run] for group, members in groups.items()}
    of = {name: group for group, names in suites.items() for name in names}
    tasks = {name: _entry(task, of[name], split, figures.get(name, {})) for name, task in run.items()}
    return {"suites": {group: names for group, names in suites.items() if names}, "tasks": tasks}


def _entry(task: Prepared, group: str, split: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "suite": group,
        "metric": task.task.file.metric,
        **({"metric_sha256": task.scorer.sha256} if task.scorer else {}),
        "rows": len(task.docs),
        "split": split if task.task.data is None else "given",  # a file is read as it is, whatever was asked for
        "rows_empty": task.empty,
        "prompts_cut": task.cut,
        "source": task.source,
        "sha256": task.sha256,
        "figures": {name: {**figures[name], "better": way} for name, way in folder.directions(task).items() if name in figures},
    }


def _groups(suites: str | Sequence[str], tasks: str | Sequence[str], data: Mapping[str, str]) -> dict[str, list[Task]]:
    """Tasks by suite, each task once; those that were named themselves come first."""
    named = [find_task(name) for name in _names(tasks)]
    groups = {"tasks": named} if named else {}
    groups |= find_suites(_names(suites))
    if not groups:
        raise UserError(
            f"nothing to evaluate: give a suite ({', '.join(built_in('suites'))}) or tasks ({', '.join(built_in('tasks'))})"
        )
    seen: dict[str, Task] = {}
    for members in groups.values():
        for task in members:
            other = seen.setdefault(task.name, task)
            if (other.folder, other.file) != (task.folder, task.file):
                raise UserError(f"two tasks are called {task.name!r} (in {other.folder} and {task.folder}); rename one file")
    for name in data:
        if name not in seen:
            raise UserError(f"--data names the task {name!r}, which is not run.{nearest(name, seen)} Tasks: {', '.join(seen)}")
    return _each_once(groups, data)


def _each_once(groups: Mapping[str, Sequence[Task]], data: Mapping[str, str]) -> dict[str, list[Task]]:
    seen: set[str] = set()
    found: dict[str, list[Task]] = {}
    for group, members in groups.items():
        fresh = [task for task in members if not (task.name in seen or seen.add(task.name))]  # type: ignore[func-returns-value]
        if fresh:
            found[group] = [task.reading(data.get(task.name)) for task in fresh]
    return found


def _names(value: str | Sequence[str]) -> list[str]:
    items = [value] if isinstance(value, str) else list(value)
    return [name.strip() for item in items for name in item.split(",") if name.strip()]


def _named(tasks: str | Sequence[str], data: Mapping[str, str]) -> set[str]:
    """Tasks that were asked for by name, or whose file was given."""
    return {*(Path(name).stem for name in _names(tasks)), *data}


def _prepared(
    groups: Mapping[str, Sequence[Task]], named: set[str], tokenizer: Any, window: int, options: Options, say: Say
) -> tuple[list[Prepared], dict[str, str]]:
    """The tasks that can be run, and why others cannot: a suite is worth running without some, but what was named is wanted."""
    split: Split = "valid" if options.split == "valid" else "test"
    found: list[Prepared] = []
    skipped: dict[str, str] = {}
    for task in (task for tasks in groups.values() for task in tasks):
        try:
            found.append(prepare(task, split, tokenizer, window, options.limit, options.max_length))
        except Unread as error:
            if task.name in named:
                raise
            skipped[task.name] = error.reason
    if not found:
        name, reason = next(iter(skipped.items()))
        others = f"; nor can those of {', '.join(list(skipped)[1:])}" if len(skipped) > 1 else ""
        raise UserError(f"nothing is left to evaluate: task {name!r}: {reason}{others}")
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    return found, skipped


def _found(model: Any) -> tuple[nn.Module | ModelConfig, str]:
    """A model object, or where to load it from; and what to call it."""
    if isinstance(model, nn.Module):
        return model, str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    location, local = locate(str(model), _GIVEN)
    where = str(Path(location).resolve()) if local else location
    return ModelConfig(path=where), where


def _loaded(config: ModelConfig, options: Options) -> nn.Module:
    device = pick_device(options.device)
    model: nn.Module = pretrained(config, {"dtype": pick_dtype(options.dtype, device), **straight_to(device)}, _GIVEN)
    return model.to(torch.device(device)).eval()


@torch.no_grad()
def _sound(model: Any, where: str) -> Any:
    """The model. Raises UserError where its answers would be no numbers: the harness makes figures of them all the same."""
    if model(torch.zeros((1, 1), dtype=torch.long, device=model.device)).logits.isnan().any():
        raise UserError(
            f"{_GIVEN}={where!r} computes no numbers (nan): its weights are damaged or overflow; try --dtype float32"
        )
    return model


def lm_eval_command(model: str, tasks: Sequence[Prepared], options: Options, loaded: Any) -> str:
    """The command by which plain lm-evaluation-harness gives the same figures from a folder of written tasks."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    args = f"pretrained={model},trust_remote_code=True,dtype={dtype},softmax_dtype=float32"
    names = ",".join(folder.PREFIX + task.name for task in tasks)
    return (
        f"lm_eval run --model hf --model_args {shlex.quote(args)} --include_path . --tasks {names} "
        f"--batch_size {options.batch} --device {loaded.device}"
    )

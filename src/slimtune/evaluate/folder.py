"""Prepared tasks as a folder that lm-evaluation-harness runs: a YAML and a jsonl for each.

One that is to be moved also has metrics.py, functions of the user's and a README, and plain ``lm_eval`` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.evaluate import metrics, scoring
from slimtune.evaluate.rows import Prepared
from slimtune.train.task_figures import Better, better

PREFIX = "slimtune_"
"""Before the names of tasks in the harness, where other tasks have the same."""
_METRICS = {
    "choice": {"accuracy": "mean", "macro_f1": "macro_f1"},
    "rouge": dict.fromkeys(metrics.ROUGE, "mean"),
    "perplexity": {"perplexity": "token_perplexity", "bits_per_byte": "bits_per_byte"},
}
_OUTPUT = {"choice": "multiple_choice", "perplexity": "loglikelihood"}
_WRITES = "generate_until"
_TARGET = {"choice": "label", "perplexity": "text"}


class _Function(str):
    """The name of a function and its module."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """Writes the tag that the harness resolves."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def figures_of(task: Prepared) -> dict[str, str]:
    """The figures of a task, each with its aggregation: ``mean``, or a function of metrics.py."""
    return dict.fromkeys(task.scorer.figures, "mean") if task.scorer else _METRICS[task.task.file.kind]


def directions(task: Prepared) -> dict[str, Better]:
    """The figures of a task, each with which way it is the better."""
    return {name: better(name, task.scorer.lower if task.scorer else ()) for name in figures_of(task)}


def write(folder: Path, tasks: Sequence[Prepared], command: str = "") -> None:
    """Write the folder.

    Args:
        command: how plain ``lm_eval`` runs it, for its README; the folder then holds no path and may be moved. Without it
            the folder is for this process, whose own functions take the figures.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--write-tasks {str(folder)!r} is not empty; give a new folder")
        for task in tasks:
            how = _moved(folder, task) if command else _here(folder, task)
            text = yaml.dump(_config(task, *how), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
            (folder / f"{PREFIX}{task.name}.yaml").write_text(text, encoding="utf-8")
            lines = "".join(json.dumps(doc) + "\n" for doc in task.docs)
            (folder / f"{task.name}.jsonl").write_text(lines, encoding="utf-8")
        if command:
            (folder / "metrics.py").write_text(Path(metrics.__file__).read_text(encoding="utf-8"), encoding="utf-8")
            (folder / "README.md").write_text(_readme(tasks, command), encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            for half in folder.iterdir():  # it was empty, and is to be so again
                half.unlink()
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}); choose another folder") from error


def _here(folder: Path, task: Prepared) -> tuple[str, dict[str, Any]]:
    """The module of the functions, and what the one that reads the rows needs to know."""
    return metrics.__name__, {"file": str(folder.resolve() / f"{task.name}.jsonl"), **_scoring(task)}


def _moved(folder: Path, task: Prepared) -> tuple[str, dict[str, Any]]:
    """The same of a folder that holds all by itself. The user's file goes with it, under a name that no other task's has."""
    source, _, name = task.task.function.rpartition(":")
    function = ""
    if source.endswith(".py"):
        copy = f"{PREFIX}{task.name}.py"
        (folder / copy).write_bytes(Path(source).read_bytes())
        function = f"{copy}:{name}"
    return "metrics", {"file": f"{task.name}.jsonl", **_scoring(task, function)}


def _scoring(task: Prepared, function: str = "") -> dict[str, Any]:
    return {"scoring": scoring.settings(task.task, task.scorer.figures, function)} if task.scorer else {}


def _config(task: Prepared, code: str, reading: dict[str, Any]) -> dict[str, Any]:
    kind, ways = task.task.file.kind, directions(task)
    config: dict[str, Any] = {
        "task": PREFIX + task.name,
        "custom_dataset": _Function(f"{code}.rows"),
        "dataset_kwargs": reading,
        "output_type": _OUTPUT.get(kind, _WRITES),
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": _TARGET.get(kind, "completion"),
        "target_delimiter": "",
        "num_fewshot": 0,
        "process_results": _Function(f"{code}.{kind}"),
        "metric_list": [
            {
                "metric": name,
                "aggregation": aggregation if aggregation == "mean" else _Function(f"{code}.{aggregation}"),
                "higher_is_better": ways[name] == "higher",
            }
            for name, aggregation in figures_of(task).items()
        ],
        "metadata": {"version": 1.0},
    }
    if kind == "choice":
        config["doc_to_choice"] = "choices"
    if kind not in _OUTPUT:
        config["generation_kwargs"] = {"until": list(task.task.file.until), "do_sample": False, "max_gen_toks": task.tokens}
    return config


def _readme(tasks: Sequence[Prepared], command: str) -> str:
    modules = dict.fromkeys(where for task in tasks if (where := task.task.function.rpartition(":")[0]) and where[-3:] != ".py")
    needed = f" and the modules that have functions of tasks ({', '.join(modules)})" if modules else ""
    table = "\n".join(f"| {PREFIX}{task.name} | {len(task.docs)} | {task.task.about} |" for task in tasks)
    return (
        "# Tasks for lm-evaluation-harness\n\nWritten by `slimtune evaluate --write-tasks`. Run in this folder, with "
        "`pip install 'lm-eval[hf]' rouge-score`" + needed + ":\n\n"
        f"```sh\n{command}\n```\n\n"
        "Rows are fitted to one model: token counts are of its tokenizer, prompts longer than its window are cut from the "
        "left. Another tokenizer or window needs a folder of its own.\n\n"
        f"| task | rows | |\n| --- | --- | --- |\n{table}\n"
    )

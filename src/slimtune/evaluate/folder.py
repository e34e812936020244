"""Prepared tasks as a folder that plain lm-evaluation-harness runs: a YAML and a jsonl for each, metrics.py, a README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.evaluate import metrics
from slimtune.evaluate.rows import Prepared

PREFIX = "slimtune_"
"""Before the names of tasks in the harness, where other tasks have the same."""
METRICS = {
    "choice": {"accuracy": "mean", "macro_f1": "macro_f1"},
    "rouge": dict.fromkeys(metrics.ROUGE, "mean"),
    "perplexity": {"perplexity": "token_perplexity", "bits_per_byte": "bits_per_byte"},
}
"""Metrics of a kind of task, each with its aggregation: ``mean``, or a function of metrics.py."""
_OUTPUT = {"choice": "multiple_choice", "rouge": "generate_until", "perplexity": "loglikelihood"}
_TARGET = {"choice": "label", "rouge": "completion", "perplexity": "text"}


class _Function(str):
    """The name of a function of metrics.py."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """Writes the tag that the harness resolves."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", f"metrics.{name}"))


def write(folder: Path, tasks: Sequence[Prepared], command: str = "") -> None:
    """Write the folder; it holds no path and may be moved.

    Args:
        command: how to run it, for its README.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--write-tasks {str(folder)!r} is not empty; give a new folder")
        (folder / "metrics.py").write_text(Path(metrics.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        for task in tasks:
            text = yaml.dump(_config(task), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
            (folder / f"{PREFIX}{task.name}.yaml").write_text(text, encoding="utf-8")
            lines = "".join(json.dumps(doc) + "\n" for doc in task.docs)
            (folder / f"{task.name}.jsonl").write_text(lines, encoding="utf-8")
        if command:
            (folder / "README.md").write_text(_readme(tasks, command), encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            for half in folder.iterdir():  # it was empty, and is to be so again
                half.unlink()
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}); choose another folder") from error


def _config(task: Prepared) -> dict[str, Any]:
    kind = task.task.file.metric
    config: dict[str, Any] = {
        "task": PREFIX + task.name,
        "custom_dataset": _Function("rows"),
        "dataset_kwargs": {"file": f"{task.name}.jsonl"},
        "output_type": _OUTPUT[kind],
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": _TARGET[kind],
        "target_delimiter": "",
        "num_fewshot": 0,
        "process_results": _Function(kind),
        "metric_list": [
            {
                "metric": name,
                "aggregation": aggregation if aggregation == "mean" else _Function(aggregation),
                "higher_is_better": kind != "perplexity",
            }
            for name, aggregation in METRICS[kind].items()
        ],
        "metadata": {"version": 1.0},
    }
    if kind == "choice":
        config["doc_to_choice"] = "choices"
    if kind == "rouge":
        config["generation_kwargs"] = {"until": list(task.task.file.until), "do_sample": False, "max_gen_toks": task.tokens}
    return config


def _readme(tasks: Sequence[Prepared], command: str) -> str:
    table = "\n".join(f"| {PREFIX}{task.name} | {len(task.docs)} | {task.task.about} |" for task in tasks)
    return (
        "# Tasks for lm-evaluation-harness\n\nWritten by `slimtune evaluate --write-tasks`. Run in this folder, with "
        "`pip install 'lm-eval[hf]' rouge-score`:\n\n"
        f"```sh\n{command}\n```\n\n"
        "Rows are fitted to one model: token counts are of its tokenizer, prompts longer than its window are cut from the "
        "left. Another tokenizer or window needs a folder of its own.\n\n"
        f"| task | rows | |\n| --- | --- | --- |\n{table}\n"
    )

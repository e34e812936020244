"""The command line: what it answers, what it passes on, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import distributed
from typer.testing import CliRunner

import slimtune
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.recipe import Recipe
from slimtune.runtime import leave_group
from slimtune.structure.families import FAMILIES, REFUSED
from slimtune.train.judgement import Breach

run = CliRunner().invoke
TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("RANK", "SLIMTUNE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"device": "cpu", "model": {"init": "config", "config": TINY}, "budget": {"tolerance": 0.01}})
    )
    return str(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Stands in for the pipeline; an exception put first in the list is raised by the next call."""
    seen: list[Any] = []

    def tune(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
        if seen and isinstance(seen[0], BaseException):
            raise seen[0]
        seen.append((recipe, resume, overwrite))
        return {}

    module = ModuleType("slimtune.pipeline")
    module.tune = tune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slimtune.pipeline", module)
    monkeypatch.setattr(slimtune, "pipeline", module, raising=False)
    return seen


def test_tune_passes_recipe_overrides_and_flags_on(file: str, calls: list[Any]) -> None:
    result = run(app, ["tune", file, "budget.keep=0.5", "--resume", "out=runs/x"])
    assert result.exit_code == 0, result.output
    recipe, resume, overwrite = calls[0]
    assert (recipe.budget.keep, recipe.out, resume, overwrite) == (0.5, "runs/x", True, False)
    assert run(app, ["tune", file, "--overwrite"]).exit_code == 0
    assert calls[1][1:] == (False, True)


def test_a_user_error_is_one_line_on_stderr(file: str, calls: list[Any]) -> None:
    calls.append(UserError("data.train=[] has\n  no rows; give some"))
    result = run(app, ["tune", file])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: data.train=[] has no rows; give some\n"


def test_debug_shows_the_traceback(file: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls.append(UserError("no rows"))
    monkeypatch.setenv("SLIMTUNE_DEBUG", "1")
    assert isinstance(run(app, ["tune", file]).exception, UserError)


def test_a_bug_is_not_hidden(file: str, calls: list[Any]) -> None:
    calls.append(RuntimeError("a bug"))
    assert isinstance(run(app, ["tune", file]).exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "text"),
    [(torch.OutOfMemoryError, "CUDA out of memory. Tried 1 GiB."), (RuntimeError, "CUDA error: out of memory")],
)
def test_a_full_gpu_is_one_line_with_what_to_do(file: str, calls: list[Any], error: type[Exception], text: str) -> None:
    calls.append(error(f"{text}\nFor debugging ..."))
    result = run(app, ["tune", file])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the GPU is out of memory; work in smaller parts (tune: train.micro_batch, ")
    assert result.stderr.endswith(f"({text})\n")
    calls[:] = [RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
    assert run(app, ["tune", file]).stderr.startswith("error: memory is full; work in smaller parts (")
    calls[:] = [RuntimeError("CUDA error: an illegal memory access")]
    assert isinstance(run(app, ["tune", file]).exception, RuntimeError)


@pytest.mark.parametrize(("given", "code"), [([], 0), ([Breach("guard: ppl")], 1)])
def test_a_run_parts_from_the_other_processes_at_its_end(file: str, calls: list[Any], given: list[Any], code: int) -> None:
    calls[:] = given
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert run(app, ["tune", file]).exit_code == code
        assert not distributed.is_initialized()
    finally:
        leave_group()


def test_an_interrupt_says_how_to_go_on(file: str, calls: list[Any]) -> None:
    calls.append(KeyboardInterrupt())
    result = run(app, ["tune", file])
    assert (result.exit_code, result.stderr) == (130, "interrupted; continue with --resume\n")


def test_only_a_run_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    import slimtune.evaluate.command

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slimtune.evaluate.command, "evaluate_model", interrupted)
    result = run(app, ["evaluate", "builtin:base-10m", "--suite", "legal"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_comparison_or_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("recipe: r.yaml\nmethods: {atp: {}}\n")
    for path, why in (
        (tmp_path / "c.yaml", "is a comparison, for slimtune compare; its recipe is 'r.yaml'"),
        (tmp_path, "is a folder"),
    ):
        result = run(app, ["tune", str(path)])
        assert result.exit_code == 2
        assert why in result.stderr


def test_errors_of_other_ranks_name_themselves(file: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls.append(UserError("no rows"))
    monkeypatch.setenv("RANK", "3")
    assert run(app, ["tune", file]).stderr == "[rank 3] error: no rows\n"
    calls[:] = [Breach("guard: ppl")]  # to which all come: the first one's word is enough
    assert run(app, ["tune", file]).stderr == ""


def test_estimate_prints_tables_or_json_and_needs_no_data(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(app, ["estimate", file, "data.train=nowhere.jsonl"])
    assert result.exit_code == 0, result.output
    assert "What can be cut: llama" in result.stdout
    parsed = json.loads(run(app, ["estimate", file, "--json"]).stdout)
    assert parsed["units"] == [["0-1", {"kv_group": 2, "ffn": 96}]]
    monkeypatch.setenv("RANK", "1")
    assert run(app, ["estimate", file]).stdout == ""


def test_estimate_plans_for_processes_that_are_not_there(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # which the command changes
    shown = run(app, ["estimate", file, "--processes", "2"])
    assert "of one of 2 processes" in shown.stdout
    refused = run(app, ["estimate", file, "--processes", "0"])
    assert refused.exit_code == 2


def test_estimate_fails_after_the_tables_when_the_budget_cannot_be_met(file: str) -> None:
    result = run(app, ["estimate", file, "budget.keep=0.01"])
    assert result.exit_code == 2
    assert "smallest possible" in result.stdout
    assert "error: budget.keep=0.01 of total cannot be met" in result.stderr


def test_families_lists_every_row_of_the_table() -> None:
    out = run(app, ["families"]).stdout
    for name in (*FAMILIES, *REFUSED):
        assert name in out
    assert "KV groups (dense), MLP channels (fc2)" in out


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        (TINY, 0, "supported (llama, 2 layers"),
        ({"model_type": "mixtral"}, 2, "'mixtral' is refused: its MLP is already"),
        ({"model_type": "lama"}, 2, "'lama' is unknown. Did you mean 'llama'?"),
        ({**TINY, "quantization_config": {"quant_method": "gptq"}}, 2, "quantised weights cannot be cut"),
        ([], 2, "is unknown"),
        (None, 2, "has no config.json; give a Hugging Face model folder"),
    ],
)
def test_families_says_whether_a_folder_is_supported(tmp_path: Path, config: Any, code: int, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(app, ["families", str(tmp_path)])
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_recipe_lists_every_key_with_its_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run(app, ["recipe"]).stdout
    for section, values in Recipe().model_dump().items():
        keys = [f"{section}.{key}" for key in values] if isinstance(values, dict) and values else [section]
        for key in keys:
            assert key in out
    budget = run(app, ["recipe", "budget"]).stdout
    row = next(line for line in budget.splitlines() if "budget.keep" in line)
    assert " ".join(row.split()) == "budget.keep float > 0, <= 1 0.6 Part of the parameters to keep."
    assert "per-layer | uniform" in budget
    assert "search" not in budget
    assert " ".join(line for line in out.splitlines() if "speed.batches" in line).split()[-4] == "[1]"
    general = run(app, ["recipe", "guard"]).stdout  # a key that is in no section
    assert "Bounds on figures" in general
    assert "budget.keep" not in general


def test_on_a_narrow_terminal_no_key_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """There type and default stand below it."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.split("  ") for line in run(app, ["recipe"]).stdout.splitlines()]
    shown = {" ".join(part.split()) for line in lines for part in line if part.strip()}
    for section, values in Recipe().model_dump().items():
        assert {f"{section}.{key}" for key in values} <= shown if isinstance(values, dict) and values else section in shown
    assert {"moe.final_temperature", "default: 0.2", "float > 0"} <= shown


def test_every_key_of_a_recipe_is_documented() -> None:
    for section in [Recipe, *(field.annotation for field in Recipe.model_fields.values())]:
        for name, field in getattr(section, "model_fields", {}).items():
            if not hasattr(field.annotation, "model_fields"):
                assert field.description, f"{section}.{name} has no docstring"


def test_an_unknown_section_names_the_nearest() -> None:
    result = run(app, ["recipe", "bugdet"])
    assert result.exit_code == 2
    assert "Did you mean 'budget'?" in result.stderr


def test_version() -> None:
    assert run(app, ["--version"]).stdout == f"{slimtune.__version__}\n"


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--version", 0), ("tune --help", 0), ("tuen", 2)])
def test_an_answer_without_work_imports_nothing_heavy(word: str, code: int) -> None:
    """In a fresh process, because this one has torch already. Start-up is these imports; seconds depend on the machine."""
    heavy = ["torch", "transformers", "peft", "numpy", "datasets", "yaml", "slimtune.recipe", "rich"]
    heavy += ["pydantic", "importlib.metadata"] if word.startswith("--") else []  # typer reads what it is given by it
    script = (
        f"import sys\nfrom slimtune.cli import main\nsys.argv = ['slimtune', *{word.split()!r}]\n"
        f"try: main()\nexcept SystemExit as stop: assert (stop.code or 0) == {code}, stop.code\n"
        f"print('HEAVY', [name for name in {heavy} if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # found without an installation, too
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told = {"--help": "tune", "tune --help": "--resume", "--version": slimtune.__version__, "tuen": "Did you mean 'tune'?"}
    assert told[word] in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"

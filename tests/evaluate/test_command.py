"""``slimtune evaluate`` as a whole, beside plain lm_eval in a process of its own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import slimtune
from bases import make_tokenizer, sentences, write_base, write_rows
from cuts import UNEVEN, cut_model
from experts import converted, written
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export.huggingface import save
from slimtune.methods.masked import routed
from warm import Warm

run = CliRunner().invoke

# lm_eval's command, but for the index of the 14,000 files of its own tasks, which takes longer than all the rest.
PLAIN_LM_EVAL = """
import gc
gc.disable()  # a process that ends soon
import functools, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of each kind on rows of its own, and a suite of them."""
    folder = tmp_path_factory.mktemp("suite")
    texts = sentences(18)
    choices = [" at home", " in the garden"]
    rows = [{"prompt": f"{text} Where?", "completion": choices[0], "choices": choices, "label": 0} for text in texts]
    for number, row in enumerate(rows):
        row |= {"label": number % 3 % 2, "completion": choices[number % 3 % 2]}
    write_rows(folder / "pick-test.jsonl", rows)
    write_rows(folder / "pick-valid.jsonl", rows[:5])
    write_rows(folder / "sum-test.jsonl", [{"prompt": f"{text} In short:", "completion": f" {text[:12]}"} for text in texts])
    write_rows(folder / "read-test.jsonl", [{"text": text * 3} for text in texts])
    for name, metric in (("pick", "choice"), ("sum", "rouge"), ("read", "perplexity")):
        (folder / f"{name}.yaml").write_text(f"metric: {metric}\nsources: [{{path: '{name}-{{split}}.jsonl'}}]\ntokens: 8\n")
    (folder / "mine.yaml").write_text("tasks: [pick.yaml, sum.yaml, read.yaml]\n")
    return str(folder / "mine.yaml")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other widths in every layer, as a run exports it."""
    model, plan = cut_model("llama", UNEVEN, vocab_size=320, max_position_embeddings=128, eos_token_id=0, pad_token_id=1)
    folder = save(model, None, plan, tmp_path_factory.mktemp("pruned") / "model", None, {})
    make_tokenizer().save_pretrained(folder)
    return folder


def test_plain_lm_eval_gives_the_same_figures(
    suite: str, pruned: Path, warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a per-layer export, from the written folder after it was moved, and no data set is cached by either."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["evaluate", str(pruned), "-s", suite, "--json", str(tmp_path / "out.json"), "--write-tasks", str(tmp_path / "a")]
    result = run(app, [*command, "--limit", "12"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert sorted(path.suffix for path in (tmp_path / "b").iterdir()) == [".jsonl"] * 3 + [".md", ".py"] + [".yaml"] * 3
    written = next(line for line in (tmp_path / "b" / "README.md").read_text().splitlines() if line.startswith("lm_eval run"))
    assert written == found["lm_eval"]
    (tmp_path / "plain.py").write_text(PLAIN_LM_EVAL)
    plain = [sys.executable, "-P", str(tmp_path / "plain.py"), *shlex.split(written)[1:]]
    process = warm.run([*plain, "--output_path", str(tmp_path / "plain")], cwd=tmp_path / "b")
    assert process.returncode == 0, process.stderr[-2000:]
    (file,) = (tmp_path / "plain").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    compared = 0
    for name, task in found["tasks"].items():
        for metric, figure in task["figures"].items():
            assert theirs[f"slimtune_{name}"][f"{metric},none"] == pytest.approx(figure["value"], abs=1e-3, rel=1e-4)
            compared += 1
    assert compared == 2 + 3 + 2
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_everything_stands_in_the_json(suite: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    result = run(app, ["evaluate", str(base), "--suite", suite, "--json", "-", "--limit", "6", "--batch", "3"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["seed"], found["limit"], found["split"], found["window"]) == (0, 6, "test", 128)
    assert found["parameters"] > 0
    assert set(found["versions"]) >= {"lm_eval", "transformers", "torch"}
    task = found["tasks"]["pick"]
    assert (task["suite"], task["rows"], len(task["sha256"])) == ("mine", 6, 64)
    assert set(task["figures"]["accuracy"]) == {"value", "low", "high", "majority", "better"}
    again = slimtune.evaluate_model(str(base), suite, limit=6, batch=2)
    for name, entry in found["tasks"].items():
        assert again["tasks"][name]["sha256"] == entry["sha256"]
        for metric, figure in entry["figures"].items():
            same = again["tasks"][name]["figures"][metric]
            assert same.pop("better") == figure.pop("better") == ("lower" if name == "read" else "higher")
            assert {key: value or 0.0 for key, value in same.items()} == pytest.approx(  # rows all alike have no interval
                {key: value or 0.0 for key, value in figure.items()}, rel=1e-4
            )


def test_an_object_its_valid_rows_and_data_of_the_users_own(suite: str, tmp_path: Path) -> None:
    model, _ = cut_model("llama", None, vocab_size=320, max_position_embeddings=128)
    pick = str(Path(suite).parent / "pick.yaml")
    found = slimtune.evaluate_model(model, tasks=pick, tokenizer=make_tokenizer(), split="valid")
    assert found["suites"] == {"tasks": ["pick"]}
    assert found["tasks"]["pick"]["rows"] == 5
    assert found["tasks"]["pick"]["split"] == "valid"
    other = shutil.copy(Path(suite).parent / "pick-test.jsonl", tmp_path / "other.jsonl")
    found = slimtune.evaluate_model(model, tasks=pick, tokenizer=make_tokenizer(), data={"pick": str(other)}, split="valid")
    assert found["tasks"]["pick"]["split"] == "given"  # a file has no splits
    assert found["tasks"]["pick"]["source"] == str(other)


def test_figures_of_written_experts_are_those_of_the_gated_model(suite: str, tmp_path: Path) -> None:
    keys = {"vocab_size": 320, "max_position_embeddings": 128, "eos_token_id": 0, "pad_token_id": 1}
    model, structure, plan, router = converted("llama", 2, 2, config=keys)
    plain = slimtune.evaluate_model(model, suite, tokenizer=make_tokenizer(), limit=6)
    with routed(model, structure, plan, router):
        gated = slimtune.evaluate_model(model, suite, tokenizer=make_tokenizer(), limit=6)
    written(model, structure, plan, router, tmp_path / "model", torch.float32)
    make_tokenizer().save_pretrained(tmp_path / "model")
    found = slimtune.evaluate_model(str(tmp_path / "model"), suite, limit=6)
    values = [[task["figures"] for task in each["tasks"].values()] for each in (plain, gated, found)]
    read = [{key: figure["value"] for figures in each for key, figure in figures.items()} for each in values]
    assert read[2] == pytest.approx(read[1], rel=1e-4)
    assert read[2] != pytest.approx(read[0], rel=1e-4), "the dense model has the same"


def test_rows_without_an_answer_are_counted(suite: str, tmp_path: Path) -> None:
    model, _ = cut_model("llama", None, vocab_size=320, max_position_embeddings=128)
    rows = [{"prompt": "In short:", "completion": " home"}] * 2 + [{"prompt": "In short:", "completion": " "}] * 3
    data = {"sum": write_rows(tmp_path / "some.jsonl", rows)}
    found = slimtune.evaluate_model(model, suite, tokenizer=make_tokenizer(), data=data, limit=2)["tasks"]
    assert (found["sum"]["rows"], found["sum"]["rows_empty"]) == (2, 3)
    assert [task["rows_empty"] for name, task in found.items() if name != "sum"] == [0, 0]


def test_a_file_for_json_that_cannot_be_written_in_the_end_loses_nothing(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    base = write_base(tmp_path / "base")
    monkeypatch.setattr("slimtune.text_file.write_atomically", full)
    result = run(app, ["evaluate", str(base), "--suite", suite, "--limit", "2", "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "cannot be written (No space left on device); it was printed instead" in result.stderr
    assert json.loads(result.stdout[result.stdout.index("\n{") :])["tasks"]["pick"]["rows"] == 2


def test_tasks_that_cannot_be_written_leave_the_folder_empty(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtune.evaluate import folder

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    base = write_base(tmp_path / "base")
    monkeypatch.setattr(folder, "_readme", full)
    with pytest.raises(UserError, match=r"tasks' cannot be written \(No space left on device\)"):
        slimtune.evaluate_model(str(base), suite, limit=2, write_tasks=tmp_path / "tasks")
    assert list((tmp_path / "tasks").iterdir()) == []


def test_a_model_that_computes_no_numbers_is_an_error(suite: str) -> None:
    model, _ = cut_model("llama", None, vocab_size=320, max_position_embeddings=128)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"computes no numbers \(nan\)"):
        slimtune.evaluate_model(model, suite, tokenizer=make_tokenizer(), limit=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"nothing to evaluate: give a suite (general, healthcare, legal)"),
        (["--suite", "helthcare"], "Did you mean 'healthcare'?"),
        (["--tasks", "rqe,medmcq"], "task 'medmcq' is unknown. Did you mean 'medmcqa'?"),
        (["--suite", "legal", "--limit", "0"], "--limit 0 is less than 1"),
        (["--suite", "legal", "--max-length", "0"], "--max-length 0 is less than 8; give a number of tokens, or leave it out"),
        (["--suite", "legal", "--batch", "-1"], "--batch -1 is less than 1"),
        (["--suite", "legal", "--split", "train"], "--split 'train' is not known; give test or valid"),
        (["--suite", "legal", "--dtype", "float8"], "--dtype 'float8' is not known"),
        (["--suite", "legal", "--device", "tpu"], "device='tpu' is not supported"),
        (["--suite", "legal", "--data", "rqe=x.jsonl"], "--data names the task 'rqe', which is not run"),
        (["--suite", "legal", "--data", "rqe"], "is not of the form TASK=FILE"),
        (["--suite", "legal", "--json", "/nowhere/x.json"], "--json '/nowhere/x.json': there is no folder '/nowhere'; make it"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    result = run(app, ["evaluate", "builtin:base-10m", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_models_and_folders_that_cannot_be_used(suite: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MODEL='.*' has no config.json"):
        slimtune.evaluate_model(tmp_path, suite)
    with pytest.raises(UserError, match=r"MODEL='.*/none' does not exist"):
        slimtune.evaluate_model(tmp_path / "none", suite)
    with pytest.raises(UserError, match=r"^MODEL='nosuch/dir-x' cannot be loaded .*; check the id and the network"):
        slimtune.evaluate_model("nosuch/dir-x", suite)
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError, match=r"base' is not empty; give a new folder"):
        slimtune.evaluate_model(base, suite, write_tasks=base)
    with pytest.raises(UserError, match=r"^MODEL='.*config.json' is a file; give the folder"):
        slimtune.evaluate_model(base / "config.json", suite)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^MODEL='.*base' cannot be loaded .*model.safetensors"):
        slimtune.evaluate_model(base, suite)
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"^MODEL='.*base' has no tokenizer files; copy"):
        slimtune.evaluate_model(base, suite)
    (base / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"^MODEL='.*base' cannot be loaded"):
        slimtune.evaluate_model(base, suite)
    (tmp_path / "pick.yaml").write_text("metric: choice\nsources: [{path: x}]")
    with pytest.raises(UserError, match="two tasks are called 'pick'"):
        slimtune.evaluate_model(base, suite, tasks=str(tmp_path / "pick.yaml"))


def test_a_task_of_a_suite_without_data_is_skipped_and_told(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that was named itself, or whose file was given, is not; nor is a suite of which nothing is left."""
    monkeypatch.delenv("SLIMTUNE_DATA", raising=False)
    model, _ = cut_model("llama", None, vocab_size=320, max_position_embeddings=128)
    more = tmp_path / "more.yaml"
    more.write_text(f"tasks: [rqe, {Path(suite).parent / 'pick.yaml'}]\nsuites: [general]")
    (tmp_path / "none.yaml").write_text("tasks: [rqe, meqsum]")
    lines: list[str] = []

    def measure(**asked: Any) -> dict[str, Any]:
        return slimtune.evaluate_model(model, tokenizer=make_tokenizer(), say=lines.append, limit=2, **asked)

    found = measure(suites=str(more))
    assert found["suites"] == {"more": ["pick"]}
    assert list(found["tasks"]) == ["pick"]
    assert list(found["skipped"]) == ["rqe", "wikitext2", "general_docs"]
    told = "its test rows cannot be read: SLIMTUNE_DATA is not set. Remedy: set SLIMTUNE_DATA .* --data rqe=FILE"
    assert re.match(told, found["skipped"]["rqe"])
    assert [line for line in lines if "rqe" in line] == [f"skipped rqe: {found['skipped']['rqe']}"]
    assert not [line for line in lines if "\n" in line]
    with pytest.raises(UserError, match="task 'rqe': its test rows cannot be read"):
        measure(suites=str(more), tasks="rqe")
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        measure(suites=str(more), data={"rqe": str(tmp_path / "gone.jsonl")})
    with pytest.raises(UserError, match=f"nothing is left to evaluate: task 'rqe': {told}.*; nor can those of meqsum"):
        measure(suites=str(tmp_path / "none.yaml"))


def test_tasks_that_the_run_of_a_model_did_not_protect_are_told(suite: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "run" / "model")
    pick = str(Path(suite).parent / "pick.yaml")
    lines: list[str] = []

    def measure() -> Any:
        lines.clear()
        return slimtune.evaluate_model(base, suite, limit=2, say=lines.append)["not_protected"]

    assert measure() is None
    (tmp_path / "run" / "stages.json").write_text("{}")
    data = {"train": "builtin:python-docs", "test": str(Path(suite).parent / "read-test.jsonl")}
    recipe = slimtune.Recipe.model_validate({"data": data, "evaluate": {"tasks": [pick]}})
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    assert measure() == ["sum"]
    (line,) = [line for line in lines if "tuned on" in line]
    assert line.startswith("their rows were not kept from what this model was tuned on: sum; name them in evaluate.tasks or")
    (tmp_path / "run" / "recipe.yaml").write_text("a: 1")
    assert measure() is None
    assert [
        line for line in lines if re.search(r"tuned on is not known: .*recipe.yaml cannot be read: .*unknown key 'a'", line)
    ]


def test_rows_longer_than_those_that_a_model_was_tuned_on_are_told(suite: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "run" / "model")
    lines: list[str] = []

    def told(tuned: int, **asked: Any) -> list[str]:
        recipe = slimtune.Recipe.model_validate({"data": {"max_length": tuned}})
        (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
        lines.clear()
        slimtune.evaluate_model(base, suite, limit=2, say=lines.append, **asked)
        return [line for line in lines if "longer than" in line]

    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "stages.json").write_text("{}")
    (line,) = told(8)
    assert re.match(r"rows of .*pick.* are longer than the 8 tokens that this model was tuned on.*; --max-length 8 cuts", line)
    assert "read" not in line.split(" are longer")[0]  # a perplexity's texts are no prompts
    assert told(8, max_length=8) == []
    assert told(4096) == []

"""Metrics of the user's own: the example of the documentation, what goes wrong, and where their figures go."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import slimtune
from bases import make_tokenizer, metrics, sentences, write_base, write_rows
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.evaluate.folder import directions
from slimtune.evaluate.rows import Prepared, prepare
from slimtune.evaluate.scoring import words
from slimtune.evaluate.tasks import find_task

run = CliRunner().invoke
DOC = Path(__file__).parents[2] / "docs" / "evaluate.md"
STATUTES = {  # question: section that decides it, and what the model has learned to say
    "Which section defines a carrier?": ("12", "It is § 12."),
    "Who owns a work made for hire?": ("101", "§ 101, I think."),
    "What is a hospital?": ("1395x", "See § 1395x."),
    "What is a vessel?": ("3", "It is § 4."),
    "Who may appeal?": ("7", "§ 7 or § 8 or § 9."),
    "When is it due?": ("55", "It is §55."),
}


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that knows the answers of ``STATUTES`` by heart."""
    folder = write_base(tmp_path_factory.mktemp("answering") / "base")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = [f"{question}\nAnswer: {answer}\n" for question, (_, answer) in STATUTES.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def written(folder: Path, prompt: str) -> str:
    """What the model says, up to the end of the line."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).split("\n")[0]


def example() -> tuple[str, str, str]:
    """The two files as they stand in the documentation, and what the task's is called."""
    _, _, rest = DOC.read_text(encoding="utf-8").partition("## A metric of your own\n")
    section = rest.partition("\n## ")[0]
    (function,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (task,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (name,) = re.findall(r"slimtune evaluate MODEL --tasks (\S+)`", section)
    return function, task, name


def write_example(folder: Path) -> Path:
    function, task, name = example()
    (file,) = re.findall(r"metric: (\S+\.py):", task)
    (folder / file).write_text(function, encoding="utf-8")
    (folder / name).write_text(task, encoding="utf-8")
    rows = [{"question": key, "answer": f"It is § {it[0]}.", "section": it[0]} for key, it in STATUTES.items()]
    write_rows(folder / "statutes-test.jsonl", rows)
    write_rows(folder / "statutes-valid.jsonl", [{**row, "question": f"Well, {row['question']}"} for row in rows])
    return folder / name


def test_the_example_of_the_documentation_runs_and_is_fifteen_lines(answering: Path, tmp_path: Path) -> None:
    function, task, _ = example()
    assert len([line for line in (function + task).splitlines() if line.strip()]) <= 15
    file, out = write_example(tmp_path), tmp_path / "out.json"
    result = run(app, ["evaluate", str(answering), "--tasks", str(file), "--json", str(out)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    answers = {question: written(answering, f"{question}\nAnswer:") for question in STATUTES}
    assert [answer.strip() for answer in answers.values()] == [answer for _, answer in STATUTES.values()]
    entry = json.loads(out.read_text())["tasks"]["statutes"]
    figure = entry["figures"]["cites_section"]
    assert figure["value"] == pytest.approx(4 / 6)  # 12, 101, 1395x and 55; 4 is wrong, and three sections are a guess
    assert figure["low"] < figure["value"] < figure["high"] <= 1
    assert (figure["chance"], figure["better"], entry["rows"]) == (0.0, "higher", 6)
    assert "cites_section 0.667" in " ".join(result.stdout.split())
    assert entry["metric_sha256"] == hashlib.sha256((tmp_path / "scoring.py").read_bytes()).hexdigest()


def task_of(folder: Path, function: str, metric: str = "scoring.py:f", more: str = "") -> str:
    """A task of four rows that differ in their fields, scored by a function ``f``."""
    (folder / "scoring.py").write_text(function, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"prompt": f"{text} Who?", "completion": f" {text[:6]}", "n": n} for n, text in enumerate(sentences(4))
    ]
    rows[1] |= {"n": "one", "more": [1, {"a": None}]}
    for split in ("test", "valid"):
        write_rows(folder / f"mine-{split}.jsonl", [{**row, "prompt": f"{split}: {row['prompt']}"} for row in rows])
    file = folder / "mine.yaml"
    file.write_text(f"metric: {metric}\ntokens: 4\nsources: [{{path: 'mine-{{split}}.jsonl'}}]\n{more}\n", encoding="utf-8")
    return str(file)


def prepared(file: str) -> Prepared:
    return prepare(find_task(file), "test", make_tokenizer(), 128)


ROWS = r"on row \d \(\S+mine-test\.jsonl:\d\) with the answer '"
NUMBERS = "; return a finite number, True or False, or a dict of such by name"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("def g(answer, row): return 1", r"scoring\.py has no function 'f'\. It has g"),
        ("def ff(answer, row): return 1", r"has no function 'f'\. Did you mean 'ff'\? It has ff"),
        ("f = 3", r"it is no function but 3; give a function of \(answer, row\)"),
        ("def f(answer): return 1", r"it takes \(answer\), and is called with \(answer, row\)"),
        ("def f(", r"scoring\.py cannot be loaded: SyntaxError: "),
        ("raise SystemExit('usage')", r"scoring\.py cannot be loaded: SystemExit: usage"),
        ("import beside", r"cannot be loaded: ModuleNotFoundError: .* \(a file is read alone, without beside\.py beside it"),
        ("import nowhere_at_all", r"cannot be loaded: ModuleNotFoundError: No module named 'nowhere_at_all'$"),
        ("def f(answer, row): return row['m']", rf"raised KeyError: 'm' \(the row has n, prompt, completion\), {ROWS}"),
        ("def f(answer, row): return 1 / (row['n'] != 2)", r"raised ZeroDivisionError: division by zero, on row 3 \(\S+:3\)"),
        ("def f(answer, row): raise KeyError", r"raised KeyError \(the row has"),
        (
            "def f(answer, row): return answer[0] == 'a'",
            r"raised IndexError: .*, on row 1 \(\S+:1\) with the answer ''; SLIMTUNE",
        ),
        ("def f(answer, row): return 'yes'", rf"scoring\.py:f returned 'yes', {ROWS}.*{NUMBERS}"),
        ("def f(answer, row): pass", rf"returned None, {ROWS}.*{NUMBERS}"),
        ("def f(answer, row): return float('nan')", rf"returned nan, {ROWS}.*{NUMBERS}"),
        ("def f(answer, row): return {'a': 1, 'b': 10**400}", rf"returned 1000\S+ under 'b', {ROWS}.*{NUMBERS}"),
        ("def f(answer, row): return {}", rf"returned the figures \(none\), {ROWS}.*{NUMBERS}"),
        (
            "def f(answer, row): return {'a': 1} | ({'b': 1} if row['n'] == 2 else {})",
            r"the figures a, b, and for other answers a, on",
        ),
        (
            "def f(answer, row): return {'rows': 1}",
            r"its figure 'rows' cannot be called so: that name has a meaning of its own",
        ),
        ("def f(answer, row): return {'target': 1}", r"its figure 'target' cannot be called so: that name has a meaning"),
        ("def f(answer, row): return {'dose_low': 1}", r"its figure 'dose_low' cannot be called so: names that end in _low"),
        ("def f(answer, row): return {1: 1}", r"its figure 1 cannot be called so: use letters"),
    ],
)
def test_what_a_function_does_wrong_is_told_before_the_model_is_loaded(function: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    file = task_of(tmp_path, function)
    with pytest.raises(UserError, match=message) as told:
        prepared(file)
    assert str(told.value).startswith("task 'mine': ")


@pytest.mark.parametrize(
    ("metric", "more", "message"),
    [
        ("scorin.py:f", "", r"there is no file \S+scorin\.py'\. Did you mean 'scoring\.py'\?"),
        ("scoring.py", "", r"metric='scoring\.py' is not valid: it names no function\. Give choice, .*FILE\.py:FUNCTION"),
        ("rogue", "", r"metric='rogue' is not valid: it is no metric\. Did you mean 'rouge'\?"),
        ("scoring:f", "", r"no module 'scoring' is installed here\. Did you mean scoring\.py:f\?"),
        ("slimtune.nowhere.at:f", "", r"no module 'slimtune\.nowhere\.at' is installed here\. Install it"),
        ("sys:intern", "", r"the module 'sys' has no file"),
        ("rouge", "lower_is_better: true", r"lower_is_better=True is not valid: it goes with a function"),
        ("scoring.py:f", "lower_is_better: 3", r"lower_is_better=3 is not valid: give true, or a list"),
        ("scoring.py:f", "lower_is_better: g", r"lower_is_better: scoring\.py:f gives no figure 'g'\. It gives f"),
    ],
)
def test_what_a_task_says_wrong_of_its_function(metric: str, more: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepared(task_of(tmp_path, "def f(answer, row): return 1", metric, more))


def test_a_function_that_fails_on_what_the_model_wrote(answering: Path, tmp_path: Path) -> None:
    file = write_example(tmp_path)
    (tmp_path / "scoring.py").write_text("def cites_section(answer, row):\n    assert '§ 8' not in answer\n    return 1\n")
    result = run(app, ["evaluate", str(answering), "--tasks", str(file)])
    assert result.exit_code == 2
    told = result.stderr.splitlines()[-1]
    assert told.startswith("error: task 'statutes': scoring.py:cites_section raised AssertionError, on row 5 (")
    assert "statutes-test.jsonl:5) with the answer '§ 7 or § 8 or § 9.'; SLIMTUNE_DEBUG=1 shows where" in told
    with pytest.raises(UserError) as error:
        slimtune.evaluate_model(answering, tasks=str(file))
    frames = error.value.__cause__ and error.value.__cause__.__cause__
    assert isinstance(frames, AssertionError)
    assert frames.__traceback__
    assert frames.__traceback__.tb_next
    assert frames.__traceback__.tb_next.tb_frame.f_code.co_filename == str(tmp_path / "scoring.py")


def test_what_a_function_is_given_and_may_return(tmp_path: Path) -> None:
    file = task_of(
        tmp_path,
        "import numpy, torch\n"
        "def f(answer, row):\n"
        "    assert answer == answer.strip() and row['completion'] == row['completion'].strip()\n"
        "    assert row['n'] in (0, 2, 3) or row['more'] == [1, {'a': None}]\n"
        "    return {'same': numpy.bool_(answer == row['completion']), 'size': torch.tensor(len(row['prompt'])), 'n-1': 2}\n",
        more="lower_is_better: [n-1]",
    )
    task = prepared(file)
    assert task.scorer
    assert task.scorer.figures == ("same", "size", "n-1")
    size = sum(len(doc["prompt"]) for doc in task.docs) / 4
    references = [doc["completion"] for doc in task.docs]
    same = sum(one == next_one for one, next_one in zip(references, [*references[1:], references[0]], strict=True)) / 4
    assert 0 < same < 1
    assert task.scorer.chance == {"same": same, "size": pytest.approx(size), "n-1": 2.0}
    assert directions(task) == {"same": "higher", "size": "higher", "n-1": "lower"}
    one = prepared(task_of(tmp_path, "def f(answer, row): return {'a': 1, 'b': 2}", more="lower_is_better: true"))
    assert directions(one) == {"a": "lower", "b": "lower"}


def test_a_file_is_run_when_its_task_is_prepared_once_and_again_after_a_change(tmp_path: Path) -> None:
    text = (
        "from pathlib import Path\nruns = Path(__file__).with_name('runs')\nwith runs.open('a') as file:\n    file.write('x')\n"
    )
    file = task_of(tmp_path, text + "def f(answer, row): return 1\n")
    find_task(file)
    assert not (tmp_path / "runs").exists()
    for more, runs, value in (("", "x", 1), ("", "x", 1), ("f = lambda answer, row: 2\n", "xx", 2)):
        with (tmp_path / "scoring.py").open("a") as function:
            function.write(more)
        task = prepared(file)
        assert task.scorer
        assert task.scorer.chance == {"f": value}
        assert (tmp_path / "runs").read_text() == runs
    assert not list(tmp_path.glob("__pycache__"))


def test_the_words_of_a_task_follow_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tasks without one are what they were; nothing of the user's is run for them."""
    file = task_of(tmp_path, "def f(answer, row): return 1")
    first = words(find_task(file))
    task_of(tmp_path, "def f(answer, row): return 2")
    assert words(find_task(file)) != first
    task_of(tmp_path, "def f(answer, row): return 1")
    assert words(find_task(file)) == first
    task_of(tmp_path, "def f(answer, row): return 1", more="lower_is_better: true")
    assert words(find_task(file)) != first
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "own_package" / "marks.py").write_text("def f(answer, row): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    file = task_of(tmp_path, "", "own_package.marks:f")
    first = words(find_task(file))
    (tmp_path / "own_package" / "marks.py").write_text("def f(answer, row): return 2")
    assert words(find_task(file)) != first
    task_of(tmp_path, "", "rouge")
    assert words(find_task(file)) == (find_task(file).file.model_dump_json(exclude={"lower_is_better"}),)


def test_plain_lm_eval_runs_the_folder_without_the_users_files(
    answering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of a file, which goes with the folder, and one of a module, which has to be there."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "own").mkdir()
    file = write_example(tmp_path / "own")
    (tmp_path / "marks_of_ours.py").write_text(
        "def long(answer, row): return {'size': len(answer), 'asked': len(row['question'])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = file.read_text(encoding="utf-8").replace("scoring.py:cites_section", "marks_of_ours:long")
    (tmp_path / "own" / "long.yaml").write_text(text + "lower_is_better: [size]\n", encoding="utf-8")
    (tmp_path / "own" / "both.yaml").write_text("tasks: [statutes.yaml, long.yaml]")
    found = slimtune.evaluate_model(answering, str(tmp_path / "own" / "both.yaml"), write_tasks=tmp_path / "a")
    shutil.rmtree(tmp_path / "own")
    folder = Path(shutil.move(tmp_path / "a", tmp_path / "b"))
    assert "marks_of_ours" in (folder / "README.md").read_text()
    tasks = [f"slimtune_{name}" for name in found["tasks"]]
    theirs: Any = evaluator.simple_evaluate(
        model=HFLM(pretrained=str(answering), device="cpu", batch_size=4),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    for name, task in found["tasks"].items():
        for metric, figure in task["figures"].items():
            assert theirs["results"][f"slimtune_{name}"][f"{metric},none"] == pytest.approx(figure["value"])
            assert theirs["higher_is_better"][f"slimtune_{name}"][metric] is (figure["better"] == "higher")
    said = [len(answer) for _, answer in STATUTES.values()]
    figures = found["tasks"]["long"]["figures"]
    assert figures["size"]["value"] == pytest.approx(sum(said) / 6)
    assert figures["asked"]["value"] == pytest.approx(sum(map(len, STATUTES)) / 6)
    assert [figures[name]["better"] for name in ("size", "asked")] == ["lower", "higher"]


def test_a_run_follows_a_metric_of_ones_own(bench: Any, tmp_path: Path) -> None:
    from slimtune import pipeline
    from slimtune.report.table import render

    file = task_of(tmp_path, "def f(answer, row): return {'size': len(answer), 'same': answer == row['completion']}")
    with Path(file).open("a") as task:
        task.write("lower_is_better: [size]\n")
    tasks = {"evaluate__tasks": [file], "evaluate__every": 4, "evaluate__rows": 2}
    summary = pipeline.tune(bench.recipe(tmp_path / "run", **tasks))
    assert [row["phase"] for row in metrics(tmp_path / "run") if "valid_mine.size" in row] == ["search", "recover"]
    assert summary["lower_is_better"] == ["mine.size"]
    assert {"mine.size", "mine.size_chance", "mine.same", "mine.same_high", "mine.rows"} < set(summary["result"])
    references = [len(text[:6].strip()) for text in sentences(4)]
    assert summary["result"]["mine.size_chance"] == pytest.approx(sum(references) / 4)
    assert "mine, size (baseline" in "".join(str(cell) for cell in render(summary).renderables[0].columns[0].cells)

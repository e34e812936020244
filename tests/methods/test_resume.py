"""A run that was killed and goes on is the run that was not: the same rows, the same Plan, the same weights."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bases import Bench, kept_as_killed, killed, metrics
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.recipe import Recipe
from slimtune.report.table import render
from slimtune.train import checkpoint, loop, session
from slimtune.train.loop import Phase
from slimtune.train.session import Session
from warm import Loaded

COMMON: dict[str, Any] = {
    "search__steps": 5,
    "recover__steps": 6,
    "train__checkpoint_every": 2,
    "evaluate__every": 3,
    # dropout: a resumed run must draw what an uninterrupted one would
    "lora__dropout": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {
        "distill__weight": 0.5,
        "distill__recover": True,
        "generator__prior": "mixed",
        "generator__prior_steps": 2,
        "compensate__weights": "decide",
    },
    "lora_aware": {"lora__semantics": "lora_aware", "lora__settle": 0.6, "search__decide_every": 2},
    "lasso": {"lora__semantics": "lora_aware", "lora__settle": 0.6, "lora__lasso": "loss", "recover__lr": 1e-3},
    "joint": {"search__update": "joint", "compensate__weights": "none", "generator__prior_steps": 2},
    "experts": {
        "method": "tomoe",
        "budget": {"keep": 0.7, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
        "moe": {"number": 5, "top_k": 2, "prior_steps": 2, "groups": 1, "explore": 0.5},
        "distill__weight": 0.5,
    },
    "masked experts": {
        "method": "tomoe",
        "budget": {"keep": 0.8, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
        "moe": {"attention": "tokens", "number": 5, "top_k": 2, "prior_steps": 2, "explore": 0.5},
        "distill__weight": 0.5,
    },
    "frozen experts": {
        "method": "tomoe",
        "budget": {"keep": 0.7, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
        "moe": {"experts": "overlap", "number": 4, "prior": "none", "tune": False, "explore": 1.0, "prior_steps": 2},
    },
    "dense": {"evaluate__dense_lora": True},
    "finetune": {"method": "finetune", "train__steps": 7},
    "scratch": {"model": {"init": "config"}, "evaluate__dense_lora": True},
    "quantized": {
        "model": {"quantize": "nf4"},
        "distill__weight": 0.5,
        "distill__recover": True,
        "generator__prior_steps": 2,
        "compensate__weights": "decide",
        "recover__quantize": True,
    },
    "quantized rival": {
        "model": {"quantize": "nf4"},
        "method": "twostage",
        "twostage__scores": "wanda",
        "twostage__least_squares": True,
        "recover__quantize": False,
        "twostage__batches": 2,
    },
}


class Killed(BaseException):
    """Stands in for a kill: nothing in the package may catch it."""


def variant(bench: Bench, name: str, out: Path) -> Recipe:
    overrides = {**COMMON, **VARIANTS[name]}
    if "model" in overrides:
        overrides["model"] = {"path": bench.base, **overrides["model"]}
    return bench.recipe(out, **overrides)


KILLS = [
    ("hard", "main", "search", 0),  # before the first checkpoint
    ("hard", "main", "search", 2),
    ("hard", "main", "recover", 2),
    ("joint", "main", "search", 2),
    ("joint", "main", "recover", 2),
    ("experts", "main", "search", 0),
    ("experts", "main", "search", 2),
    ("experts", "main", "recover", 0),
    ("experts", "main", "recover", 2),
    ("masked experts", "main", "search", 2),
    ("masked experts", "main", "recover", 0),
    ("masked experts", "main", "recover", 2),
    ("frozen experts", "main", "search", 4),
    ("lora_aware", "main", "settle", 2),
    ("lora_aware", "main", "recover", 2),
    ("lasso", "main", "recover", 0),
    ("dense", "dense_lora", "tune", 4),
    ("dense", "main", "search", 3),
    ("finetune", "main", "tune", 4),
    ("scratch", "main", "search", 2),
    ("quantized", "main", "search", 2),
    ("quantized", "main", "recover", 2),
    ("quantized rival", "main", "recover", 2),
]
"""Variant, stage, phase, and the step after which a kill is thought."""


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs by variant, each made once; beside ``out``, what kills of ``KILLS`` would have left of it."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in done:
            out = tmp_path_factory.mktemp(name) / "out"
            with kept_as_killed((stage, phase, step) for which, stage, phase, step in KILLS if which == name):
                done[name] = out, tune(variant(bench, name, out))
        return done[name]

    return get


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: str, phase: str, step: int, error: type[BaseException] = Killed) -> None:
    real = loop._run_step

    def run_step(session: Session, now: Phase, at: int) -> None:
        real(session, now, at)
        if (session.stage, now.name, at) == (stage, phase, step):
            raise error

    monkeypatch.setattr(loop, "_run_step", run_step)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def render_text(summary: dict[str, Any]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(summary))
    return capture.get()


def assert_same(out: Path, summary: dict[str, Any], whole: tuple[Path, dict[str, Any]], resumed: bool = True) -> None:
    reference, expected = whole
    assert metrics(out) == metrics(reference)
    assert weights(out) == weights(reference)
    assert (summary["resumed"], expected["resumed"]) == (resumed, False)
    assert ("s since --resume on" in render_text(summary)) == resumed
    for key in ("plan", "tokens", "leak", "base"):
        assert summary[key] == expected[key], key
    for key in ("dense_lora", "result"):
        assert {**summary[key], "seconds": 0} == {**expected[key], "seconds": 0}


@pytest.mark.parametrize(("name", "stage", "phase", "step"), KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    bench: Bench, whole: Any, tmp_path: Path, name: str, stage: str, phase: str, step: int
) -> None:
    """A kill leaves what stood in the folder at that step; runs that an exception ends, in place, are further down."""
    out, _ = whole(name)
    shutil.copytree(killed(out, stage, phase, step), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_same(tmp_path / "out", tune(variant(bench, name, tmp_path / "out"), resume=True), whole(name))


def test_killed_between_a_row_and_its_checkpoint_and_again_while_exporting(
    bench: Bench, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, expected = variant(bench, "hard", tmp_path), whole("hard")  # made before anything is patched
    real = checkpoint.save

    def save(path: Path, state: dict[str, Any]) -> None:
        if (state["phase"], state["step"]) == ("search", 4):
            raise Killed
        real(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(Killed):
            tune(recipe)
    assert metrics(tmp_path)[-1] == {"checkpoint": ["main", "search", 4]}
    with monkeypatch.context() as patch:
        patch.setattr("slimtune.delivery.merge_lora", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            tune(recipe, resume=True)
    kill_at(monkeypatch, "main", "recover", 5)  # no step may run again
    assert_same(tmp_path, tune(recipe, resume=True), expected)


_CHILD = """
import os, signal, sys
from slimtune.pipeline import tune
from slimtune.recipe import load
from slimtune.train import checkpoint

real = checkpoint.torch.save

def save(state, file):
    if (state["phase"], state["step"]) == (sys.argv[2], int(sys.argv[3])):
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, file)

checkpoint.torch.save = save
tune(load(sys.argv[1]))
"""


def test_a_process_killed_while_it_writes_a_checkpoint(bench: Bench, whole: Any, loaded: Loaded, tmp_path: Path) -> None:
    recipe = variant(bench, "hard", tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "child.py").write_text(_CHILD)
    child = loaded.run([sys.executable, "-P", *(str(tmp_path / name) for name in ("child.py", "recipe.yaml")), "recover", "2"])
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert_same(tmp_path / "run", tune(recipe, resume=True), whole("hard"))


def test_an_interrupt_leaves_a_usable_state_even_in_a_folder_that_moved(bench: Bench, whole: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "recover", 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(variant(bench, "hard", tmp_path / "old"))
    state = checkpoint.load(tmp_path / "old" / "checkpoint-main.pt", torch.device("cpu"))
    assert state is not None
    assert (state["phase"], state["step"]) == ("recover", 4)
    (tmp_path / "old").rename(tmp_path / "new")
    assert_same(tmp_path / "new", tune(variant(bench, "hard", tmp_path / "new"), resume=True), whole("hard"))


def test_a_resumed_run_knows_the_peak_of_memory_that_was_before(bench: Bench, tmp_path: Path) -> None:
    recipe = variant(bench, "finetune", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "peak_memory", lambda _: 900)
        kill_at(patch, "main", "tune", 4)
        with pytest.raises(Killed):
            tune(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "peak_memory", lambda _: 300)
        assert tune(recipe, resume=True)["result"]["memory"] == 900


@pytest.mark.parametrize("name", ["hard", "dense", "finetune"])
def test_resuming_a_finished_run_trains_nothing(bench: Bench, whole: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, summary = whole(name)
    rows, before = metrics(out), weights(out)

    def run_step(*args: Any) -> None:
        raise AssertionError("a step was run again")

    monkeypatch.setattr(loop, "_run_step", run_step)
    again = tune(variant(bench, name, out), resume=True)
    assert metrics(out) == rows
    assert weights(out) == before
    assert again["result"]["ppl"] == summary["result"]["ppl"]
    assert json.loads((out / "summary.json").read_text())["plan"] == summary["plan"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train__lr": 5e-3}, "train.lr is 0.005 now but 0.002"),
        ({"seed": 1}, "seed is 1 now but 0"),
        ({"recover__steps": 7}, "recover.steps is 7 now but 6"),
    ],
)
def test_resuming_with_another_recipe_names_the_key(bench: Bench, whole: Any, change: dict[str, Any], named: str) -> None:
    out, _ = whole("hard")
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        tune(bench.recipe(out, **{**COMMON, **VARIANTS["hard"], **change}), resume=True)
    assert (out / "summary.json").is_file()


def test_an_interrupt_loses_no_more_than_a_hundred_steps_by_default(bench: Bench, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "tune", 101, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(bench.recipe(tmp_path, method="finetune", train__steps=120, train__batch=1))
    state = checkpoint.load(tmp_path / "checkpoint-main.pt", torch.device("cpu"))
    assert state is not None
    assert state["step"] == 100


def test_resuming_what_never_began_begins(bench: Bench, whole: Any, tmp_path: Path) -> None:
    assert_same(tmp_path, tune(variant(bench, "finetune", tmp_path), resume=True), whole("finetune"), resumed=False)


def test_a_damaged_checkpoint_is_named(bench: Bench, tmp_path: Path) -> None:
    recipe = variant(bench, "finetune", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "tune", 3)
        with pytest.raises(Killed):
            tune(recipe)
    file = tmp_path / "checkpoint-main.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint-main\.pt' is damaged .*delete it to start anew"):
        tune(recipe, resume=True)


def test_other_data_do_not_slip_into_a_resumed_run(bench: Bench, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(Path(bench.texts).read_text(encoding="utf-8"), encoding="utf-8")
    recipe = bench.recipe(tmp_path / "run", data={"train": str(texts), "max_length": 32}, train__checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "recover", 1)
        with pytest.raises(Killed):
            tune(recipe)
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    texts.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="the data are not those the run began with"):
        tune(recipe, resume=True)
    texts.write_text("".join(lines), encoding="utf-8")
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


def test_another_base_does_not_slip_into_a_resumed_run(bench: Bench, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bench.base, base)
    recipe = bench.recipe(tmp_path / "run", model={"path": str(base)}, train__checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "recover", 1)
        with pytest.raises(Killed):
            tune(recipe)
    stages = tmp_path / "run" / "stages.json"
    begun = json.loads(stages.read_text(encoding="utf-8"))
    stages.write_text(json.dumps({key: value for key, value in begun.items() if key != "weights"}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # begun by a version that did not look: from here on it is looked at
        kill_at(patch, "main", "recover", 3)
        with pytest.raises(Killed):
            tune(recipe, resume=True)
    assert json.loads(stages.read_text(encoding="utf-8")) == begun
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 0.5 for name, value in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"the config or weights of model.path='.*base' are not those the run began with; restore them"
    ):
        tune(recipe, resume=True)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


def test_training_time_counts_what_came_before_the_interruption(bench: Bench, tmp_path: Path) -> None:
    recipe = variant(bench, "finetune", tmp_path)
    tune(recipe)
    file = tmp_path / "checkpoint-main.pt"
    state = checkpoint.load(file, torch.device("cpu"))
    assert state is not None
    assert 0 < state["seconds"] < 100
    checkpoint.save(file, {**state, "seconds": 1234.0})
    assert 1234.0 <= tune(recipe, resume=True)["result"]["seconds"] < 1334.0


@pytest.fixture(scope="module")
def ended_early(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is to go on."""
    out = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "main", "recover", 3)
        with pytest.raises(Killed):
            tune(bench.recipe(out, train__checkpoint_every=2))
    return out


@pytest.mark.parametrize("content", ["{bad", "[]"])
def test_a_damaged_record_of_stages_is_told_and_half_a_row_of_metrics_is_not_minded(
    content: str, bench: Bench, ended_early: Path, tmp_path: Path
) -> None:
    recipe = bench.recipe(tmp_path / "run", train__checkpoint_every=2)
    shutil.copytree(ended_early, tmp_path / "run")
    stages, metrics = tmp_path / "run" / "stages.json", tmp_path / "run" / "metrics.jsonl"
    whole = stages.read_text()
    stages.write_text(content)
    with pytest.raises(UserError, match=r"--resume: '.*stages\.json' is damaged .*; start anew with --overwrite"):
        tune(recipe, resume=True)
    stages.write_text(whole)
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo\n[]\n')
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


def test_two_runs_do_not_write_into_one_folder(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    other = os.open(tmp_path / "run", os.O_RDONLY)  # another open file: as good as another process's
    fcntl.flock(other, fcntl.LOCK_EX)
    recipe = bench.recipe(tmp_path / "run")
    with pytest.raises(UserError, match=r"out='.*run' is being written by another slimtune tune; wait for it, or"):
        tune(recipe)
    os.close(other)
    assert tune(recipe)["result"]["ppl"] > 1

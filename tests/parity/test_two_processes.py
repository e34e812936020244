"""Two processes do what one does, under DDP and FSDP2: gradients of leaf masks, whole runs, and runs that the other began."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from bases import Bench, metrics
from parity.worker import CHECKPOINTING, SPREAD, WRAPPERS, Alternation, differences, kept_checkpoints
from slimtune.pipeline import tune
from slimtune.recipe import Recipe
from warm import Loaded

pytestmark = pytest.mark.timeout(180)  # the fixture below has two ranks run for a minute on idle cores
WORKER = Path(__file__).with_name("worker.py")
RUN: dict[str, Any] = {
    "generator__prior": "mixed",
    "generator__prior_steps": 2,
    "compensate__weights": "decide",
    "train__micro_batch": 2,
}


RIVAL: dict[str, Any] = {**RUN, "method": "twostage", "twostage__scores": "generator", "twostage__least_squares": True}
EXPERTS: dict[str, Any] = {
    "method": "tomoe",
    "budget": {"keep": 0.7, "of": "block", "ffn_multiple": 4, "tolerance": 0.03},
    # the balance is a product of means over micro-batches, and those of two processes are others
    "moe": {"number": 5, "top_k": 2, "prior_steps": 2, "groups": 1, "balance": 0.0},
    "train__micro_batch": 2,
}
FROZEN: dict[str, Any] = {
    **EXPERTS,
    "moe": {
        **EXPERTS["moe"],
        "groups": "auto",
        "number": 4,
        "top_k": 1,
        "experts": "overlap",
        "tune": False,
        "attention": "tokens",
    },
    "budget": {"keep": 0.95, "of": "block", "ffn_multiple": 4, "tolerance": 0.05},
    "distill": {"weight": 0.5},
}
"""The base teaches the search and the recovery; every token has its own value dimensions."""
SCRATCH: dict[str, Any] = {"method": "finetune", "train__steps": 4, "evaluate__every": 2, "train__micro_batch": 1}


def recipe_of(bench: Bench, kind: str, out: Path, **more: Any) -> Recipe:
    """A run of ATP, on 4 bits or not, of a rival whose generator decides first, of all weights from nothing, or of experts."""
    if kind in ("experts", "frozen"):
        return bench.recipe(out, **{"experts": EXPERTS, "frozen": FROZEN}[kind], train__checkpoint_every=2, **more)
    own = {"scratch": {"init": "config"}, "quantized": {"quantize": "nf4"}}
    model = {"model": {"path": bench.base, **own.get(kind, {})}}
    wanted = {"scratch": SCRATCH, "rival": RIVAL}.get(kind, RUN)
    return bench.recipe(out, **model, **wanted, train__checkpoint_every=2, **more)


@pytest.fixture(scope="module")
def one_run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with runs of one process, and what a kill after each of their checkpoints would leave."""
    folder = tmp_path_factory.mktemp("one")
    for kind in ("atp", "scratch", "quantized", "rival", "experts", "frozen"):
        with kept_checkpoints():
            tune(recipe_of(bench, kind, folder / kind))
    return folder


@pytest.fixture(scope="module")
def two_ranks(bench: Bench, one_run: Path, loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both ranks recorded, and with the runs of both."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind, begun in (("atp", "recover-2"), ("scratch", "tune-2")):
        shutil.copytree(one_run / f"{kind}-{begun}", folder / f"{kind}-resumed")
        for out in (kind, f"{kind}-resumed"):
            recipe = recipe_of(bench, kind, folder / out, train__shard="full")
            (folder / f"sharded-{out}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    recipe = recipe_of(bench, "quantized", folder / "quantized")
    (folder / "sharded-none.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for kind in ("experts", "frozen"):
        recipe = recipe_of(bench, kind, folder / kind)
        (folder / f"sharded-{kind}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    recipe = recipe_of(bench, "atp", folder / "compiled", train__compile=True)
    (folder / "sharded-compiled.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    recipe = recipe_of(bench, "rival", folder / "rival", train__shard="full")
    (folder / "sharded-rival.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "recipe.yaml").write_text(bench.recipe(folder / "run", **RUN).to_yaml(), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = loaded.run([sys.executable, "-P", str(WORKER), str(folder), str(folder / "recipe.yaml")], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    alternation = Alternation(Accelerator(cpu=True), "llama-bias", "none")
    return {**alternation.turns(), "small": alternation.shrink()}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_agree_with_one_process(
    wrapper: str, checkpointing: str, rank: int, two_ranks: Path, one_process: dict[str, Any]
) -> None:
    record = torch.load(two_ranks / f"{wrapper}-{checkpointing}-{rank}.pt")
    assert record["losses"] == pytest.approx(one_process["losses"], rel=1e-6)
    assert differences(record, one_process, "gradients_0") <= 1e-6
    # after an AdamW step, which divides by the root of the squared gradient, rounding differences are larger
    assert differences(record, one_process, "gradients_1") <= 1e-5
    assert differences(record, one_process, "lora") <= 1e-5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_ranks_go_on_together_after_a_cut(
    checkpointing: str, rank: int, two_ranks: Path, one_process: dict[str, Any]
) -> None:
    small, expected = torch.load(two_ranks / f"ddp-{checkpointing}-{rank}.pt")["small"], one_process["small"]
    assert small["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert differences(small, expected, "lora") <= 1e-5
    shapes = {name: value.shape for name, value in one_process["lora"].items()}
    assert any(value.shape != shapes[name] for name, value in expected["lora"].items()), "nothing was cut"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", SPREAD)
def test_a_sharded_model_is_cut_and_gathered_as_a_whole_one(name: str, rank: int, two_ranks: Path) -> None:
    found = torch.load(two_ranks / f"spread-{rank}.pt")[name]
    assert found.pop("whole") <= 1e-5
    assert found.pop("cut") <= 1e-5
    assert found == ({"lost": 0, "gathered": 0.0, "tied": 0, "logits": found.get("logits")} if rank == 0 else {"lost": 0})
    assert found.get("logits", 0.0) <= 1e-5


def agree(one: Path, two: Path) -> None:
    """The same decision and tokens, the same losses at every step, the same perplexity of what was written."""
    ours, theirs = (json.loads((out / "summary.json").read_text(encoding="utf-8")) for out in (one, two))
    assert theirs["plan"] == ours["plan"]
    assert theirs["tokens"] == ours["tokens"]
    rows = [[row for row in metrics(out) if "step" in row] for out in (one, two)]
    assert len(rows[0]) == len(rows[1]) > 0
    for before, after in zip(*rows, strict=True):
        assert before.keys() == after.keys()
        for key in ("decide_loss", "adapt_loss", "valid_loss", "adapt_grad_norm"):
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=1e-5 if "loss" in key else 1e-4)
    assert theirs["base"].get("ppl", 0.0) == pytest.approx(ours["base"].get("ppl", 0.0), rel=1e-4)
    assert theirs["result"]["ppl"] == pytest.approx(ours["result"]["ppl"], rel=1e-4)
    assert [theirs["result"][key] for key in ("parameters", "class")] == [
        ours["result"][key] for key in ("parameters", "class")
    ]


def test_two_processes_do_what_one_does(one_run: Path, two_ranks: Path) -> None:
    agree(one_run / "atp", two_ranks / "run")


@pytest.mark.parametrize("kind", ["experts", "frozen"])
def test_two_processes_find_the_same_experts(one_run: Path, two_ranks: Path, kind: str) -> None:
    agree(one_run / kind, two_ranks / kind)


def test_two_processes_on_4_bits_do_what_one_does(one_run: Path, two_ranks: Path) -> None:
    agree(one_run / "quantized", two_ranks / "quantized")


def test_two_processes_that_compile_do_what_one_does_without(one_run: Path, two_ranks: Path) -> None:
    assert all(torch.load(two_ranks / f"graphs-{rank}.pt") > 0 for rank in (0, 1)), "of blocks"
    agree(one_run / "atp", two_ranks / "compiled")


@pytest.mark.parametrize("kind", ["atp", "scratch", "rival"])
def test_a_model_that_is_sharded_learns_what_a_whole_one_does(kind: str, one_run: Path, two_ranks: Path) -> None:
    agree(one_run / kind, two_ranks / kind)


@pytest.mark.parametrize("kind", ["atp", "scratch"])
def test_two_processes_go_on_with_what_one_began(kind: str, one_run: Path, two_ranks: Path) -> None:
    assert json.loads((two_ranks / f"{kind}-resumed" / "summary.json").read_text(encoding="utf-8"))["resumed"]
    agree(one_run / kind, two_ranks / f"{kind}-resumed")


@pytest.mark.parametrize(("kind", "begun"), [("atp", "search-2"), ("atp", "recover-2"), ("scratch", "tune-2")])
def test_one_process_goes_on_with_what_two_began(
    bench: Bench, kind: str, begun: str, one_run: Path, two_ranks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(two_ranks / f"{kind}-{begun}", out)
    assert tune(recipe_of(bench, kind, out, train__shard="full"), resume=True)["resumed"]
    agree(one_run / kind, out)


def test_only_all_weights_are_kept_in_parts(two_ranks: Path) -> None:
    assert not (two_ranks / "atp" / "checkpoint-main.shards").exists()
    assert [path.name for path in (two_ranks / "scratch" / "checkpoint-main.shards").iterdir()] == ["tune-4"]

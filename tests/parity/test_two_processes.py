"""Two processes do what one does: gradients of leaf masks under DDP and FSDP2, and a whole run, of which only one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from bases import Bench, metrics
from parity.worker import CHECKPOINTING, WRAPPERS, Alternation, differences
from slimtune.pipeline import tune

WORKER = Path(__file__).with_name("worker.py")
RUN: dict[str, Any] = {
    "generator__prior": "mixed",
    "generator__prior_steps": 2,
    "compensate__weights": "decide",
    "train__micro_batch": 2,
}


@pytest.fixture(scope="module")
def two_ranks(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both ranks recorded, and in ``run`` with what a run of both left."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.yaml").write_text(bench.recipe(folder / "run", **RUN).to_yaml(), encoding="utf-8")
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(WORKER), str(folder), str(folder / "recipe.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
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


def test_two_processes_do_what_one_does(bench: Bench, two_ranks: Path, tmp_path: Path) -> None:
    one = tune(bench.recipe(tmp_path, **RUN))
    two = json.loads((two_ranks / "run" / "summary.json").read_text(encoding="utf-8"))
    assert two["plan"] == one["plan"]
    assert two["tokens"] == one["tokens"]
    rows = [[row for row in metrics(out) if "step" in row] for out in (tmp_path, two_ranks / "run")]
    assert len(rows[0]) == len(rows[1]) == 8
    for ours, theirs in zip(*rows, strict=True):
        for key in ("decide_loss", "adapt_loss"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    assert two["result"]["ppl"] == pytest.approx(one["result"]["ppl"], rel=1e-4)

"""What trackers are told, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from bases import Bench
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.train import session


def test_an_unknown_tracker_names_the_known(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trackers: 'wandbb' is unknown\. Did you mean 'wandb'\? .*mlflow, .*tensorboard"):
        tune(bench.recipe(tmp_path, trackers=["wandbb"]))


def test_a_tracker_that_is_not_installed_names_its_package(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(UserError, match="trackers: 'comet_ml' needs the package comet-ml: pip install comet-ml"):
        tune(bench.recipe(tmp_path, trackers=["mlflow", "comet_ml"]))


@pytest.mark.filterwarnings("ignore:.log_with=:UserWarning")
def test_steps_count_on_over_phases_and_the_reference_has_its_own_names(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, bool]] = []

    def log(self: Accelerator, values: dict[str, Any], step: int) -> None:
        dense = [name.startswith("dense_lora/") for name in values]
        assert len(set(dense)) == 1
        assert ("dense_lora/" * dense[0] + "adapt_loss") in values
        told.append((step, dense[0]))

    monkeypatch.setattr(session, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(Accelerator, "log", log)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *args, **kwargs: None)
    aware = {"lora__semantics": "lora_aware", "lora__settle": 0.5}  # search 4, settle 2, recover 2
    tune(bench.recipe(tmp_path, trackers=["tensorboard"], evaluate__dense_lora=True, **aware))
    assert [step for step, dense in told if dense] == list(range(8))
    assert [step for step, dense in told if not dense] == list(range(8))

"""How a run is launched."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bases import Bench, session_of
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.train import loop


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_shards_the_model_is_refused(
    bench: Bench, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"launched for {name} .* start it with torchrun"):
        tune(bench.recipe(tmp_path / "never"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("lora.semantics=lora_aware", {"lora__semantics": "lora_aware"}),
        ("distill.weight", {"distill__weight": 1.0}),
        ("train.compile=true", {"train__compile": True}),
        ("train.optimizer=muon", {"train__optimizer": "muon"}),
        ("twostage.compensate=true with scores=flap", {"method": "twostage", "twostage__scores": "flap"}),
    ],
)
def test_what_needs_whole_weights_is_refused_of_a_sharded_model(
    bench: Bench, key: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{key} .* does not go with train.shard=full"):
        tune(bench.recipe(tmp_path / "never", train__shard="full", **asked))
    assert not list(tmp_path.iterdir())


def test_steps_that_cannot_be_shared_evenly_are_refused_of_a_sharded_model(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path, train__shard="full")
    assert not session.sharded, "one process has the whole"
    session.accelerator = SimpleNamespace(num_processes=3)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"a train step of 4 windows cannot be shared evenly by 3 processes, .* give it 6"):
        session.batches(session.splits.train, "train", 4)


def test_full_collections_are_made_where_all_processes_are_at_the_same_step(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen, collected = gc.get_threshold(), list[int](), list[int]()
    figures = loop._run_step

    def step(session: Any, phase: Any, step: int) -> None:
        figures(session, phase, step)
        seen.append(gc.get_threshold()[2])

    monkeypatch.setattr(loop, "_run_step", step)
    monkeypatch.setattr(loop, "COLLECT_EVERY", 2)
    monkeypatch.setattr(loop.gc, "collect", lambda: collected.append(len(seen)))
    session = session_of(bench, tmp_path)
    turn = loop.Turn("adapt", lambda step: {"loss": 1.0})
    loop.run_phase(session, loop.Phase("tune", 5, [turn], dict, lambda: 1.0, dict))
    assert gc.get_threshold() == before
    assert len(seen) == 5
    assert min(seen) > 1 << 20
    assert collected == [2, 4]

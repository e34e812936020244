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
from slimtune.runtime import short_collections


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


def test_collections_are_short_inside_and_as_before_outside() -> None:
    seen = list[int]()
    gc.unfreeze()  # as in a process that nobody has seen to
    try:
        with short_collections():
            seen.append(gc.get_freeze_count())
            with short_collections():
                pass
            seen.append(gc.get_freeze_count())
        assert gc.get_freeze_count() == 0
        assert seen[0] > 1000
        assert seen[1] >= seen[0], "what another one froze is its own"
    finally:
        gc.freeze()

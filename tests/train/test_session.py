"""How a run is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from bases import Bench
from slimtune.errors import UserError
from slimtune.pipeline import tune


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_shards_the_model_is_refused(
    bench: Bench, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"launched for {name} .* start it with torchrun"):
        tune(bench.recipe(tmp_path / "never"))
    assert not list(tmp_path.iterdir())

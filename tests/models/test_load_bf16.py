"""Constants in buffers keep fp32 when weights are loaded in bf16 (Gemma scales embeddings by the root of the hidden size)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bases import Bench, verify_here, write_base
from slimtune.models.load import load_model
from slimtune.pipeline import tune
from slimtune.sections import ModelConfig


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "llama"])
def test_buffers_are_those_of_an_fp32_load(tmp_path: Path, family: str) -> None:
    base = ModelConfig(path=str(write_base(tmp_path, family, hidden_size=80, head_dim=16)))
    exact = dict(load_model(base, "cpu", torch.float32).named_buffers())
    loaded = load_model(base, "cpu", torch.bfloat16)
    assert next(loaded.parameters()).dtype is torch.bfloat16
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer.float(), exact[name].float()), name


def test_a_gemma_tuned_in_bf16_is_written_as_it_was_tuned(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.delivery.verify", verify_here)
    base = str(write_base(tmp_path / "base", "gemma", hidden_size=80, head_dim=16))
    summary = tune(
        bench.recipe(tmp_path / "run", model={"path": base, "dtype": "bfloat16"}, export__verify=True, export__dtype="float32")
    )
    assert summary["reload_difference"] < 1e-4

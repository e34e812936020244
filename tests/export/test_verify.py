"""The check in a fresh process. It costs seconds, so the real one runs once; its failures use small stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cuts import UNEVEN, cut_model, logits_of, sample_ids
from slimtune.errors import UserError
from slimtune.export import verify as module
from slimtune.export.huggingface import save
from slimtune.export.verify import verify


def test_a_per_layer_folder_loads_alone_and_equals_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    model, plan = cut_model("llama-tied", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    expected = logits_of(model, sample_ids())
    expected[1, 3, 5] += 0.25  # one wrong number must be found, and nothing else
    assert verify(folder, sample_ids(), expected) == pytest.approx(0.25, abs=1e-5)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "raise ValueError('the reason at the end')",
            r"process \(ValueError: the reason at the end\); fetch or export the folder again$",
        ),
        ("raise ValueError('many\\n\\n  lines: of it')", r"process \(ValueError: many lines: of it\); fetch"),
        ("import sys; sys.exit(3)", r"process \(exit 3\); fetch"),
        ("print('{\"difference\": NaN}')", "not finite"),
    ],
)
def test_failures_name_the_folder_and_the_reason(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(module, "_CHILD", child)
    with pytest.raises(UserError, match=message) as caught:
        verify(tmp_path / "model", torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 3))
    assert "model" in str(caught.value)

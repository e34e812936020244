"""Every family: train five steps, cut, export, reload, same logits, and it writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimtune  # noqa: F401  (teaches transformers per-layer models)
from bases import VOCABULARY, Bench, make_tokenizer, metrics
from families import FAMILY_NAMES, tiny_config
from slimtune import delivery
from slimtune.pipeline import tune


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_train_cut_export_reload(name: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = tiny_config(name, vocab_size=VOCABULARY + 4)  # qwen2's own tokenizer class adds a token
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    kept: list[Any] = []
    real = delivery.merge_lora

    def merge_lora(model: Any, *rest: Any) -> Any:
        merged = real(model, *rest)
        kept.append(copy.deepcopy(merged))  # a run gives its own one free
        return merged

    monkeypatch.setattr(delivery, "merge_lora", merge_lora)
    recipe = bench.recipe(tmp_path / "run", model={"path": str(tmp_path / "base")}, search__steps=3, recover__steps=2)
    summary = tune(recipe)
    assert len([row for row in metrics(tmp_path / "run") if "adapt_loss" in row]) == 5
    assert abs(summary["result"]["parameters"] / summary["base"]["parameters"] - 0.7) <= 0.002
    assert json.loads((tmp_path / "run" / "model" / "plan.json").read_text())["plan"]["model_type"] == config.model_type

    model = kept[-1].eval()
    how = model.config._attn_implementation  # some versions load gemma2 with an attention that leaves its soft cap out
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype=torch.float32, attn_implementation=how, local_files_only=True
    )
    ids = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (each(input_ids=ids, use_cache=False).logits for each in (model, loaded))
        base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", local_files_only=True)
        before = base(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 0.1  # something was cut
    written = loaded.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert written.shape == (2, 26)
    assert written.max() < VOCABULARY + 4

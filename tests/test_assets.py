"""The embedded base, and what the demo promises of it, in a run of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from bases import losses, verify_here
from slimtune.models.load import load_config, load_model, load_tokenizer, locate, structure_of
from slimtune.pipeline import tune
from slimtune.recipe import load
from slimtune.sections import ModelConfig

BASE = ModelConfig(path="builtin:base-10m")
DEMO = Path(__file__).parent.parent / "recipes" / "demo.yaml"


def test_the_base_is_small_and_stored_in_bf16() -> None:
    folder = Path(locate(BASE.path)[0])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {each.get_dtype() for each in tensors.values()} == {"BF16"}
    structure = structure_of(load_config(BASE))
    assert 9e6 < structure.total_params < 11e6


def test_embeddings_are_under_a_quarter_and_fit_the_tokenizer() -> None:
    model, tokenizer = load_model(BASE, "cpu", torch.float32), load_tokenizer(BASE)
    embedding = model.get_input_embeddings().weight
    assert embedding.numel() < 0.25 * sum(parameter.numel() for parameter in model.parameters())
    assert len(tokenizer) <= embedding.shape[0]
    text = "The list is sorted in place: 3 < 5.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_card_of_the_base() -> None:
    text = (Path(locate(BASE.path)[0]) / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert f"{structure_of(load_config(BASE)).total_params:,}" in text


@pytest.mark.timeout(240)
def test_the_demo_keeps_its_promises_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.delivery.verify", verify_here)
    short = ["search.steps=4", "search.batch=2", "recover.steps=8", "train.batch=4"]
    figures = [
        "evaluate.every=0",
        "evaluate.search_every=null",
        "evaluate.windows=12",
        "evaluate.dense_lora=false",
        "data.max_length=128",
    ]
    summary = tune(load(DEMO, [*short, *figures, f"out={tmp_path / 'demo'}"]))
    assert abs(summary["result"]["parameters"] / summary["base"]["parameters"] - 0.6) <= 0.002
    assert summary["reload_difference"] < 1e-4
    assert len(losses(tmp_path / "demo")) == 12
    assert summary["result"]["ppl"] < 0.95 * summary["base"]["ppl"]
    assert summary["base"]["ppl"] < 60  # a base that was trained; random weights have the vocabulary's 6,144

"""Gradients of leaf masks are the same with and without checkpointing, and are the slopes of the loss; turns alternate."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from gated import random_model
from parity.worker import CHECKPOINTING, Alternation, differences
from slimtune.models.modes import quiet
from slimtune.models.surgery import blocks_of


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "phi", "gemma2", "gemma3_text"])
def test_checkpointing_changes_nothing(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    plain = Alternation(accelerator, name, "none").turns()
    assert max(float(value.abs().max()) for value in plain["gradients_0"].values()) > 1e-3
    assert differences({"gradients_0": plain["gradients_1"]}, plain, "gradients_0") > 1e-3, "adapt had no effect"
    for checkpointing in CHECKPOINTING[1:]:
        other = Alternation(accelerator, name, checkpointing).turns()
        assert other["losses"] == plain["losses"]
        for key in ("gradients_0", "gradients_1", "lora"):
            assert differences(other, plain, key) <= 1e-7


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_blocks_are_recomputed_when_checkpointing_is_on(checkpointing: str) -> None:
    alternation = Alternation(Accelerator(cpu=True), "llama", checkpointing)
    calls = []
    for block in blocks_of(alternation.model, alternation.structure):
        block.mlp.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    alternation.decide()
    assert len(calls) == (3 if checkpointing == "none" else 6)


def test_leaf_gradients_agree_with_finite_differences() -> None:
    alternation = Alternation(Accelerator(cpu=True), "qwen3", "none")
    alternation.model.double()
    alternation.masks = {site: mask.double() for site, mask in alternation.masks.items()}
    gradients, _ = alternation.decide()
    for site in ((0, "kv_group"), (1, "ffn"), (2, "kv_group")):
        values = []
        for step in (1e-4, -1e-4):
            moved = {key: mask.clone() for key, mask in alternation.masks.items()}
            moved[site][1] += step
            alternation.bank.close(moved)
            with torch.no_grad():
                batch = alternation.parts[0]
                values.append(float(alternation.loss(batch)) / int((batch["labels"][:, 1:] != -100).sum()))
        # cross_entropy_sum computes in fp32, so the difference quotient is good to about 1e-3
        slope = (values[0] - values[1]) / 2e-4
        assert float(gradients[site][1]) == pytest.approx(slope, abs=3e-3)


def test_quiet_gives_back_what_it_took() -> None:
    model, _ = random_model("phi", rank=2, dropout=0.25, attention_dropout=0.5, resid_pdrop=0.125)
    model.train()
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    assert set(dropouts.values()) >= {0.25, 0.125}
    with quiet(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
        assert (attention.attention_dropout, model.training) == (0.0, True)
    assert attention.attention_dropout == 0.5
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert dropouts == {n: module.p for n, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}


def test_a_gate_off_the_models_path_is_an_error() -> None:
    alternation = Alternation(Accelerator(cpu=True), "llama", "none")
    alternation.masks[7, "ffn"] = torch.ones(96)
    with pytest.raises(RuntimeError, match="got no gradient"):
        alternation.decide()

"""A model in another state for a while, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No dropout and no parameter gradients inside: what a ``decide`` turn needs.

    The model stays in train mode, because activation checkpointing is only active there.
    """
    modules: list[Any] = list(model.modules())
    dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
    rates = [module.p for module in dropouts]
    # vars, because an attribute that a module lacks is looked for long, and a model has thousands of modules
    attention = [module for module in modules if isinstance(vars(module).get("attention_dropout"), float)]
    attention_rates = [module.attention_dropout for module in attention]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in dropouts:
        module.p = 0.0
    for module in attention:
        module.attention_dropout = 0.0
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
        for module, rate in zip(attention, attention_rates, strict=True):
            module.attention_dropout = rate
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def without_lora(model: PeftModel) -> Iterator[None]:
    """The base alone inside. What is trained stays so: PEFT switches LoRA's gradients on as it comes back."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)

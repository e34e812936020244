"""Tiny Mixtral models."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

_KEYS: dict[str, Any] = {
    "vocab_size": 6144,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_mixtral(**overrides: Any) -> PreTrainedModel:
    """A random fp32 model of two layers of five experts, two a word: 64 wide, 4 query and 2 KV heads of 24, experts of 96."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**{**_KEYS, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm in the wrong place
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("gate.weight"):  # routers that are sure: near ties would go either way
                parameter.mul_(10)
    return model


def write_mixtral(folder: Path, **overrides: Any) -> PreTrainedModel:
    """The same, saved as ``folder`` as anyone saves one, with the embedded base's tokenizer."""
    model = tiny_mixtral(**overrides)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(str(files("slimtune"))) / "assets" / "base-10m" / file, folder / file)
    return model

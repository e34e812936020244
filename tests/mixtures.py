"""Tiny models of stock classes with experts."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_KEYS: dict[str, Any] = {
    "vocab_size": 6144,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PARTED: dict[str, Any] = {  # as slimtune writes such a class
    "n_routed_experts": 5,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": True,
}
_OF_CLASS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "intermediate_size": 96},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 96, "norm_topk_prob": True},
    "glm4_moe": {**_PARTED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "dots1": _PARTED,
    "qwen2_moe": {"num_experts": 5, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
}


def tiny_sparse(model_type: str = "mixtral", **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of two layers of five experts, two a word: 64 wide, 4 query and 2 KV heads of 24, experts of 96."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_KEYS, **_OF_CLASS[model_type], **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):  # ones would hide a norm in the wrong place, zeros a bias
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("gate.weight"):  # routers that are sure: near ties would go either way
                parameter.copy_(torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def write_sparse(folder: Path, model_type: str = "mixtral", **overrides: Any) -> PreTrainedModel:
    """The same, saved as ``folder`` as anyone saves one, with the embedded base's tokenizer."""
    model = tiny_sparse(model_type, **overrides)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(str(files("slimtune"))) / "assets" / "base-10m" / file, folder / file)
    return model

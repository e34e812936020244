"""Tiny configurations of every supported family, for contract tests: seconds, not minutes, on one core."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that logits differ clearly between positions and a wrong cut cannot hide in the tolerance.
    "initializer_range": 0.1,
}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"attention_bias": True, "query_pre_attn_scalar": 16, "sliding_window": 16, "attn_implementation": "eager"}

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "phi": ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma": ("gemma", {"attention_bias": True}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "layer_types": _LAYER_TYPES}),
    "granite": (
        "granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
}

FAMILY_NAMES: tuple[str, ...] = tuple(_VARIANTS)
"""Every supported ``model_type``, and the variants ``llama-bias`` and ``llama-tied``."""


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A three-layer configuration: 64 wide, 4 query and 2 KV heads of 16, MLP 96, 97 words, 128 positions.

    Biases are on wherever the family has a switch, except in plain ``llama``.
    """
    name, extra = _VARIANTS[model_type]
    keys = {**_COMMON, **extra, **overrides}
    if keys["head_dim"] is None:  # as in the published configs of families that know no such key
        del keys["head_dim"]
    return AutoConfig.for_model(name, **keys)

"""The table of model families, and the families refused with the reason. No family name stands anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimtune.errors import UserError, nearest
from slimtune.structure.axes import CHANNEL, KEY, QUERY, Family, Linear, Structure, measure

_ATTENTION = (
    Linear("self_attn.q_proj", out=QUERY, rotary=True),
    Linear("self_attn.k_proj", out=KEY, rotary=True),
    Linear("self_attn.v_proj", out=KEY),
)
_GATED = (
    *_ATTENTION,
    Linear("self_attn.o_proj", into=QUERY),
    Linear("mlp.gate_proj", out=CHANNEL),
    Linear("mlp.up_proj", out=CHANNEL),
    Linear("mlp.down_proj", into=CHANNEL),
)
_PLAIN = (
    *_ATTENTION,
    Linear("self_attn.dense", into=QUERY),
    Linear("mlp.fc1", out=CHANNEL),
    Linear("mlp.fc2", into=CHANNEL),
)

_BIASES = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
_LLAMAS = ("mixtral", "glm4_moe")

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _GATED, note="optional biases", bias_keys=_BIASES, llama_block=True, experts=_LLAMAS, pairs=True),
        Family("mistral", _GATED, note="sliding window kept", llama_block=True, experts=_LLAMAS, pairs=True),
        Family("qwen2", _GATED, note="q/k/v biases", llama_block=True, experts=("qwen2_moe", "glm4_moe"), pairs=True),
        Family("qwen3", _GATED, note="per-head q/k norm", experts=("qwen3_moe", "dots1")),
        Family("phi", _PLAIN, note="parallel block, LayerNorm, biases, partial rotary"),
        Family("gemma", _GATED, note="tied head; one KV head in 2B: only the MLP is cut there"),
        Family("gemma2", _GATED, note="post-norms, soft caps (eager attention)", whole_heads=True),
        Family("gemma3_text", _GATED, note="post-norms, per-head q/k norm", whole_heads=True),
        Family("granite", _GATED, note="scaled residuals and logits", bias_keys=_BIASES),
    )
}

_EXPERTS = "its MLP is already a set of experts (fused 3-D parameters, not linears)"
_LATENT = "latent attention has no KV heads to remove"
_NORM = "its q/k norm runs over all heads at once, so removing a head changes the others"
_FUSED = "q, k and v (or gate and up) are one fused linear, which is not handled yet"
_VISION = "it is an image-and-text wrapper; export its text model first"

REFUSED: Mapping[str, str] = {
    "olmo2": _NORM,
    "olmo3": _NORM,
    "phi3": _FUSED,
    "glm": _FUSED,
    "glm4": _FUSED,
    "gpt_neox": _FUSED,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma3": _VISION,
    "gemma3n": "per-layer embeddings and activation sparsity tie its layers together",
}


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``. Raises UserError with the reason, or with the list of known families."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UserError(f"model_type {model_type!r} is refused: {REFUSED[model_type]}")
    raise UserError(
        f"model_type {model_type!r} is unknown.{nearest(model_type, FAMILIES)} Supported: {', '.join(FAMILIES)}; "
        "docs/add-a-family.md shows how to add one"
    )


def check_biases(family: Family) -> None:
    """Raise UserError where no config of this family can carry biases of the consumers that the base lacks."""
    if not family.bias_keys:
        raise UserError(
            f"a config of {family.model_type!r} has no key for biases of o_proj and down_proj, which flap's compensation "
            "needs; set twostage.compensate=false"
        )


def describe(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Structure:
    """The Structure of a model from its config (as a dict) and parameter shapes (tied parameters once).

    Raises:
        UserError: refused or unknown family, quantised weights, or shapes that do not match the table.
    """
    family = family_of(str(config.get("model_type")))
    if config.get("quantization_config"):
        raise UserError("quantised weights cannot be cut (quantization_config in config.json); give the original checkpoint")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return measure(family, shapes, int(head_dim))

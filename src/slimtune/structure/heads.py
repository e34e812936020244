"""Parts of attention heads: rotary pairs of q and k, and dimensions of values, alike in all heads of a layer.

ToMoE (arXiv 2501.15316), section 3.3: a layer keeps the same pairs (i, i + head_dim / 2) of q and k for all tokens; of the
values, and of what o_proj reads, every token has its own dimensions, by logits that a small module makes of its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.errors import UserError
from slimtune.structure.axes import KV_GROUP, LayerWidths, Structure

PAIR = "pair"
"""The axis of masks [head_dim / 2] on rotary pairs of q and k."""
VALUE = "value"
"""The axis of masks on value dimensions, one a token."""
STATE = 128
"""Width of what the module of a layer makes its logits of (as published)."""


def module_params(structure: Structure) -> int:
    """Parameters of one layer's module: W_x, u, the norm's two, W_a and b."""
    return STATE * structure.hidden + 3 * STATE + structure.head_dim * (STATE + 1)


def attention_params(structure: Structure, layer: LayerWidths, groups: int, pairs: int = 0, values: int = 0) -> int:
    """What a token uses of a layer's attention.

    Args:
        groups: KV groups that stay; pairs, values: of each head, by masks, where 0 stands for all, without a mask.
    """
    if not (pairs or values):
        return groups * layer.unit_params[KV_GROUP]
    turned = (pairs or structure.head_dim // 2) * layer.pair_params
    return turned + (values or structure.head_dim) * layer.value_params + (module_params(structure) if values else 0)


def check_pairs(structure: Structure, config: Mapping[str, Any], asked: str) -> None:
    """Raise UserError where rotary pairs cannot be left out one by one; ``asked``: the key that wants it, and its value."""
    family = structure.family
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if not family.pairs:
        reason = f"{family.model_type!r} models norm q and k, or do not turn whole heads in pairs (i, i + head_dim / 2)"
    elif share not in (None, 1, 1.0):
        reason = f"this model turns a part of {share} of every head"
    else:
        return
    raise UserError(f"{asked} leaves out rotary pairs of q and k, and {reason}; use moe.attention=groups")

"""A model laid out for vLLM's ``DeciLMForCausalLM``: Llama blocks whose KV heads and MLP differ by layer.

What vLLM 0.33 reads of the config stands in ``models.deci``. There the number of query heads is one for all layers. Ours are
cut by whole KV groups with their query heads, so a layer with fewer gets zero heads back, shared out over its KV heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from slimtune.errors import UserError
from slimtune.export.gguf_layout import Widths
from slimtune.models.deci import DeciConfig, DeciLMForCausalLM
from slimtune.structure.axes import Family
from slimtune.structure.families import FAMILIES

ELSEWHERE = "leave out --form deci: vLLM's Transformers backend reads this model too"
_LEFT = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "pretraining_tp")
"""Keys of windows, which there are none of here, and of a sharding that transformers no longer has."""


def check(config: PreTrainedConfig, family: Family) -> None:
    """Raise UserError where vLLM's class would compute something else."""
    if not family.llama_block:
        fit = ", ".join(name for name, each in FAMILIES.items() if each.llama_block)
        raise UserError(f"--form deci is for the blocks of {fit}; this is a {family.model_type!r}: {ELSEWHERE}")
    if (act := config.hidden_act) != "silu":
        raise UserError(
            f"--form deci: vLLM computes these blocks with silu, and this model has hidden_act={act!r}; {ELSEWHERE}"
        )
    window = getattr(config, "sliding_window", None)
    if (kinds := getattr(config, "layer_types", None)) and "sliding_attention" not in kinds:
        window = None
    if window and window < config.max_position_embeddings:
        raise UserError(f"--form deci has no sliding windows, and this model has sliding_window={window}; {ELSEWHERE}")


def widths_for(given: Sequence[Widths]) -> list[Widths]:
    """The widths of every layer there: one number of query heads, KV heads that divide it, MLP widths as they are.

    Of all numbers of query heads the one that needs the fewest heads in all, for q, k, v and o cost the same by the head.
    """
    groups = [(max(each.kv_heads, 1), max(1, each.heads // max(each.kv_heads, 1))) for each in given]
    least = max(kv_heads * group for kv_heads, group in groups)
    options = []
    for heads in range(least, 2 * least):
        kv = [_divisor(heads, *each) for each in groups]
        if all(kv):
            options.append((heads * len(given) + sum(kv), heads, kv))
    _, heads, kv = min(options)
    return [Widths(heads, kv_heads, max(each.mlp, 1)) for kv_heads, each in zip(kv, given, strict=True)]


def _divisor(heads: int, kv_heads: int, group: int) -> int:
    """The least divisor of ``heads`` that is at least ``kv_heads`` and leaves each ``group`` query heads or more; else 0."""
    return next((number for number in range(kv_heads, heads // group + 1) if heads % number == 0), 0)


def config_of(keys: Mapping[str, Any], widths: Sequence[Widths], weights: Mapping[str, Tensor]) -> DeciConfig:
    """The config of these ``weights``, which are as wide as ``widths`` say. ``keys``: of the family's own config."""
    blocks = [
        {
            "attention": {"no_op": False, "n_heads_in_group": each.heads // each.kv_heads},
            "ffn": {"no_op": False, "intermediate_size": each.mlp},
        }
        for each in widths
    ]
    biased = {name.rsplit(".", 2)[-2] for name in weights if name.endswith("_proj.bias")}
    own = {
        "num_attention_heads": widths[0].heads,
        # vLLM reads neither of these; whoever wants one number for all layers gets the largest
        "num_key_value_heads": max(each.kv_heads for each in widths),
        "intermediate_size": max(each.mlp for each in widths),
        "sliding_window": None,
        "attention_bias": "o_proj" in biased,
        "qkv_bias": "q_proj" in biased,
        "mlp_bias": "down_proj" in biased,
    }
    found = DeciConfig(block_configs=blocks, **{**{key: value for key, value in keys.items() if key not in _LEFT}, **own})
    found.architectures = [DeciLMForCausalLM.__name__]
    return found

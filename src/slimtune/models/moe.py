"""A dense model's weights laid out as those of a stock class of sparse experts: slices of its MLPs, and a router a layer.

Exact: a token's experts add what the dense MLP adds with all other channels at zero. Where the class's weights of the chosen
experts add up to one and not to ``top_k``, down projections are multiplied by that, a power of two.
Shapes: D hidden size, E experts, F mlp channels, W channels of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimtune.errors import UserError
from slimtune.models import value_masks
from slimtune.models.load import meta_shapes
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.experts import Host, host_of
from slimtune.structure.heads import STATE
from slimtune.structure.plan import Plan

_CARRIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class Layout:
    """Of every layer in a file: ``shared`` is the width of the shared expert in those of a routed one, ``groups`` KV heads.

    ``values``: dimensions of values that a token has, where masks of single tokens leave it fewer.
    """

    number: int
    top_k: int
    width: int
    shared: int
    groups: int
    values: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        """As wide as the widest expert of any layer; narrower ones are filled up with zeros."""
        width = max(division.width for division in plan.experts)
        first, groups = plan.experts[0], len(plan.kept[0][KV_GROUP])
        return cls(len(first.routed), plan.top_k, width, len(first.shared) // width, groups, plan.values)


def config_of(base: PreTrainedConfig, structure: Structure, layout: Layout) -> PreTrainedConfig:
    """The config of a model whose MLPs are experts: stock, but for masks of single tokens on values.

    Raises:
        UserError: no stock class computes what such a base does.
    """
    host, raw = host_of(structure.family, layout.shared > 0), base.to_dict()
    names = meta_shapes(base)
    keys = {key: raw[key] for key in _CARRIED if key in raw}
    keys |= {key: raw[key] for key in _WINDOWS if host.windows and key in raw}
    keys |= {**host.keys, **host.aside, **{key: getattr(layout, name) for key, name in host.counted.items()}}
    keys |= {"num_experts_per_tok": layout.top_k, "head_dim": structure.head_dim, "use_cache": True}
    keys |= {"num_attention_heads": layout.groups * structure.group, "num_key_value_heads": layout.groups}
    keys["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    if "intermediate_size" not in host.counted:  # of dense layers, of which there are none: the base's says more than a default
        keys["intermediate_size"] = raw["intermediate_size"]
    if host.score == "sigmoid":
        keys["routed_scaling_factor"] = float(layout.top_k)
        keys["rope_parameters"] = {**(keys.get("rope_parameters") or {}), "partial_rotary_factor": 1.0}
    if raw.get("sliding_window") and raw.get("use_sliding_window", True) and not host.windows:
        raise UserError(
            f"{host.model_type}, the class with a shared expert, has no sliding window, and this model has one of "
            f"{raw['sliding_window']}; set moe.shared=false"
        )
    config: PreTrainedConfig = AutoConfig.for_model(host.model_type, **keys)
    ours, theirs = _besides(names, structure, "mlp."), _besides(meta_shapes(config), structure, f"{host.module}.")
    if ours != theirs or any(".mlp." in name and name.endswith(".bias") for name in names):
        differ = sorted(ours ^ theirs) or ["biases of the MLP"]
        raise UserError(
            f"{host.model_type}, the stock class for such experts, and this {base.model_type!r} model differ in {differ[0]}; "
            "use method=atp, which keeps what the model has"
        )
    if layout.values:
        if host.model_type not in value_masks.CONFIGS:
            raise UserError(f"{host.model_type} has no form with masks of single tokens on values; use moe.attention=groups")
        stock = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}
        config = value_masks.CONFIGS[host.model_type](**stock, value_dims=layout.values, value_mask_size=STATE)
        value_masks.register()
    stock_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[host.model_type]  # by which other software knows the class
    config.architectures = [f"Slimtune{stock_name}" if layout.values else stock_name]
    return config


def _besides(names: Iterable[str], structure: Structure, block: str) -> set[str]:
    """All but those of the MLPs or experts."""
    return {name for name in names if f".{block}" not in name.removeprefix(structure.family.blocks)}


@torch.no_grad()
def tensors_of(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    routers: Sequence[Tensor],
    modules: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Weights of the class, by their names in its files; rows of q and k of rotary pairs that go are zero.

    Args:
        model: the dense one, LoRA merged.
        routers: of each layer [E, D].
        modules: of masks on values, by layer and name (``TokenMasks.tensors``), where the plan has such.
    """
    host, linears = host_of(structure.family, bool(plan.experts[0].shared)), structure.family.linears
    mlp = [row.path for row in linears if FFN in (row.out and row.out.axis, row.into and row.into.axis)]
    weights: dict[str, Tensor] = dict(model.named_parameters())  # tied ones once
    found = {name: tensor for name, tensor in weights.items() if not any(f".{path}." in name for path in mlp)}
    like = next(iter(weights.values()))
    for name, tensor in (modules or {}).items():
        place, _, leaf = name.partition(".")
        found[f"{structure.family.blocks}.{place}.self_attn.value_mask.{leaf}"] = tensor.to(like)
    for layer in range(len(plan.experts)):
        prefix = f"{structure.family.blocks}.{layer}."
        if plan.pairs:
            found |= _without_pairs(found, prefix, structure, plan.pairs[layer])
        parts = {path: weights[f"{prefix}{path}.weight"] for path in mlp}
        found |= {f"{prefix}{name}": tensor for name, tensor in _layer(parts, plan, layer, host).items()}
        gate = f"{prefix}{host.block}.gate"
        found[f"{gate}.weight"] = routers[layer].to(next(iter(parts.values())))
        if host.score == "sigmoid":
            found[f"{gate}.e_score_correction_bias"] = torch.zeros(len(routers[layer]))
        if host.idle:
            found[f"{prefix}{host.idle_gate}.weight"] = torch.zeros_like(found[f"{gate}.weight"][:1])
    return found


def _without_pairs(weights: Mapping[str, Tensor], prefix: str, structure: Structure, kept: Sequence[int]) -> dict[str, Tensor]:
    """q and k of a layer, rows and biases of all pairs but the ``kept`` at zero, in all heads."""
    half = structure.head_dim // 2
    gone = torch.ones(structure.head_dim, dtype=torch.bool)
    gone[[index + side for index in kept for side in (0, half)]] = False
    found = {}
    for path in (f"{prefix}{row.path}" for row in structure.family.linears if row.rotary):
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in weights:
                own = weights[name]
                rows = gone.to(own.device).repeat(len(own) // len(gone))
                found[name] = own.masked_fill(rows if own.ndim == 1 else rows[:, None], 0.0)
    return found


def _layer(parts: Mapping[str, Tensor], plan: Plan, layer: int, host: Host) -> dict[str, Tensor]:
    """Tensors of the experts of a layer; ``parts``: gate [F, D], up [F, D] and down [D, F] by path, in that order."""
    division, width = plan.experts[layer], Layout.of(plan).width
    gate, up, down = parts.values()
    found: dict[str, Tensor] = {}
    scale = plan.top_k if host.score == "softmax" else 1
    places = [(f"{host.block}.experts.{number}", channels) for number, channels in enumerate(division.routed)]
    for place, channels in places:
        sliced = _sliced(gate, up, down * scale if scale != 1 else down, channels, width)
        found |= {f"{place}.{name}.weight": tensor for name, tensor in zip(host.linears, sliced, strict=True)}
    if division.shared or host.idle:
        sliced = _sliced(gate, up, down, division.shared, len(division.shared) or host.idle)
        found |= {f"{host.shared}.{name}.weight": tensor for name, tensor in zip(host.linears, sliced, strict=True)}
    return found


def _sliced(gate: Tensor, up: Tensor, down: Tensor, channels: Sequence[int], width: int) -> list[Tensor]:
    """Rows of gate and up and columns of down, filled up with zeros to ``width``."""
    index = torch.tensor(channels, device=gate.device, dtype=torch.long)
    found = [gate.index_select(0, index), up.index_select(0, index), down.index_select(1, index)]
    if missing := width - len(index):
        found = [
            nn.functional.pad(each, pad) for each, pad in zip(found, ((0, 0, 0, missing),) * 2 + ((0, missing),), strict=True)
        ]
    return [each.contiguous() for each in found]

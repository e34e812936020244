"""Masks inside heads, hung into a model: on rotary pairs of q, and one a token on values and on what o_proj reads.

A zero entry of q makes the entry of k that it is multiplied with irrelevant, before and after both are turned, so q alone is
masked. Shapes: B batch, T tokens, h head_dim; the mask of pairs is [h / 2], that of values [B, T, h], the same in all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.models.surgery import blocks_of, linears_of
from slimtune.structure.axes import KV_GROUP, QUERY, Structure
from slimtune.structure.heads import PAIR, VALUE

ReadHead = Callable[[int, str], Tensor | None]
"""(layer, axis) -> the current mask, or None for none."""


def place_head_masks(model: nn.Module, structure: Structure, read: ReadHead) -> list[Any]:
    """Hang the masks into a model, after LoRA is attached: they mask its output, too. Handles to remove."""
    handles = []
    for layer, row, module in linears_of(model, structure):
        if row.rotary and row.out == QUERY:
            handles.append(module.register_forward_hook(_of_pairs(layer, read)))
        elif row.out and row.out.axis == KV_GROUP and not row.rotary:
            handles.append(module.register_forward_hook(_of_values(layer, read)))
        elif row.into and row.into.axis == KV_GROUP:
            handles.append(module.register_forward_pre_hook(_of_queries(layer, read)))
    return handles


def attend_before(model: nn.Module, structure: Structure, layers: range, inside: Callable[[], Any]) -> list[Any]:
    """Let attention of ``layers`` compute once more before it does, in the context ``inside()``. Handles to remove.

    For passes without a cache, which would hold the keys twice.
    """
    path, handles = structure.family.consumer(KV_GROUP).path.rpartition(".")[0], []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with inside():
            module.forward(*args, **kwargs)

    for layer, block in enumerate(blocks_of(model, structure)):
        if layer in layers:
            handles.append(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _of_pairs(layer: int, read: ReadHead) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        mask = read(layer, PAIR)
        return None if mask is None else times_heads(output, torch.cat([mask, mask]))

    return hook


def _of_values(layer: int, read: ReadHead) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        mask = read(layer, VALUE)
        return None if mask is None else times_heads(output, mask)

    return hook


def _of_queries(layer: int, read: ReadHead) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = read(layer, VALUE)
        return None if mask is None else (times_heads(args[0], mask), *args[1:])

    return hook


def times_heads(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` [B, T, heads * h] with every head times ``mask`` [h] or [B, T, h]."""
    heads = x.unflatten(-1, (-1, mask.shape[-1]))
    return (heads * mask.unsqueeze(-2).to(x.dtype)).flatten(-2)

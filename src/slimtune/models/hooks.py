"""Gates, hung into a model.

A mask sits in front of the consumer of each axis (``o_proj``: one number per KV group; ``down_proj``: one per channel).
Zeroing a consumer's input equals deleting the producers' rows and the consumer's columns, biases included, so the masked
model and the cut one agree to float error for any mask.
Shapes: B batch, T tokens, K KV groups, F mlp channels; a mask is [K] or [F], or [B, K] or [B, F] for one mask a sample, or
[B, T, K] or [B, T, F] for one a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.models.surgery import linears_of, producers_of
from slimtune.structure.axes import Side, Structure

ReadMask = Callable[[int, str], Tensor | None]
"""(layer, axis) -> the current mask [units], or None for an open gate."""


class Innovation(Protocol):
    """Of a consumer's d inputs: ``residual`` [d, d] or [d], ``kept`` boolean [d]; see ``prune.gates``."""

    @property
    def residual(self) -> Tensor: ...

    @property
    def kept(self) -> Tensor: ...


ReadInnovation = Callable[[int, str], Innovation | None]
"""(layer, axis) -> by what part of the input the mask's gradient is taken, or None: by all of it."""


def place_gates(
    model: nn.Module,
    structure: Structure,
    consumer: ReadMask,
    base: ReadMask,
    innovation: ReadInnovation | None = None,
    follow: Callable[[int, str, Tensor], None] | None = None,
) -> list[Any]:
    """Hang gates into a model; call after LoRA is attached (hooks set before land inside the wrapper).

    Args:
        consumer: masks the input of each axis's consumer: covers base and LoRA alike (``hard``).
        base: masks the *base* output of each axis's producers and leaves their LoRA branch free (``lora_aware``).
        innovation: by which part of its input a consumer mask's gradient is taken; None: by all of it.
        follow: told of (layer, axis, what the axis's producers read) before ``consumer`` is asked: masks may depend on it.

    Returns:
        Handles; ``handle.remove()`` takes a gate out.
    """
    handles = []
    for layer, row, module in linears_of(model, structure):
        if row.into:
            handles.append(module.register_forward_pre_hook(_gate_input(structure, layer, row.into, consumer, innovation)))
        if row.out:
            inner = module.base_layer if isinstance(module, LoraLayer) else module
            handles.append(inner.register_forward_hook(_gate_output(structure, layer, row.out, base)))
    for layer, axis, module in producers_of(model, structure) if follow else ():
        see = partial(cast(Any, follow), layer, axis)
        handles.append(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
    return handles


def _gate_input(
    structure: Structure, layer: int, side: Side, read: ReadMask, innovation: ReadInnovation | None
) -> Callable[..., Any]:
    rows = structure.rows(side)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = read(layer, side.axis)
        if mask is None:
            return None
        spread = _spread(mask, rows, args[0])
        own = innovation(layer, side.axis) if innovation else None
        return (args[0] * spread if own is None else _compensated(args[0], spread, own), *args[1:])

    return hook


def _compensated(x: Tensor, mask: Tensor, own: Innovation) -> Tensor:
    """The gated input of a consumer whose weight compensates for the units that are not kept.

    A unit that comes back brings its innovation only, for the rest is in the weight already. One that goes is judged by its
    innovation too, for the rest would be taken over; until the masks are solved for again the sample goes without all of it.
    """
    fixed = mask.detach()
    if own.residual.ndim == 1:  # no other input is needed, and no more than one multiplication
        share = own.residual.to(x.dtype)
        return x * torch.where(own.kept, fixed + (mask - fixed) * share, share * mask)
    residual = x @ own.residual.to(x.dtype).T
    return torch.where(own.kept, x * fixed + (mask - fixed) * residual.detach(), residual * mask)


def _gate_output(structure: Structure, layer: int, side: Side, read: ReadMask) -> Callable[..., Any]:
    rows = structure.rows(side)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        mask = read(layer, side.axis)
        return None if mask is None else output * _spread(mask, rows, output)

    return hook


def _spread(mask: Tensor, rows: int, like: Tensor) -> Tensor:
    mask = mask if rows == 1 else mask.repeat_interleave(rows, dim=-1)
    return (mask[:, None, :] if mask.ndim == 2 else mask).to(like.dtype)

"""What a linear's frozen weight is: a plain parameter, or one in 4 bits with its *original* beside it in host memory.

Whoever reads or changes such a weight does it by these functions and need not know which it is. nf4 with double quantisation:
4 bits a weight, an 8-bit scale for 64 weights, an fp32 scale for 256 of those (Dettmers et al. 2023, sections 2 and 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Weights that share a scale."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * 256)
"""Of a quantised weight, its share of the scales included."""


def is_quantized(weight: Any) -> bool:
    """Whether ``quantize`` made it."""
    return hasattr(weight, "original")


def quantize(weight: Tensor, device: torch.device | str) -> nn.Parameter:
    """A frozen parameter in 4 bits on ``device``; ``weight`` [out, in] stays in host memory as its original."""
    from bitsandbytes.nn import Params4bit  # costs seconds, and not all have it

    data, state = _in_4_bits(weight.to(device))
    parameter: Any = Params4bit(data, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True)
    parameter.original = weight.detach().cpu()
    made: nn.Parameter = parameter
    return made


def _in_4_bits(weight: Tensor) -> tuple[Tensor, Any]:
    """Packed numbers, and bitsandbytes' state of their scales."""
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return data, state


def dense(weight: Tensor) -> Tensor:
    """The weight [out, in] on the parameter's device; of a quantised one its original, not what 4 bits made of it."""
    original = getattr(weight, "original", None)
    return weight.detach() if original is None else original.to(weight.device, non_blocking=True)


def form_of(weight: Any) -> Tensor:
    """What ``dense`` gives, on the meta device; of a sharded one the whole."""
    entire = getattr(weight, "original", weight)
    return torch.empty(entire.shape, dtype=entire.dtype, device="meta")


def like(weight: Tensor, value: Tensor) -> nn.Parameter:
    """A new parameter of another value [out, in], which may be smaller; quantised where ``weight`` is."""
    if is_quantized(weight):
        return quantize(value, weight.device)
    return nn.Parameter(value, requires_grad=weight.requires_grad)


def held(weight: Any) -> list[Tensor]:
    """The tensors that a frozen parameter computes with, to be copied from and into: it is what they are."""
    return _tensors(weight.data, weight.quant_state) if is_quantized(weight) else [weight.detach()]


def _tensors(data: Tensor, state: Any) -> list[Tensor]:
    return [data, state.absmax, state.offset, state.state2.absmax]


@torch.no_grad()
def put_back(weight: Tensor, tensors: Sequence[Tensor]) -> None:
    """Let a parameter compute with what it ``held`` before, wherever that was kept."""
    for present, tensor in zip(held(weight), tensors, strict=True):
        present.copy_(tensor, non_blocking=True)


@torch.no_grad()
def put(weight: Any, value: Tensor) -> None:
    """Let a parameter compute with ``value`` [out, in], quantised where it is; its original stays."""
    if is_quantized(weight):
        put_back(weight, _tensors(*_in_4_bits(value.to(weight.device, weight.original.dtype))))
    else:
        weight.data.copy_(value)


def put_original(weight: Any, value: Tensor) -> None:
    """Let a cut be made of ``value`` [out, in]; what a quantised parameter computes with stays."""
    weight.original = value.to("cpu", weight.original.dtype)

"""Tensors that wait in host memory for the GPU to want them."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_on(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on ``device``. From a GPU to host memory it is page-locked, which makes the way back ten times faster."""
    if device.type != "cpu" or not tensor.is_cuda:
        return tensor.to(device, copy=True)
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # a system may lend less of such memory than a model takes
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
    return host.copy_(tensor)

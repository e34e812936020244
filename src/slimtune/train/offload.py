"""Tensors that wait in host memory for the GPU to want them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def kept_on(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on ``device``. From a GPU to host memory it is page-locked, which makes the way back several times as fast."""
    if device.type != "cpu" or not tensor.is_cuda:
        return tensor.to(device, copy=True)
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # a system may lend less of such memory than a model takes
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
    return host.copy_(tensor)


def brought(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each tensor on ``device``; out of page-locked memory the next one is on its way while one is worked on."""
    if device.type != "cuda":
        yield from (tensor.to(device) for tensor in tensors)
        return
    stream, waiting = torch.cuda.Stream(device), list[tuple[Tensor, torch.cuda.Event]]()
    for tensor in tensors:
        with torch.cuda.stream(stream):
            waiting.append((tensor.to(device, non_blocking=True), stream.record_event()))
        if len(waiting) > 1:
            yield _arrived(*waiting.pop(0))
    for last in waiting:
        yield _arrived(*last)


def _arrived(tensor: Tensor, event: torch.cuda.Event) -> Tensor:
    """A copy of another stream, for the present one to use: its memory is not given away before this one is done with it."""
    present = torch.cuda.current_stream(tensor.device)
    present.wait_event(event)
    tensor.record_stream(present)
    return tensor

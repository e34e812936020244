"""Tensors that wait in host memory for the GPU to want them."""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

THREADS = 8
"""That fetch the system's pages; more are not faster."""


def kept_on(device: torch.device, tensor: Tensor, room: Tensor | None = None) -> Tensor:
    """A copy on ``device``. From a GPU to host memory it is page-locked, which makes the way back several times as fast.

    Args:
        device: where.
        tensor: of any device.
        room: what an earlier copy of such a tensor is in, and this one may be written over.
    """
    if room is not None and room.device == device and (room.shape, room.dtype) == (tensor.shape, tensor.dtype):
        return room.copy_(tensor)
    if device.type != "cpu" or not tensor.is_cuda or not tensor.numel():
        return tensor.to(device, copy=True)
    return locked(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def locked(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """New host memory, page-locked for the GPU ``device``; where the system lends no more of such, it is as any other.

    torch's own way (``pin_memory``) rounds up to powers of two, keeps what was given back, and leaves fetching all pages to one
    thread of the driver, which takes several times as long (benchmarks/locking.py).
    """
    shape = tuple(shape)
    count = math.prod(shape) * dtype.itemsize
    pages = _pages(count)
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # not torch's own, of which launchers leave a process one
        list(pool.map(Tensor.zero_, flat.chunk(threads)))
    _lock(pages, flat, device)
    return flat.view(dtype).view(shape)


def _pages(count: int) -> mmap.mmap:
    """Memory of ``count`` bytes whose pages are not there yet."""
    if sys.platform != "linux":
        return mmap.mmap(-1, count)
    found = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what may be shared is fetched more slowly
    found.madvise(mmap.MADV_DONTFORK)  # a child would be given a copy of all that is locked
    return found


def _lock(pages: mmap.mmap, flat: Tensor, device: torch.device) -> None:
    """Lock ``pages``, which ``flat`` and its views hold, until the last of those has gone."""
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:
            weakref.finalize(pages, _unlock, flat.data_ptr(), device).atexit = False
            return
        try:  # the driver remembers a refusal, and tells whoever asks next
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
        except RuntimeError:
            pass


def _unlock(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be on its way
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


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

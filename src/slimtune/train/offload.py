"""Tensors that wait in host memory for the GPU to want them."""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

THREADS = 8
"""That fetch the system's pages."""
SMALL = 1 << 24
"""Bytes that one thread fetches before another would have begun."""


def kept_on(device: torch.device, tensor: Tensor, room: Tensor | None = None) -> Tensor:
    """A copy on ``device``. From a GPU to host memory it is page-locked, which makes the way back several times as fast.

    Args:
        device: where.
        tensor: of any device.
        room: what an earlier copy of such a tensor on ``device`` is in, and this one may be written over.
    """
    if room is not None and (room.shape, room.dtype) == (tensor.shape, tensor.dtype):
        return room.copy_(tensor)
    if device.type != "cpu" or not tensor.is_cuda:
        return tensor.to(device, copy=True)
    return locked(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def locked(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """New host memory, page-locked for the GPU ``device``; where the system lends no more of such, it is as any other.

    torch's own way (``pin_memory``) rounds up to powers of two, keeps what was given back, and leaves fetching all pages to one
    thread of the driver, which takes several times as long (docs/RESULTS.md, "Host memory that is page-locked").
    """
    shape = tuple(shape)
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    pages = _mapped(count)
    _fetch(pages, count)
    # finalised before its memory goes, which an mmap itself would not be
    holder = memoryview(pages)
    _lock(holder, pages, count, device)
    return torch.frombuffer(holder, dtype=torch.uint8).view(dtype).view(shape)


def _mapped(count: int) -> mmap.mmap:
    """Memory of ``count`` bytes whose pages are not there yet."""
    if sys.platform != "linux":
        return mmap.mmap(-1, count)
    found = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found.madvise(mmap.MADV_DONTFORK)  # a child would be given a copy of all that is locked
    with suppress(OSError):  # a kernel may have been made without
        found.madvise(mmap.MADV_HUGEPAGE)  # large pages are fetched and locked in less than half the time
    return found


def _fetch(pages: mmap.mmap, count: int) -> None:
    """Have the system give all of ``pages``."""
    one = np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE]  # a byte of each

    def fetch(part: Any) -> None:
        part[:] = 0

    threads = min(THREADS, os.cpu_count() or 1)
    if count <= SMALL or threads == 1:
        fetch(one)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fetch, np.array_split(one, threads)))


def _lock(holder: memoryview, pages: mmap.mmap, count: int, device: torch.device) -> None:
    """Lock ``pages`` for as long as there is ``holder``."""
    address = np.frombuffer(pages, dtype=np.uint8).ctypes.data
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(address, count, 0)):
            _forget_refusal(device)
        else:
            weakref.finalize(holder, _unlock, pages, address, device, os.getpid()).atexit = False


def _unlock(pages: mmap.mmap, address: int, device: torch.device, owner: int) -> None:
    """Unlock ``pages``, which are held until this is done."""
    if os.getpid() != owner:
        return
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        try:
            torch.cuda.synchronize(device)  # a copy may be on its way
        finally:
            if int(runtime.cudaHostUnregister(address)):
                _forget_refusal(device)


def _forget_refusal(device: torch.device) -> None:
    """The driver remembers what it refused, and tells whoever asks next."""
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        pass


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

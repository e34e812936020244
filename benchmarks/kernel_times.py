"""Which kinds of kernels a GPU's time goes to, for the scripts beside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "attention": ("flash", "fmha", "attention"),
    "loss": ("softmax", "nll"),
    "solves": ("potrf", "potri", "trsm", "getrf", "syrk", "cusolver", "trtri", "lauum"),
    "copies": ("copy", "memcpy", "memset", "cat", "fill"),
    "optimiser": ("multi_tensor", "adam", "foreach"),
}
"""Kinds of kernels by parts of their names; what is none of them goes over elements."""


@contextmanager
def looked_at(name: str) -> Iterator[None]:
    """Print which kinds of kernels the GPU's time goes to, and the longest single ones."""
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    begun = time.perf_counter()
    with profile(activities=kinds, acc_events=True) as prof:
        yield
        torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    events = [event for event in prof.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    sums = dict.fromkeys((*KINDS, "elements"), 0.0)
    for event in events:
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts)), "elements")
        sums[kind] += event.self_device_time_total / 1e6
    print(f"-- {name}: {whole:.3f} s, of which the GPU works {sum(sums.values()):.3f}")
    print("   " + ", ".join(f"{kind} {value:.3f}" for kind, value in sums.items() if value > 5e-4))
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:12]:
        print(f"   {event.self_device_time_total / 1e6:8.4f} s {event.count:6d} x {event.key[:110]}")

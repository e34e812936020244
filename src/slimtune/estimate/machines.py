"""What a device does in a second, by its data sheet or timed just now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimtune.errors import UserError, nearest


@dataclass(frozen=True)
class Machine:
    """Rates that a run attains.

    Attributes:
        name: of the device.
        matmul: operations a second of products in the compute dtype.
        exact: the same in fp32, of solves.
        copied: bytes of device memory, read and written, a second; None where no time is counted for them.
        link: bytes a second from page-locked host memory; None likewise.
        host: bytes a second that new host memory is filled with; None likewise.
        block: seconds in which the host launches a block's forward pass; None likewise.
        graph: seconds in which it compiles blocks of one pair of widths; None likewise.
        memory: bytes of the device; None where it is not told.
        told: how the rates were had.
    """

    name: str
    matmul: float
    exact: float
    copied: float | None = None
    link: float | None = None
    host: float | None = None
    block: float | None = None
    graph: float | None = None
    memory: int | None = None
    told: str = ""


SHEETS: dict[str, tuple[float, float, float, float, int]] = {
    "a100": (312, 19.5, 2.04, 32, 80),
    "a100-40gb": (312, 19.5, 1.56, 32, 40),
    "h100": (989, 67, 3.35, 64, 80),
    "h200": (989, 67, 4.8, 64, 141),
    "b200": (2250, 75, 8.0, 64, 180),
    "l40s": (362, 91.6, 0.864, 32, 48),
    "a10": (125, 31.2, 0.6, 32, 24),
    "rtx-3090": (71, 35.6, 0.936, 32, 24),
    "rtx-4090": (165, 82.6, 1.008, 32, 24),
}
"""Data sheets: TFLOP/s of dense bf16 products and of fp32, TB/s of device memory, GB/s of the link one way, GB of memory."""
ATTAINED = {"matmul": 0.69, "exact": 0.44, "copied": 0.83, "link": 0.8}
"""Parts of a data sheet that training reaches: products and memory as ``benchmarks/cost.py --profile`` found on an H200, fits
(``exact``) by ``solves_seconds`` of docs/results/cost.json; ``link`` is taken, not measured."""
FILLED = 2.5e9
"""Bytes a second of host memory that is new and mostly page-locked: between 1.8e9 and 4e9 on two hosts where torch locked it,
by what ``moments_seconds`` of docs/results/cost.json leave beside the arithmetic of the passes. Rather too few, as freeze and
cut are not counted: on an H200's host, where slimtune did, at least 6.3e9 (32 layers of docs/results/growth.json)."""
BLOCK = 0.005
"""Seconds of Python and launches in a block's forward pass, with LoRA: by recovery steps and decide turns of 4 windows on 8
layers in docs/results/growth.json as it was at bf76c42, on an H100's host."""
GRAPH = 5.0
"""Seconds in which blocks of one pair of widths are compiled on a GPU's host: what the row ``compiled, a graph a width`` of
docs/results/cost.json took beside its steps, over its 32 layers. Nothing is taken to be on disk from an earlier run."""
SYMBOLIC = 45.0
"""Of symbolic widths, for all blocks: 26, 30 and 51 on three hosts (docs/RESULTS.md). Rather too many: a run that compiles in
vain takes longer."""
FIRST_GRAPH = 30.0
"""The least: what two graphs of symbolic widths took beyond eager layers' first step, 26 s in docs/results/compiling.json and
32 on another host (no row kept)."""
OF_TIMED = {"cpu": 0.5, "cuda": 0.9}
"""Part that training reaches of a large product's rate, timed just now."""


def sheet_of(device: str) -> str | None:
    """By which name of ``SHEETS`` a device is known that calls itself ``device``; a slice or a laptop's has another sheet."""
    words = set(device.lower().replace("-", " ").split())
    if words & {"mig", "laptop", "max"}:
        return None
    return max((name for name in SHEETS if words.issuperset(name.split("-"))), key=len, default=None)


def present(device: torch.device, dtype: torch.dtype, measured: Machine | None = None) -> Machine:
    """This machine: by its data sheet where that is known, which takes no time, else as ``measured``, or timed now."""
    sheet = sheet_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return named(sheet, dtype) if sheet else measured or timed(device.type, dtype)


def named(name: str, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """A GPU by its data sheet, of products in ``dtype``. Raises UserError for one that is not in the table."""
    if name not in SHEETS:
        raise UserError(f"--gpu {name!r} is unknown.{nearest(name, SHEETS)} Known: {', '.join(sorted(SHEETS))}")
    matmul, exact, copied, link, memory = SHEETS[name]
    return Machine(
        name,
        (exact if dtype == torch.float32 else matmul) * 1e12 * ATTAINED["matmul"],
        exact * 1e12 * ATTAINED["exact"],
        copied * 1e12 * ATTAINED["copied"],
        link * 1e9 * ATTAINED["link"],
        FILLED,
        BLOCK,
        GRAPH,
        memory * 10**9,
        f"the data sheet of an {name}, of which training attains {ATTAINED['matmul']:.0%}",
    )


def timed(kind: str, dtype: torch.dtype) -> Machine:
    """This machine, by products of large matrices (and, on a GPU, copies), each timed for half a second."""
    part, rate = OF_TIMED[kind], _product_rate(kind, dtype)
    exact = rate if dtype == torch.float32 else _product_rate(kind, torch.float32)
    told = f"{rate / 1e9:,.0f} GFLOP/s of a matmul timed just now, of which training is taken to attain {part:.0%}"
    if kind == "cpu":
        return Machine("cpu", rate * part, exact * part, told=told)
    return Machine(
        torch.cuda.get_device_name(),
        rate * part,
        exact * part,
        _copy_rate(torch.device(kind)),
        _copy_rate(torch.device("cpu")),
        FILLED,
        BLOCK,
        GRAPH,
        torch.cuda.get_device_properties(0).total_memory,
        told,
    )


def _product_rate(kind: str, dtype: torch.dtype) -> float:
    """Operations a second of a square matmul."""
    n = 8192 if kind == "cuda" else 1024
    left, right = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: (left @ right)[0, 0])


def _copy_rate(source: torch.device) -> float:
    """Bytes a second that a GPU copies within its memory, read and written, or from page-locked host memory."""
    size = 1 << 28
    host = source.type == "cpu"
    there = torch.zeros(size, dtype=torch.uint8, pin_memory=host, device=source)
    here = torch.empty(size, dtype=torch.uint8, device="cuda")
    return (1 if host else 2) * size / _best(lambda: here.copy_(there, non_blocking=True)[0])


def _best(work: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest of at least three calls, for half a second; reading a value waits for the device."""
    best, stop, runs = float("inf"), time.perf_counter() + 0.5, 0
    while runs < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        work().item()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best

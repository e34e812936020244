"""How long host memory takes to be page-locked for what waits there for the GPU, by several ways.

    python benchmarks/locking.py llama-3-8b --rows docs/results/locking.json   # on a GPU
    python benchmarks/locking.py --rows docs/results/locking.json              # only print the table

Tensors of the sizes that the second moments of a shape's consumers have, filled from the GPU and brought back; as many once
more while the GPU multiplies matrices, to see how much of its rate is left to it; then the first are given up (torch keeps its
own for another time). Each way has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cost import HERE, told
from torch import Tensor

from slimtune.runtime import machine
from slimtune.train import offload
from slimtune.version import versions

Way = Callable[[Sequence[int]], Iterator[Tensor]]
SETTINGS = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
SAME = ("model", "layers", "gpu", "way")


def pageable(sizes: Sequence[int]) -> Iterator[Tensor]:
    """Not locked at all: filling it fetches the pages."""
    return (torch.empty(size) for size in sizes)


def pinned(sizes: Sequence[int]) -> Iterator[Tensor]:
    """torch's way."""
    return (torch.empty(size, pin_memory=True) for size in sizes)


def one_piece(sizes: Sequence[int]) -> Iterator[Tensor]:
    """torch's way, of one block that all have their parts of."""
    return iter(torch.empty(sum(sizes), pin_memory=True).split(list(sizes)))


def at_once(sizes: Sequence[int]) -> Iterator[Tensor]:
    """torch's way, by eight threads."""
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(lambda size: torch.empty(size, pin_memory=True), sizes)


def ours(sizes: Sequence[int]) -> Iterator[Tensor]:
    """What a run does."""
    return (offload.locked((size,), torch.float32, torch.device("cuda")) for size in sizes)


def small_pages(sizes: Sequence[int]) -> Iterator[Tensor]:
    """What a run does, but for the large pages that it asks for."""
    made = offload._mapped

    def asked(count: int) -> mmap.mmap:
        found = made(count)
        with suppress(OSError):
            found.madvise(mmap.MADV_NOHUGEPAGE)
        return found

    offload._mapped = asked
    return ours(sizes)


WAYS: dict[str, tuple[Way, str]] = {
    "pageable": (pageable, ""),
    "torch": (pinned, ""),
    "torch, one piece": (one_piece, ""),
    "torch, eight threads": (at_once, ""),
    "torch, registered": (pinned, SETTINGS),
    "slimtune, small pages": (small_pages, ""),
    "slimtune": (ours, ""),
}
"""And what torch's allocator is told."""


def products(seconds: float) -> float:
    """Products of two matrices that the GPU does in a second."""
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()
        count += 20
    return count / (time.perf_counter() - begun)


def measured(way: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds to get all tensors, to fill them from the GPU and to bring them back; more, beside products; to give up."""
    source, make = torch.ones(max(sizes), device="cuda"), WAYS[way][0]
    products(0.5)
    quiet, row = products(1.0), {"way": way, "gib": sum(sizes) * 4 / 2**30}
    tensors: list[Tensor] = []

    def clock(name: str, work: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        row[f"{name}_seconds"] = time.perf_counter() - begun

    clock("lock", lambda: tensors.extend(make(sizes)))
    clock("fill", lambda: [each.copy_(source[: len(each)]) for each in tensors])
    assert all(float(each[-1]) == 1.0 for each in tensors)
    clock("back", lambda: [source[: len(each)].copy_(each) for each in tensors])
    with ThreadPoolExecutor(1) as pool:
        more = pool.submit(lambda: list(make(sizes)))  # before torch is given back what it would give again
        row["beside"] = products(0.8 * max(0.5, row["lock_seconds"])) / quiet
        more.result()
    clock("free", tensors.clear)
    return row


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a way."""
    for way in args.ways:
        setting = WAYS[way][1]
        asked = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting} if setting else {}
        command = [sys.executable, __file__, args.shape, "--layers", str(args.layers), "--alone", way]
        done = subprocess.run(command, env={**os.environ, **asked}, text=True, stdout=subprocess.PIPE, check=True)
        known = {"model": args.shape, "layers": args.layers, "gpu": machine(torch.device("cuda"))}
        yield {**known, **json.loads(done.stdout.splitlines()[-1]), **versions()}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| way | GPU | GiB | to lock, s | to fill, s | back, s | to give up, s | the GPU's rate beside |"]
    lines.append(f"|{' --- |' * 8}")
    for row in rows:
        clocks = (f"{name}_seconds" for name in ("lock", "fill", "back", "free"))
        cells = [row["way"], row["gpu"], f"{row['gib']:.1f}", *(f"{row[name]:.1f}" if name in row else "" for name in clocks)]
        cells.append(f"{row['beside']:.2f}" if "beside" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write rows."""
    shapes = json.loads((HERE / "shapes.json").read_text())
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("shape", nargs="?", choices=sorted(shapes), help="without it: only print the table of --rows")
    made.add_argument("--layers", type=int, help="default: all of the shape")
    made.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    made.add_argument("--rows", type=Path)
    made.add_argument("--alone", choices=list(WAYS), help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.shape and not torch.cuda.is_available():
        made.error("there is no GPU here to lock host memory for; without a shape the table of --rows is printed")
    config = shapes.get(args.shape, {})
    args.layers = args.layers or config.get("num_hidden_layers")
    if args.alone:
        widths = config["hidden_size"], config["intermediate_size"]  # as wide as heads times their width
        print(json.dumps(measured(args.alone, [math.ceil(9 / 16 * width**2) for width in widths] * args.layers)))
        return
    told(args, rows_of(args), table, SAME)


if __name__ == "__main__":
    main()

"""Which GPU a run gets, and how many share one: fewer, once a run did not find enough memory beside others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slimtune.comparison.jobs import Job
from slimtune.errors import UserError

TRIES = 3
"""How often a run that found too little memory is made; the last time alone on its GPU, so that its end is its own."""
SYMPTOMS = re.compile(
    r"the GPU is out of memory|CUDA out of memory|CUDA (driver )?error: out of memory|OutOfMemoryError"
    r"|CU(BLAS|DNN)_STATUS_(ALLOC_FAILED|EXECUTION_FAILED|NOT_INITIALIZED)"
    r"|mha_graph(\.|->)execute\(.*\.is_good\(\)"
)
"""What a run says that found a full GPU. The libraries take memory past torch's allocator and only say that they failed."""
TAIL = 8000
"""Bytes at the end of a log that are looked at: CUDA's errors and the threads of a compiler talk on behind the reason."""


def ran_out(log: Path) -> bool:
    """Whether the end of a run's log tells of a full GPU."""
    return bool(SYMPTOMS.search(log.read_bytes()[-TAIL:].decode("utf-8", "replace")))


SEEN = (
    "import json, torch; "
    "print(json.dumps([str(getattr(torch.cuda.get_device_properties(index), 'uuid', '')) "
    "for index in range(torch.cuda.device_count())]))"
)


def seen() -> list[str] | None:
    """The UUIDs of all GPUs, in the order of their numbers; None where that cannot be told.

    As a run's torch sees them, in a process of its own: this one holds no torch and no memory of a GPU.
    """
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    asked = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=False)
    try:
        return [str(uuid).removeprefix("GPU-") for uuid in json.loads(asked.stdout.splitlines()[-1])]
    except (ValueError, IndexError):
        return None


def check_there(gpus: Sequence[str]) -> None:
    """Raises UserError for a GPU that is not there: CUDA shows such a run none, and it would go on on the CPU."""
    found = seen() if gpus else None
    if found is None:
        return
    there = "torch sees no GPU here; leave --gpus out for runs on the CPU"
    if found:
        there = f"the GPUs here are {', '.join(map(str, range(len(found))))}; give those, or leave --gpus out"
    for gpu in gpus:
        if gpu.isdecimal():
            known = int(gpu) < len(found)
        else:  # of a MIG the properties do not tell
            known = any(gpu.startswith("MIG-") or uuid.startswith(gpu.removeprefix("GPU-")) for uuid in found)
        if not known:
            raise UserError(f"--gpus {gpu}: {there}")


@dataclass(frozen=True)
class Fewer:
    """What a run without memory leads to: how many were beside it, and how many its GPU takes from now on."""

    others: int
    most: int

    def __str__(self) -> str:
        beside = f"{self.others} other{'' if self.others == 1 else 's'}"
        return f"ran out of GPU memory beside {beside}: made again later, with {self.most} at a time"


@dataclass
class _Gpu:
    """How many it takes at a time; the runs on it, each with the most others that it has had beside it."""

    most: int
    runs: dict[Job, int] = field(default_factory=dict)
    alone: bool = False


class Places:
    """As many places as runs may go on side by side, dealt out over the GPUs. For the one thread that starts runs."""

    def __init__(self, jobs: int, gpus: Sequence[str] = ()):
        dealt = Counter(gpus[index % len(gpus)] if gpus else "" for index in range(jobs))
        self.gpus = {name: _Gpu(most) for name, most in dealt.items()}
        self.short: Counter[Job] = Counter()
        """How often a run found too little memory."""

    def clear(self) -> None:
        """No run goes on any more. How many each GPU takes stays as it was found."""
        self.short.clear()
        for gpu in self.gpus.values():
            gpu.runs.clear()

    def take(self, job: Job) -> str | None:
        """The GPU with the fewest runs that has room for one more; ``""`` for all that there are, None for no room."""
        alone = self.short[job] >= TRIES - 1
        free = {
            name: gpu
            for name, gpu in self.gpus.items()
            if not gpu.runs or (len(gpu.runs) < gpu.most and not alone and not gpu.alone)
        }
        if not free:
            return None
        name = min(free, key=lambda name: len(free[name].runs))
        gpu = free[name]
        others = len(gpu.runs)
        gpu.runs = {job: others, **{other: max(before, others) for other, before in gpu.runs.items()}}
        gpu.alone = alone
        return name

    def leave(self, name: str, job: Job, short: bool) -> Fewer | None:
        """A run has ended; if it is to be made again because others took the memory (``short``): what follows.

        Others count that were there at any time: where two runs fill a GPU, both may fail, and the second alone.
        """
        gpu = self.gpus[name]
        here, ever = len(gpu.runs), gpu.runs.pop(job)
        if not (short and ever):
            return None
        self.short[job] += 1
        gpu.most = max(1, min(gpu.most, here) - 1)
        return Fewer(here - 1 or ever, gpu.most)

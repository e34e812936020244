"""Device, precision, seeds, ranks, the run folder and metrics.jsonl."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slimtune.errors import UserError
from slimtune.text_file import write_atomically

log = logging.getLogger("slimtune")


def pick_device(name: str) -> str:
    """``auto`` -> the local CUDA device if there is one, else ``cpu``. Raises UserError for an absent device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device={name!r} but torch sees no CUDA device; use device=cpu or device=auto")
        return f"cuda:{local_rank()}" if name == "cuda" else name
    if name != "cpu":
        raise UserError(f"device={name!r} is not supported; use auto, cpu or cuda")
    return name


def pick_dtype(name: str, device: str) -> Any:
    """``auto`` -> bfloat16 on a GPU, float32 on CPU."""
    import torch

    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") else "float32"
    return getattr(torch, name)


def pick_precision(name: str, device: str) -> Any:
    """Autocast type. ``auto`` -> bfloat16 on a GPU and on CPUs that multiply it natively (twice as fast there)."""
    import torch

    if name == "auto":
        # private, but the only way to ask; without it the slower, always right choice
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        name = "bfloat16" if native or device.startswith("cuda") else "float32"
    return getattr(torch, name)


def machine(device: Any) -> str:
    """What figures of time were taken on."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def peak_memory(device: Any) -> int | None:
    """Most bytes that tensors took on a GPU since the last call of :func:`forget_peak`; None on CPU."""
    import torch

    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def forget_peak(device: Any) -> None:
    """Start to measure ``peak_memory`` anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Inside, Python's garbage collector goes over young objects alone, unless it is called.

    A full collection takes a third of a second with a model's thousands of modules in memory, at any time; of several processes
    all wait for the one that it happens to.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def rank() -> int:
    """This process among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of the same host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_group() -> None:
    """Part from the other processes of the run, at its end: NCCL warns of a program that leaves without."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or read-only disk is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be written ({error.strerror}); free some disk space or allow writing there, then continue "
            "with --resume"
        ) from error


def locked(handle: int, wait: bool = False) -> bool:
    """Whether an open file or folder is this process's now, for as long as it is open; with ``wait`` it is in the end.

    True as well where there are no locks: on Windows, and on some file systems.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


class RunFolder:
    """The output folder of a run. Only rank 0 writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out={str(path)!r} cannot be created: {error.strerror}; choose another folder") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Two runs that write into one folder would spoil both; the lock goes with the process, however that ends.

        Raises:
            UserError: another process holds it.
        """
        handle = os.open(self.path, os.O_RDONLY) if rank() == 0 and os.name == "posix" else None
        try:
            if handle is not None and not locked(handle):
                raise UserError(
                    f"out={str(self.path)!r} is being written by another slimtune tune; wait for it, or choose another out"
                )
            yield
        finally:
            if handle is not None:
                os.close(handle)

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """A folder that was made for this run goes again when the run fails in here before it has written anything."""
        try:
            yield
        except BaseException:
            if self._new:  # on any rank: each may have been the first, or have made it again
                with suppress(OSError):  # not empty, or gone
                    self.path.rmdir()
            raise

    def write_text(self, name: str, text: str) -> Path:
        """Write a file atomically."""
        target = self.path / name
        if rank() == 0:
            with writing(target):
                write_atomically(target, text)
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as indented JSON, atomically."""
        return self.write_text(name, json.dumps(value, indent=2, sort_keys=False) + "\n")


class Metrics:
    """metrics.jsonl: one flat object a line, appended as the run goes, cut back to the checkpoint on resume."""

    def __init__(self, folder: RunFolder):
        self.path = folder / "metrics.jsonl"

    def restart(self, before: tuple[str, str, int] | None) -> None:
        """Forget the rows after checkpoint ``before`` = (stage, phase, step) on a resume, or all rows (``None``)."""
        if rank() != 0:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        keep = 0
        for number, line in enumerate(lines):
            if before is not None and _checkpoint(line) == list(before):
                keep = number + 1
        with writing(self.path):
            write_atomically(self.path, "".join(lines[:keep]))

    def write(self, **values: Any) -> None:
        """Append one row; tensors and numpy scalars become numbers, non-finite numbers text."""
        if rank() != 0:
            return
        clean = {key: _plain(value) for key, value in values.items()}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def _checkpoint(line: str) -> Any:
    """What a row says of a checkpoint; None of half a row, or of what is none."""
    try:
        return json.loads(line).get("checkpoint") if line.endswith("\n") else None
    except (ValueError, AttributeError):
        return None


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def quiet_libraries() -> None:
    """Keep the run's own lines readable: no loading bars and deprecation notes of the libraries underneath."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # an unreachable hub is told once, by our error, not with every retry
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

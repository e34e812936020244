"""Checkpoints of all weights of a sharded model: each process writes its part (torch.distributed.checkpoint).

Beside the checkpoint file, which then holds all but the spread tensors and names the folder that holds those. The folder is
written first and the file replaced after it, so that a kill leaves the old pair or the new one. Any number of processes can
read it. LoRA is so small that its checkpoint is one whole file instead (docs/decisions/0028-fsdp2.md).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from slimtune.errors import UserError
from slimtune.runtime import rank
from slimtune.train import checkpoint

_SPREAD = "spread tensor"
SHARDS = "shards"
"""Key of a checkpoint that names its folder."""


def folder_of(path: Path) -> Path:
    """Where the spread tensors of checkpoint file ``path`` are, in a folder for each of its versions."""
    return path.with_suffix(".shards")


def save(path: Path, state: dict[str, Any], version: str) -> None:
    """Write ``state``; every process must call this.

    Args:
        version: another name than the checkpoint of before.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    tensors: dict[str, Tensor] = {}
    rest = _named(state, "", tensors)
    folder = folder_of(path) / version
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left of it
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be written ({' '.join(str(error).split())[:200]}); free some disk space and "
            "continue with --resume (the previous checkpoint is untouched)"
        ) from error
    checkpoint.save(path, {**rest, SHARDS: version})
    if rank() == 0:
        for other in folder_of(path).iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _named(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with the name of each spread tensor in its place; ``tensors`` gains them."""
    if isinstance(value, DTensor):
        tensors[name] = value.detach()
        return {_SPREAD: name}
    if isinstance(value, dict):
        return {key: _named(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    return value


def filled(
    state: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], folder: Path
) -> dict[str, Any]:
    """A tuner's ``state`` with its spread tensors read, each as its parameter lies here: spread anew, or whole.

    Raises:
        UserError: the folder is absent or damaged.
    """
    wanted: dict[str, Tensor] = {}

    def like(value: Any, parameter: Tensor) -> Any:
        if not (isinstance(value, dict) and _SPREAD in value):
            return value
        return wanted.setdefault(value[_SPREAD], torch.zeros_like(parameter.detach()))

    parameters = dict(model.named_parameters())
    weights = {name: like(value, parameters[name]) for name, value in state["model"].items()}
    of_optimizers = []
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {key: like(value, trained[number]) for key, value in each.items()}
            for number, each in saved["state"].items()
        }
        of_optimizers.append({**saved, "state": moments})
    if wanted:
        try:
            with warnings.catch_warnings():  # it says that one process is one process
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(wanted, checkpoint_id=folder, no_dist=not dist.is_initialized())
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            raise UserError(f"checkpoint {str(folder)!r} is damaged ({type(error).__name__}); start anew") from error
    return {**state, "model": weights, "optimizers": of_optimizers}

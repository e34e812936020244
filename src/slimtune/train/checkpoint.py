"""Checkpoints: one file a stage, written beside and renamed, so that a kill leaves the old or the new one, never half."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimtune.errors import UserError
from slimtune.models.sharded import put_whole
from slimtune.runtime import rank

_ROOM = 1 << 16
"""A disk with less than this free is full."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` atomically on rank 0.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    if rank() != 0:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = _reason(error, path.parent)  # before the half-written file gives its space back
        partial.unlink(missing_ok=True)
        before = " (the previous checkpoint is untouched)" if path.is_file() else ""
        raise UserError(
            f"checkpoint {str(path)!r} cannot be written ({reason}); free some disk space and continue with --resume{before}"
        ) from error


def _reason(error: Exception, folder: Path) -> str:
    """torch's writer does not say that a disk is full, only that its own books do not balance."""
    with suppress(OSError):
        if isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _ROOM:
            return os.strerror(errno.ENOSPC)
    return " ".join(str(error).split())


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state, or None when there is no checkpoint yet."""
    if not path.is_file():
        return None
    place = device if device.type != "cpu" else torch.device("cpu")  # torch refuses cpu:0, which several processes have
    try:
        state: dict[str, Any] = torch.load(path, map_location=place, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"checkpoint {str(path)!r} is damaged ({type(error).__name__}); delete it to start anew") from error
    return state


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def restore_trainable(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy a ``trainable_state`` back; names and shapes must agree."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(parameters) != set(state):
        raise UserError("the checkpoint was written with another model or LoRA setting; delete it or use the old recipe")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise UserError(f"the checkpoint's {name!r} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        put_whole(state[name], parameter)

"""Reload an exported folder in a fresh process, without slimtune, and compare what it computes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimtune.errors import UserError
from slimtune.export import record

_CHILD = Path(__file__).with_name("verify_child.py")
_ERROR = re.compile(r"[A-Za-z_][\w.]*(: |$)")
"""How the line of a traceback begins that names the error: all before it is indented, or has blanks before a colon."""
_MOST = 300


def sample(text_ids: Tensor, vocabulary: int) -> Tensor:
    """``text_ids`` [1, T] and, below, T drawn ones: [2, T]. The second row is what ``verify`` records."""
    return torch.cat([text_ids.cpu(), record.drawn(vocabulary, text_ids.shape[1])])


def verify(folder: Path, input_ids: Tensor, expected: Tensor) -> float:
    """The largest absolute difference between the folder's logits (fp32, CPU, fresh process, offline) and ``expected``.

    What is expected of the last row is put into the folder (``verify.json``), for ``slimtune verify``.

    Args:
        folder: an exported model.
        input_ids: [B, T], e.g. of ``sample``.
        expected: logits [B, T, V] of the model in memory, computed in fp32 from weights rounded as they were written.

    Raises:
        UserError: the folder does not load, or the difference is not a number; with the child's error, in one line.
    """
    difference = float(reloaded(folder, {"input_ids": input_ids, "expected": expected})["difference"])
    record.write(folder, record.of(input_ids[-1], expected[-1]))
    return difference


def reloaded(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``verify_child`` says of ``folder``. Raises UserError as ``verify`` does."""
    with tempfile.TemporaryDirectory(prefix="slimtune-verify-") as scratch:
        file = Path(scratch) / "sample.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        # HF_MODULES_CACHE: code from the folder must leave no copy in the user's cache
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": scratch}
        # -P: without it Python would look for modules beside the script first
        command = [sys.executable, "-P", str(_CHILD), str(Path(folder).resolve()), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = _reason(done.stderr) or f"exit {done.returncode}"
        raise UserError(f"the export {str(folder)!r} fails in a fresh process ({reason}); fetch or export the folder again")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if not math.isfinite(found["difference"]):
        raise UserError(f"the export {str(folder)!r} gives logits that are not finite; check the trained weights")
    return found


def _reason(told: str) -> str:
    """The error that ends ``told``, in one line: the last line, and of an error of several lines all from its name on."""
    lines = told.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if _ERROR.match(line)]
    return " ".join(" ".join(lines[starts[-1] if starts else -1 :]).split())[:_MOST]

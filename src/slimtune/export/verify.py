"""Reload an exported folder in a fresh process, without slimtune, and compare logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from slimtune.errors import UserError

_CHILD = Path(__file__).with_name("verify_child.py")
_TAIL_LINES = 15


def verify(folder: Path, input_ids: Tensor, expected: Tensor) -> float:
    """The largest absolute difference between the folder's logits (fp32, CPU, fresh process, offline) and ``expected``.

    Args:
        folder: an exported model.
        input_ids: [B, T].
        expected: logits [B, T, V] of the model in memory, computed in fp32 from weights rounded as they were written.

    Raises:
        UserError: the folder does not load, or the difference is not a number; with the end of the child's stderr.
    """
    with tempfile.TemporaryDirectory(prefix="slimtune-verify-") as scratch:
        sample = Path(scratch) / "sample.safetensors"
        tensors = {"input_ids": input_ids, "expected": expected}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, sample)
        # HF_MODULES_CACHE: code from the folder must leave no copy in the user's cache
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": scratch}
        # -P: without it Python would look for modules beside the script first
        command = [sys.executable, "-P", str(_CHILD), str(Path(folder).resolve()), str(sample)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-_TAIL_LINES:])
        raise UserError(f"the export {str(folder)!r} fails in a fresh process (exit {done.returncode}):\n{tail}")
    difference = float(json.loads(done.stdout.strip().splitlines()[-1])["difference"])
    if not math.isfinite(difference):
        raise UserError(f"the export {str(folder)!r} gives logits that are not finite; check the trained weights")
    return difference

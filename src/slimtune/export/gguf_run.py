"""A GGUF file in llama.cpp itself (the wheel ``xllamacpp``), in a fresh process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimtune.errors import UserError

_CHILD = Path(__file__).with_name("gguf_child.py")
_TAIL = 600
_REASON = "error loading model: "
_HELD = "GGML_ASSERT("


@dataclass(frozen=True)
class Ran:
    """What llama.cpp made of prompts.

    Attributes:
        tokens: greedy, by prompt.
        read: tokens that each prompt is.
        logprobs: {token: log-probability} of the first one, by prompt.
        load_s: seconds to load the file.
    """

    tokens: list[list[int]]
    read: list[int]
    logprobs: list[dict[int, float]]
    load_s: float


def run(file: Path, prompts: Sequence[Sequence[int] | str], tokens: int, top: int = 1, threads: int = 1) -> Ran:
    """Greedy ``tokens`` after each of ``prompts`` (token ids, or a text), and the ``top`` likeliest first ones.

    Raises:
        UserError: llama.cpp is not installed, or does not load or run the file; with the end of what it says.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("GGUF files are run with the package xllamacpp; pip install 'slimtune[gguf]'")
    asked = json.dumps({"prompts": list(prompts), "tokens": tokens, "top": top, "threads": threads})
    command = [sys.executable, "-P", str(_CHILD), str(Path(file).resolve()), asked]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = _reason(done.stderr or done.stdout)
        raise UserError(f"llama.cpp does not run {str(file)!r} (exit {done.returncode}): {said}")
    found = json.loads(lines[-1])
    logprobs = [{int(token): float(value) for token, value in each} for each in found["logprobs"]]
    return Ran(found["tokens"], found["read"], logprobs, float(found["load_s"]))


def _reason(text: str) -> str:
    """Why a model does not load, in its words; else what it holds to and ends for; else the end of all."""
    lines = text.splitlines()
    told = [line.partition(_REASON)[2] for line in lines if _REASON in line][-1:]
    held = [line.strip() for line in lines if _HELD in line]  # a trace follows
    return next(iter([*told, *held]), " ".join(text.split())[-_TAIL:])

"""GGUF files in llama.cpp, on the CPU, by its own clocks: prompts and greedy tokens of one row."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimtune.bench.measure import Settings, compared, figures
from slimtune.errors import UserError
from slimtune.runtime import machine
from slimtune.version import __version__, versions

_CHILD = Path(__file__).with_name("llama_child.py")
_TAIL = 200


@dataclass(frozen=True)
class FileWork:
    """Counts of a GGUF file; keys and values are llama.cpp's, in 16 bits, and not counted: files are compared at one row.

    Attributes:
        parameters: elements of all tensors.
        weight_bytes: of all tensors, as they are stored.
        read_bytes: of those that a prompt reads: all but an untied embedding.
        step_bytes: of those that one token reads: of experts those alone that are chosen.
        token_flops: of a token: 2 an element of every matrix, of experts of the chosen ones.
    """

    parameters: int
    weight_bytes: int
    read_bytes: int
    step_bytes: int
    token_flops: int

    @classmethod
    def of(cls, file: Path) -> FileWork:
        """Read the file's table of tensors."""
        import gguf  # type: ignore[import-untyped, import-not-found, unused-ignore]

        try:
            reader = gguf.GGUFReader(file)
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise UserError(
                f"{str(file)!r} is no whole GGUF file ({error}); write it again: slimtune export --to gguf"
            ) from error
        tensors, part = reader.tensors, _chosen(reader)
        tied = not any(each.name == "output.weight" for each in tensors)
        read = [each for each in tensors if tied or each.name != "token_embd.weight"]
        matrices = [each for each in read if len(each.shape) > 1]
        return cls(
            parameters=sum(int(each.n_elements) for each in tensors),
            weight_bytes=sum(int(each.n_bytes) for each in tensors),
            read_bytes=sum(int(each.n_bytes) for each in read),
            step_bytes=sum(round(int(each.n_bytes) * part(each)) for each in read),
            token_flops=2 * sum(round(int(each.n_elements) * part(each)) for each in matrices),
        )


def _chosen(reader: Any) -> Callable[[Any], float]:
    """Which part of a tensor one token goes through: of experts, which lie in three dimensions, the chosen ones."""
    arch = reader.get_field("general.architecture")
    count, used = (reader.get_field(f"{arch and arch.contents()}.expert_{name}") for name in ("count", "used_count"))
    part = used.contents() / count.contents() if count and used else 1.0
    return lambda tensor: part if len(tensor.shape) == 3 else 1.0


def check(settings: Settings, device: str, dtype: str, random: bool) -> None:
    """Raise UserError for what a GGUF file has no part in."""
    asked = {
        f"--device {device}": device not in ("auto", "cpu"),
        f"--dtype {dtype}": dtype != "auto",
        "--random": random,
        "--compile": "compiled graph" in settings.hows,
    }
    if wrong := [name for name, given in asked.items() if given]:
        raise UserError(f"{wrong[0]} is for models in torch, and a GGUF file runs in llama.cpp on the CPU; leave it out")


def bench(files: Mapping[str, Path], settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Time every file, each in a fresh process for every turn, by turns; the result is that of ``bench_model``.

    Raises:
        UserError: a file is absent or no GGUF, or llama.cpp is not installed or does not run it.
    """
    for path in files.values():
        if path.suffix != ".gguf":
            raise UserError(f"{str(path)!r} is no GGUF file and the other one is; give two of a kind")
        if not path.is_file():
            raise UserError(f"{str(path)!r} is no file here; slimtune export RUN --to gguf writes one")
    if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files are run with the packages gguf and xllamacpp; pip install 'slimtune[gguf]'")
    work = {name: FileWork.of(path) for name, path in files.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for turn in range(settings.repeats):
        say(f"llama.cpp, turn {turn + 1} of {settings.repeats} ...")
        for name in list(files)[:: 1 if turn % 2 else -1]:
            times[name].append(_timed(files[name], settings))
    rows = [row for name in files for row in _rows(name, work[name], times[name], settings)]
    names = list(files)
    return {
        "version": __version__,
        "machine": machine(torch.device("cpu")),
        "dtype": "as in the file",
        "runtime": "llama.cpp",
        "random": False,
        **{key: getattr(settings, key) for key in ("prompt", "repeats")},
        **versions(("xllamacpp",)),
        "models": [_told(name, files[name], work[name], times[name]) for name in files],
        "rows": rows,
        "ratios": compared(rows, names[0], names[1]) if len(names) > 1 else [],
    }


def _told(name: str, file: Path, work: FileWork, times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    counts = {"parameters": work.parameters, "weight_bytes": work.weight_bytes, "step_bytes": work.step_bytes}
    return {"name": name, "path": str(file), "class": "GGUF", **counts, "load_s": min(each["load_s"] for each in times)}


def _rows(name: str, work: FileWork, times: Sequence[Mapping[str, float]], settings: Settings) -> list[dict[str, Any]]:
    def of(what: str, key: str, tokens: int, flops: int, count_bytes: int) -> dict[str, Any]:
        head = {"model": name, "what": what, "how": "llama.cpp", "batch": 1}
        memory = max((int(each["memory_bytes"]) for each in times if each["memory_bytes"]), default=None)
        seconds = [each[key] for each in times]
        return {**head, **figures(seconds, tokens, flops, count_bytes), "memory_bytes": memory, "seconds": seconds}

    prompt = settings.prompt
    return [
        of("prefill", "prompt_s", prompt, prompt * work.token_flops, work.read_bytes),
        of("decode", "step_s", 1, work.token_flops, work.step_bytes),
    ]


def _timed(file: Path, settings: Settings) -> dict[str, float]:
    asked = {"prompt": settings.prompt, "tokens": settings.steps, "threads": torch.get_num_threads()}
    command = [sys.executable, "-P", str(_CHILD), str(file.resolve()), json.dumps(asked)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing is told"]
        raise UserError(
            f"llama.cpp does not run {str(file)!r} with prompts of {settings.prompt} tokens ({said[-1][-_TAIL:]}); write "
            "the file again, or give a smaller --prompt"
        )
    found: dict[str, float] = json.loads(lines[-1])
    return found

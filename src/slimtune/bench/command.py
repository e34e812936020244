"""``slimtune bench``: how fast a model is on this machine, alone or beside another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from slimtune.bench import llama_runs
from slimtune.bench.measure import Rates, Settings, Subject, compared, measured
from slimtune.bench.torch_runs import Runs
from slimtune.bench.work import Work
from slimtune.errors import UserError
from slimtune.export.command import folder_of
from slimtune.models.load import BUILTIN, attention_of, load_config, pretrained
from slimtune.runtime import machine, pick_device, pick_dtype
from slimtune.sections import ModelConfig
from slimtune.version import __version__, versions

Say = Callable[[str], None]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def bench_model(
    model: str | Path,
    *,
    against: str | Path | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    random: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Time prompts, decode steps and the first token of a model, and of another by turns with it.

    Args:
        model: folder of a run or of a model, or a GGUF file, which llama.cpp runs on the CPU.
        against: another of the same kind, e.g. the dense one.
        settings: what is measured.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the weights: ``auto`` (bfloat16 on a GPU, float32 on CPU), ``float32``, ``bfloat16`` or ``float16``.
        random: draw the weights: a folder then needs config.json only, and shows how fast such a shape would be.
        say: takes a line for what is done.

    Returns:
        ``machine``, ``device``, ``dtype``, the settings, ``models`` (name, class, counts of ``Work``), ``rows`` (see
        ``measure.row``) and, against another, ``ratios`` (see ``measure.compared``).

    Raises:
        UserError: anything the user can mend.
    """
    settings = settings or Settings()
    given = [Path(each).expanduser() for each in (model, against) if each is not None]
    names = _names(given)
    if any(path.suffix == ".gguf" for path in given):
        llama_runs.check(settings, device, dtype, random)
        return llama_runs.bench(dict(zip(names, given, strict=True)), settings, say)
    where, kind = _where(settings, device, dtype)
    folders = [folder_of(path, what) for path, what in zip(given, ("MODEL", "--against"), strict=False)]
    subjects = [_subject(name, folder, where, kind, random, say) for name, folder in zip(names, folders, strict=True)]
    _check_length(subjects, settings)
    rates = Rates.of(where, kind)
    rows = measured(subjects, settings, say)
    return {
        "version": __version__,
        "machine": machine(where),
        "dtype": str(kind).removeprefix("torch."),
        "runtime": "torch",
        "random": random,
        **rates.told(),
        **{key: getattr(settings, key) for key in ("prompt", "context", "repeats")},
        **versions(),
        "models": [_told(subject, folder) for subject, folder in zip(subjects, folders, strict=True)],
        "rows": rows,
        "ratios": compared(rows, names[0], names[1], rates) if against is not None else [],
    }


def _where(settings: Settings, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and type of the weights. Raises UserError for what is not there."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; choose {', '.join(DTYPES)}")
    where = torch.device(pick_device(device))
    if "compiled graph" in settings.hows and where.type != "cuda":
        raise UserError(f"--compile is for CUDA graphs, and this is {where.type}; leave it out")
    return where, pick_dtype(dtype, where.type)


def _names(given: Sequence[Path]) -> list[str]:
    """Short and different names: the folder's, with what is above it where that says more."""
    resolved = [Path(str(path).removeprefix(BUILTIN)).resolve() for path in given]
    names = [path.name if path.name != "model" else path.parent.name for path in resolved]
    return (
        names if len(set(names)) == len(names) else [f"{path.parent.name}/{path.name}" for path in resolved[:1]] + ["against"]
    )


def _subject(name: str, folder: Path, device: torch.device, dtype: torch.dtype, random: bool, say: Say) -> Subject:
    say(f"{'drawing' if random else 'loading'} {folder} ...")
    config = load_config(ModelConfig(path=str(folder)), "MODEL")
    how = {"dtype": dtype, **attention_of(ModelConfig(path=str(folder)), config)}
    model: Any
    if random:
        with torch.device(device):  # drawn where it will live: on CPU an 8B model takes minutes
            model = AutoModelForCausalLM.from_config(config, **how)
    else:
        model = pretrained(ModelConfig(path=str(folder)), {**how, "device_map": str(device)}, "MODEL")
    model.eval()
    return Subject(name, Runs(model), Work.of(model))


def _check_length(subjects: Sequence[Subject], settings: Settings) -> None:
    for subject in subjects:
        limit = getattr(subject.runs.model.config, "max_position_embeddings", None)
        longest = max(settings.prompt, settings.context + settings.steps)
        if limit and longest > limit:
            raise UserError(
                f"{subject.name} was made for {limit} positions, and --prompt {settings.prompt} and --context "
                f"{settings.context} with {settings.steps} steps need {longest}; give smaller ones"
            )


def _told(subject: Subject, folder: Path) -> dict[str, Any]:
    return {
        "name": subject.name,
        "path": str(folder),
        "class": type(subject.runs.model).__name__,
        **subject.work.facts(),
    }

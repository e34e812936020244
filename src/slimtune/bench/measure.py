"""Time several models by turns, so that what disturbs the machine disturbs all of them, and hold ratios to what sizes allow."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from slimtune.bench.torch_runs import WARM, Runs, Timed, copy_rate, matmul_rate
from slimtune.bench.work import Work
from slimtune.runtime import forget_peak, peak_memory

Row = dict[str, Any]
_LAUNCHED = 16
"""Steps of one measurement that Python launches one by one: they are slow, and as many as that are enough."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batches: rows at once, of prompts and of decode steps.
        prompt: tokens of a prompt.
        context: tokens in the cache before the decode steps.
        steps: decode steps of one measurement.
        repeats: measurements of everything.
        hows: ways to decode: ``eager``, ``graph`` (CUDA), ``compiled graph`` (CUDA, through ``torch.compile``).
        prompts: whether prompts and the first token are timed at all.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 512
    context: int = 512
    steps: int = 32
    repeats: int = 5
    hows: tuple[str, ...] = ("eager", "graph")
    prompts: bool = True


@dataclass(frozen=True)
class Subject:
    """A model under a name, with what it must read and compute."""

    name: str
    runs: Runs
    work: Work


@dataclass(frozen=True)
class Rates:
    """The best that a device does, as measured on it.

    Attributes:
        copy_bytes_s: read and written in a copy.
        matmul_flops_s: of a large matrix product in the type of the weights.
    """

    copy_bytes_s: float
    matmul_flops_s: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Rates:
        """Measure them, in half a second."""
        return cls(copy_rate(device), matmul_rate(device, dtype))

    def told(self) -> dict[str, float]:
        """As they stand in results."""
        return {"copy_gb_s": self.copy_bytes_s / 1e9, "matmul_tflops_s": self.matmul_flops_s / 1e12}


@dataclass(frozen=True)
class Measure:
    """One kind of measurement.

    Attributes:
        what: ``prefill``, ``first token`` or ``decode``.
        how: ``eager``, ``graph`` or ``compiled graph``.
        batch: rows.
        start: makes a model ready; None where that model has no such thing.
        tokens: that one measurement reads (prefill) or writes (decode).
        flops, bytes: of one measurement, by the counts of the model.
    """

    what: str
    how: str
    batch: int
    start: Callable[[Subject], Timed | None]
    tokens: int
    flops: Callable[[Work], int]
    bytes: Callable[[Work], int]


def measures(settings: Settings, cuda: bool) -> Iterator[Measure]:
    """Everything that is measured, in this order; graphs only with CUDA."""
    if settings.prompts:
        yield from (_prefill(batch, settings.prompt) for batch in settings.batches)
        yield _first_token(settings.prompt)
    for batch in settings.batches:
        yield from (_decode(batch, how, settings) for how in settings.hows if cuda or how == "eager")


def _prefill(batch: int, prompt: int) -> Measure:
    return Measure(
        "prefill",
        "eager",
        batch,
        lambda subject: subject.runs.prefill(batch, prompt),
        batch * prompt,
        lambda work: work.prefill_flops(batch, prompt),
        lambda work: work.step_bytes,
    )


def _first_token(prompt: int) -> Measure:
    start = _prefill(1, prompt)
    return replace(start, what="first token", start=lambda subject: subject.runs.first_token(prompt))


def _decode(batch: int, how: str, settings: Settings) -> Measure:
    context = settings.context
    steps = min(settings.steps, _LAUNCHED) if how == "eager" else settings.steps

    def start(subject: Subject) -> Timed | None:
        if how == "eager":
            return subject.runs.decode(batch, context, steps)
        return subject.runs.captured(batch, context, steps, {} if how == "compiled graph" else None)

    middle = context + steps // 2
    return Measure(
        "decode",
        how,
        batch,
        start,
        batch,
        lambda work: work.decode_flops(batch, middle),
        lambda work: work.decode_bytes(batch, middle),
    )


@torch.no_grad()
def measured(subjects: Sequence[Subject], settings: Settings, say: Callable[[str], None]) -> list[Row]:
    """A row for every measurement and model that has it; see ``row``."""
    device = subjects[0].runs.device
    rows: list[Row] = []
    for measure in measures(settings, device.type == "cuda"):
        say(f"{measure.what}, batch {measure.batch}, {measure.how} ...")
        timed, memory = _ready(subjects, measure, device)
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for turn in range(settings.repeats):
            for name in list(timed)[:: 1 if turn % 2 else -1]:
                seconds[name].append(timed[name]())
        rows += [
            row(subject, measure, seconds[subject.name], memory[subject.name]) for subject in subjects if subject.name in timed
        ]
        timed.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _ready(
    subjects: Sequence[Subject], measure: Measure, device: torch.device
) -> tuple[dict[str, Timed], dict[str, int | None]]:
    """Measurements by model, warm; and the most bytes that each took on a GPU, its weights included."""
    timed: dict[str, Timed] = {}
    memory: dict[str, int | None] = {}
    for subject in subjects:
        forget_peak(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if call := measure.start(subject):
            for _ in range(WARM):
                call()
            timed[subject.name] = call
            peak = peak_memory(device)
            memory[subject.name] = None if peak is None else peak - before + subject.work.weight_bytes
    return timed, memory


def row(subject: Subject, measure: Measure, seconds: Sequence[float], memory: int | None) -> Row:
    """What is told of one measurement of one model."""
    head = {"model": subject.name, "what": measure.what, "how": measure.how, "batch": measure.batch}
    told = figures(seconds, measure.tokens, measure.flops(subject.work), measure.bytes(subject.work))
    return {**head, **told, "memory_bytes": memory, "seconds": list(seconds)}


def figures(seconds: Sequence[float], tokens: int, flops: int, count_bytes: int) -> Row:
    """Median, lowest and highest time in ms, tokens a second, counts, and rates by them."""
    middle = median(seconds)
    return {
        "ms": 1e3 * middle,
        "ms_low": 1e3 * min(seconds),
        "ms_high": 1e3 * max(seconds),
        "tokens_s": tokens / middle,
        "bytes": count_bytes,
        "gb_s": count_bytes / middle / 1e9,
        "flops": flops,
        "tflops_s": flops / middle / 1e12,
    }


def compared(rows: Sequence[Row], model: str, against: str, rates: Rates | None = None) -> list[Row]:
    """How much faster ``model`` is than ``against``, by turns of the same measurement, and what its smaller size allows.

    A decode step is held to the bytes that it reads, a prompt to its operations. Two measures, for no step is all reading:
    ``by_size`` is their quotient, the most there could be, if nothing else took time; ``by_saved``, the least to expect, takes
    from the time of ``against`` what the saved bytes (operations) take at the best rate measured on this device.

    Returns:
        Rows ``what``, ``how``, ``batch``, ``faster`` (the median over turns, with ``low`` and ``high``), ``by_size``,
        ``of_size`` (faster / by_size) and, with ``rates``, ``by_saved`` and ``of_saved``.
    """
    theirs: Mapping[Any, Row] = {key_of(each): each for each in rows if each["model"] == against}
    return [_ratio(mine, theirs[key_of(mine)], rates) for mine in rows if mine["model"] == model and key_of(mine) in theirs]


def _ratio(mine: Row, other: Row, rates: Rates | None) -> Row:
    ratios = [two / one for one, two in zip(mine["seconds"], other["seconds"], strict=True)]
    count = "bytes" if mine["what"] == "decode" else "flops"
    faster, by_size = median(ratios), other[count] / mine[count]
    found = {
        **{key: mine[key] for key in ("what", "how", "batch")},
        "faster": faster,
        "low": min(ratios),
        "high": max(ratios),
        "by_size": by_size,
        "of_size": faster / by_size,
    }
    if rates:
        before = other["ms"] / 1e3
        saved = (other[count] - mine[count]) / (rates.copy_bytes_s if count == "bytes" else rates.matmul_flops_s)
        if saved < before:  # else the counts say more than can be
            by_saved = before / (before - saved)
            found |= {"by_saved": by_saved, "of_saved": faster / by_saved}
    return found


def key_of(row: Row) -> tuple[Any, ...]:
    """What rows of different models have in common when they are of the same measurement."""
    return row["what"], row["how"], row["batch"]

"""Raw rows: a flat object for each metric of each run. One file may hold several bases and domains, made in several calls."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimtune.comparison.jobs import Job, Key, Part
from slimtune.comparison.lock import held
from slimtune.errors import UserError
from slimtune.text_file import write_atomically
from slimtune.version import LIBRARIES

Row = dict[str, Any]
Summary = dict[str, Any]

DENSE = "dense_lora"
"""The method that supplies ``dense_value``: LoRA on the uncut model."""
PLAIN = {"domain_ppl": "ppl", "valid_ppl": "valid_ppl", "accuracy": "accuracy", "parameters": "parameters"}
"""Metrics whose key in a summary is another or has no dot. Every key with a dot, a task's figure, is a metric as well."""

HALF = 65504.0
"""The largest half float."""
PPL = "domain_ppl"
"""Perplexity on the test split."""
GAIN = "tasks_above_chance"
"""Mean over tasks of accuracy minus that of the most frequent answer, or of ROUGE-L minus that of another row's answer."""
SCORES = {".accuracy": "majority", ".rougeL": "chance"}
"""Ends of the figures that count as a task's score, and what stands beside each for answers that know nothing."""
BESIDE = ("low", "high", "majority", "chance")
"""What a task's figure has beside it: its interval, and what answers get that know nothing."""
NO_FIGURES = ("_se", ".rows", *(f"_{name}" for name in BESIDE))
"""Ends of keys that say something about a task's figure and are none themselves."""


def of_run(job: Job, summary: Summary) -> list[Row]:
    """The rows of one run, and of the dense LoRA that it may have taken as its reference."""
    where = dict(zip(("base", "domain", "method", "keep", "seed"), job.key, strict=True))
    summary = judged(summary)
    made = {key: summary.get(key) for key in ("of", "version", "machine", *LIBRARIES, "commit", "program", "words")}
    if "failed" in summary:
        return [{**where, "metric": "failed", "value": summary["failed"], **{key: made[key] for key in ("commit", "program")}}]
    own = {"tokens": sum(summary["tokens"].values()), "leak": summary.get("leak"), "plan": summary["plan"]}
    own |= {"reload_difference": summary["reload_difference"], "kv_groups": summary.get("kv_groups")}
    own |= {"block_ratio": summary["result"]["block_ratio"], **_of_experts(summary)}
    rows = _rows({**where, **made, **own}, summary["result"], summary["base"])
    if summary.get("windows") is not None:
        rows[0]["windows"] = packed(summary["windows"])  # of the perplexity on the test split, the first metric
    if reference := summary.get(DENSE):
        own = {"method": DENSE, "keep": 1.0, "tokens": reference.get("tuning_tokens")}
        rows += _rows({**where, **made, **own}, reference, summary["base"])
    return rows


def _of_experts(summary: Summary) -> Row:
    """The part of the blocks that a token uses, the least and largest share of an expert in units of an even one, coverage."""
    if "active_ratio" not in summary["result"]:
        return {}
    parts = [part * len(layer) for layer in summary.get("shares") or () for part in layer]
    shares = {"least_share": min(parts), "most_share": max(parts)} if parts else {}
    covered = summary.get("coverage")
    coverage = {"coverage": sum(covered) / len(covered)} if covered else {}
    return {"active_ratio": summary["result"]["active_ratio"], **shares, **coverage}


def judged(summary: Summary) -> Summary:
    """The summary, with the reason why it is none under ``failed`` where its test perplexity is no number."""
    if "failed" in summary or _is_perplexity(value := summary["result"]["ppl"]):
        return summary
    return {**summary, "failed": f"its figures are no numbers (perplexity {value}): lower train.lr, or train.precision=float32"}


def _is_perplexity(value: float) -> bool:
    return 0 < value < math.inf  # false for nan as well


def usable(row: Row) -> bool:
    """Whether a row's value is a figure that can be averaged and drawn."""
    return _is_perplexity(row["value"]) if row["metric"] == PPL else math.isfinite(row["value"])


def _rows(common: Row, figures: dict[str, Any], base: dict[str, Any]) -> list[Row]:
    tasks = {key: key for key, value in figures.items() if "." in key and not key.endswith(NO_FIGURES) and _is_number(value)}
    figures, base = _with_ends(_with_gain(figures)), _with_gain(base)
    return [
        {
            **common,
            "metric": metric,
            "value": figures[key],
            "se": figures.get(f"{key}_se"),
            "base_value": base.get(key),
            "dense_value": None,
            "gpu_seconds": figures["seconds"],
            **{name: figures[f"{key}_{name}"] for name in BESIDE if f"{key}_{name}" in figures},
        }
        for metric, key in (PLAIN | tasks | {GAIN: GAIN}).items()
        if key in figures
    ]


def packed(windows: Mapping[str, Any]) -> str | None:
    """A run's ``windows.json`` as text, for rows are flat: the digest of the windows, and half floats.

    Their three digits are enough for a standard error. None where they do not hold the numbers.
    """
    numbers = windows["numbers"]
    if not numbers or not all(abs(number) < HALF for number in numbers):  # which is false for nan as well
        return None
    return f"{windows['windows']}:{base64.b64encode(struct.pack(f'<{len(numbers)}e', *numbers)).decode('ascii')}"


def unpacked(text: str) -> tuple[str, list[float]]:
    """The digest and the numbers that ``packed`` made text of."""
    digest, _, found = text.partition(":")
    raw = base64.b64decode(found)
    return digest, list(struct.unpack(f"<{len(raw) // 2}e", raw))


def _with_gain(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with the mean task score above chance, where there are tasks that have one."""
    gains = [
        value - figures[f"{key}_{baseline}"]
        for key, value in figures.items()
        for end, baseline in SCORES.items()
        if key.endswith(end) and f"{key}_{baseline}" in figures
    ]
    return {**figures, GAIN: sum(gains) / len(gains)} if gains else figures


NORMAL = 1.96
"""97.5th percentile of the normal distribution."""


def _with_ends(figures: dict[str, Any]) -> dict[str, Any]:
    """The accuracy on the test sources' choices with beside it what tasks have: Wilson's 95% interval, and the baseline.

    Not ± 1.96 standard errors: those leave 0 to 1 where few rows are nearly all right.
    """
    value, rows = figures.get("accuracy"), figures.get("rows")
    if value is None or not rows:
        return figures
    share = NORMAL**2 / rows
    middle = (value + share / 2) / (1 + share)
    half = NORMAL / (1 + share) * math.sqrt(value * (1 - value) / rows + share / (4 * rows))
    found = {"low": max(0.0, middle - half), "high": min(1.0, middle + half), "majority": figures.get("majority")}
    return {**figures, **{f"accuracy_{name}": it for name, it in found.items() if it is not None}}


def _is_number(value: Any) -> bool:
    """Also nan and the infinities, but no whole number beyond what a float holds."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300)


def key_of(row: Row) -> Key:
    """Base, domain, method, keep, seed. Rows without a budget (failed runs of early files) count as uncut."""
    return row["base"], row["domain"], row["method"], row.get("keep") or 1.0, row["seed"]


def joined(kept: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``kept`` with the runs in ``new`` put in the place of theirs; ``dense_value`` joined over all rows."""
    new = list(new)
    made = {key_of(row) for row in new}
    rows = [row for row in kept if key_of(row) not in made] + new
    rows.sort(key=lambda row: (*key_of(row)[:3], -key_of(row)[3], key_of(row)[4]))
    dense = {_reference(row): row["value"] for row in rows if row["method"] == DENSE}
    return [{**row, "dense_value": dense.get(_reference(row))} if "dense_value" in row else row for row in rows]


def added(file: Path, new: Iterable[Row]) -> list[Row]:
    """Join rows to those of a file and write it, as one step among all calls that share the file. Returns all rows."""
    new = list(new)
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    with held(Path(tempfile.gettempdir()) / f"slimtune-rows-{name}.lock", wait=True):
        rows = joined(read(file), new)
        write(file, rows)
    return rows


def _reference(row: Row) -> tuple[Any, ...]:
    return row["base"], row["domain"], row["seed"], row["metric"]


def has_run(rows: Iterable[Row], job: Job, now: str) -> bool:
    """Whether the rows hold this run's figures, by the same words and the program ``now``, here or on another machine."""
    mine = [row for row in rows if key_of(row) == job.key]
    return bool(mine) and all(
        row["metric"] != "failed"
        and (row["metric"] != PPL or usable(row))
        and (row.get("words"), row.get("program")) == (job.digest, now)
        for row in mine
    )


def check_part(rows: Sequence[Row], part: Part, file: Path, some: bool = False) -> None:
    """Raises UserError where a file of rows has no run of a part, of one of its methods, budgets or seeds.

    Args:
        some: not all that is asked for must be there yet, but something.
    """
    keys, who = [key_of(row) for row in rows], repr(str(file))
    there = any(map(part.holds, keys))
    if not (some and there):
        part.check(keys, who)
    if not there:  # each by itself is
        near = next(it for it in (replace(part, seeds=()), Part(part.only)) if any(map(it.holds, keys)))
        runs = dict.fromkeys(
            f"{key[2]}{'' if key[3] == 1 else f' {key[3]:g}'} seed {key[4]}" for key in keys if near.holds(key)
        )
        raise UserError(f"{part}: {who} has no such run. It has: {', '.join(runs)}")


def read(file: Path) -> list[Row]:
    """The rows of a file; none when there is no file. Raises UserError when it holds something else, naming the first."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        reason = None if isinstance(rows, list) else "it is no list"
    except ValueError:
        reason = "it is no JSON"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"{str(file)!r} holds no rows of a comparison ({reason}); give another --rows file")
    for index, row in enumerate(rows):
        if reason := wrong(row):
            name = f" (method {row['method']!r:.40})" if isinstance(row, dict) and "method" in row else ""
            told = f"rows[{index}]{name}: {reason}; correct it, or give another --rows"
            raise UserError(f"{str(file)!r} holds no rows of a comparison: {told}")
    return list(rows)


TEXTS = ("base", "domain", "method", "metric")
MAY = {
    **dict.fromkeys(("machine", "program", "words", "windows"), "text"),
    **dict.fromkeys(("se", "base_value", "dense_value", "tokens", "gpu_seconds", "kv_groups", *BESIDE), "number"),
    **dict.fromkeys(("block_ratio", "active_ratio", "least_share", "most_share", "coverage"), "number"),
}
"""What else of a row is read, if it is there and not null."""


def wrong(row: Any) -> str | None:
    """What is wrong with a row, if anything."""
    if not isinstance(row, dict):
        return f"{row!r:.40} is no mapping"
    if absent := [key for key in (*TEXTS, "seed", "value") if key not in row]:
        return f"the key {absent[0]!r} is missing"
    kinds = {**MAY, **dict.fromkeys(TEXTS, "text"), "value": "text" if row["metric"] == "failed" else "number"}
    for key, kind in kinds.items():
        may = key in MAY and row.get(key) is None
        if not may and not (isinstance(row[key], str) if kind == "text" else _is_number(row[key])):
            return f"{key}={row[key]!r:.40} is no {kind}"
    keep = row.get("keep")
    if keep is not None and not (_is_number(keep) and 0 < keep <= 1):
        return f"keep={keep!r:.40} is no number above 0 and up to 1"
    if not isinstance(row["seed"], int) or isinstance(row["seed"], bool):
        return f"seed={row['seed']!r:.40} is no whole number"
    return None if not row.get("windows") or _unpacks(row["windows"]) else "windows is damaged"


def _unpacks(text: str) -> bool:
    try:
        unpacked(text)
    except (ValueError, struct.error):
        return False
    return True


def write(file: Path, rows: Iterable[Row]) -> None:
    """A row a line, so that a change is legible as one; whole or not at all. Raises UserError."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    put(file, text)


def put(file: Path, text: str) -> None:
    """Write a file of the comparison. Raises UserError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written: {error.strerror}; choose another out or --rows") from error

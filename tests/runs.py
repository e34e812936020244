"""Folders of runs, written by hand: as many steps as wanted in no time, with figures that are known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.experts import Division
from slimtune.structure.plan import Plan

WIDTH, GROUPS = 1024, 8


def plan_of(layers: int, keep: float, seed: int = 0) -> Plan:
    """Every layer keeps about ``keep`` of both axes."""
    rng = random.Random(seed)
    kept = [
        {
            KV_GROUP: tuple(sorted(rng.sample(range(GROUPS), max(1, round(GROUPS * keep + rng.uniform(-1, 1)))))),
            FFN: tuple(sorted(rng.sample(range(WIDTH), round(WIDTH * min(1.0, keep * rng.uniform(0.7, 1.3)))))),
        }
        for _ in range(layers)
    ]
    return Plan("llama", 4, tuple({KV_GROUP: GROUPS, FFN: WIDTH} for _ in range(layers)), tuple(kept))


def rows_of(steps: int, search: int, layers: int, keep: float, every: int, seed: int, tasks: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: a search, then recovery; validation figures every so many steps, of ``tasks`` tasks more."""
    rng, rows = random.Random(seed), []
    for index in range(steps):
        closing = min(1.0, (index + 1) / max(1, search))
        part = 1 - (1 - keep) * closing
        row: dict[str, Any] = {
            "stage": "main",
            "phase": "search" if index < search else "recover",
            "step": index if index < search else index - search,
            "adapt_loss": 3 + 2 * math.exp(-index / 200) + rng.gauss(0, 0.1),
            "adapt_seconds": 0.01,
            "kept": part,
            "seconds": 0.012,
        }
        if index < search:
            row |= {"decide_loss": 4.0 + rng.random(), "decide_target": part, "decide_sampled": part + rng.gauss(0, 0.01)}
            row |= {"closed": 0.02, "reopened": 0.001 * rng.random()}
            row["widths_kv_group"] = [max(1, round(GROUPS * part)) for _ in range(layers)]
            row["widths_ffn"] = [round(WIDTH * part * rng.uniform(0.9, 1.0)) for _ in range(layers)]
        if (index + 1) % every == 0:
            row |= {"valid_ppl": 15 + 20 * math.exp(-index / 300), "valid_loss": 2.7}
            row |= {"valid_pubmedqa.accuracy": min(0.7, 0.4 + index / 5000), "valid_wikitext2.bits_per_byte": 1.4}
            for name in (f"valid_{name}.{metric}" for name in more_tasks(tasks) for metric in ("accuracy", "macro_f1")):
                row |= {name: rng.random(), f"{name}_majority": 0.5}
        rows.append(row)
    return rows


def more_tasks(count: int) -> list[str]:
    """Names of tasks beside the two that every run has."""
    return [f"task{number}" for number in range(count)]


def task(value: float, half: float, baseline: float | None = None) -> dict[str, float]:
    """A figure with its interval."""
    return {"": value, "_low": value - half, "_high": value + half, **({"_majority": baseline} if baseline else {})}


def figures(ppl: float, accuracy: float, bits: float, parameters: int, ratio: float) -> dict[str, Any]:
    """Of a model, as a summary has them."""
    found: dict[str, Any] = {"ppl": ppl, "ppl_se": 0.2, "valid_ppl": ppl + 0.5, "loss": math.log(ppl), "tokens": 1000.0}
    for name, value in (("pubmedqa.accuracy", task(accuracy, 0.03, 0.5)), ("wikitext2.bits_per_byte", task(bits, 0.02))):
        found |= {name + end: number for end, number in value.items()}
    found |= {"pubmedqa.rows": 500.0, "wikitext2.rows": 300.0}
    return {**found, "parameters": parameters, "block_ratio": ratio, "bytes": 2 * parameters}


def ruling(figure: str = "ppl", **changes: Any) -> dict[str, Any]:
    """What a summary says of a guard, which holds."""
    about = {"guard": figure, "figure": figure, "condition": "<= 1.2 x dense", "value": 20.0, "limit": 24.0, "holds": True}
    return {**about, "words": {"dense": 20.0}, **changes}


def bench_of(parameters: int, base: int, faster: float = 1.5) -> dict[str, Any]:
    """What ``slimtune bench --json`` writes."""
    ways = [("prefill", "eager", 1), ("first token", "eager", 1), ("decode", "eager", 1), ("decode", "graph", 1)]
    rows, ratios = [], []
    for what, how, batch in ways:
        for name, ms in (("run", 10.0 / faster), ("base", 10.0)):
            rows.append({"model": name, "what": what, "how": how, "batch": batch, "ms": ms, "memory_bytes": None})
        ratio = {"what": what, "how": how, "batch": batch, "faster": faster, "low": faster - 0.1, "high": faster + 0.1}
        ratios.append({**ratio, "by_size": 1.66, "of_size": faster / 1.66})
    models = [
        {"name": name, "parameters": size, "weight_bytes": 2 * size} for name, size in (("run", parameters), ("base", base))
    ]
    about = {"machine": "a test machine", "dtype": "bfloat16", "random": False, "prompt": 512, "context": 512, "repeats": 5}
    return {**about, "models": models, "rows": rows, "ratios": ratios}


def write_run(
    folder: Path,
    *,
    steps: int = 300,
    search: int = 60,
    layers: int = 12,
    keep: float = 0.6,
    seed: int = 0,
    every: int = 20,
    finished: bool = True,
    bench: bool = True,
    changes: dict[str, Any] | None = None,
    tasks: int = 0,
    **recipe: Any,
) -> Path:
    """The folder of a run.

    Args:
        changes: of the result's figures.
        tasks: beside the two that every run has.
        recipe: keys of the recipe besides method, budget and steps.
    """
    folder.mkdir(parents=True)
    raw = {
        "method": "atp",
        "out": str(folder),
        "seed": seed,
        "model": {"path": "org/base"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "budget": {"keep": keep, "of": "total"},
        "search": {"steps": search},
        "recover": {"steps": steps - search},
        **recipe,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    plan = plan_of(layers, keep, seed)
    base, small = 1_000_000, round(1_000_000 * keep)
    valid = {"ppl": 36.0, "wikitext2.bits_per_byte": 1.2}
    (folder / "stages.json").write_text(json.dumps({"cwd": "/home/me/work", "valid": {"dense": valid}}))
    lines = [json.dumps(row) for row in rows_of(steps, search, layers, keep, every, seed, tasks)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"checkpoint": ["main", "recover", 3]})]) + "\n")
    if not finished:
        return folder
    (folder / "plan.json").write_text(plan.to_json())
    result = {**figures(16.0, 0.68, 1.3, small, keep - 0.1), "seconds": 120.0, "class": "LlamaForCausalLM", **(changes or {})}
    for name in more_tasks(tasks):
        result |= {f"{name}.accuracy{end}": number for end, number in task(0.6, 0.03, 0.5).items()}
    summary = {
        "version": "0.1.0",
        "method": "atp",
        "out": str(folder),
        "model": str(folder / "model"),
        "seed": seed,
        "base": figures(40.0, 0.4, 1.2, base, 1.0),
        "dense_lora": {**figures(15.0, 0.7, 1.25, base, 1.0), "seconds": 150.0},
        "result": result,
        "speed": {},
        "guard": [],
        "plan": plan.digest,
        "tokens": {"adapt": 123456},
        "data": {"train": "aa" * 32, "test": "bb" * 32},
        "weights": "cc" * 32,
        "processes": 1,
        "rows": {"train": 100, "test": 10},
        "task_rows": {"pubmedqa": "dd" * 32},
        "lower_is_better": [],
        "machine": "a test machine",
        "torch": "2.13.0",
        "seconds": 300.0,
        "resumed": False,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if bench:
        (folder / "bench.json").write_text(json.dumps(bench_of(small, base)))
    return folder


def experts_of(layers: int = 3, overlap: bool = False) -> Plan:
    """Experts of which a token uses two: four and a shared one, or three that overlap; a quarter of the channels is in none."""
    quarter, eighth = WIDTH // 4, WIDTH // 8
    parts = [tuple(range(start, start + eighth)) for start in range(quarter, 3 * quarter, eighth)]
    shared: tuple[int, ...] = tuple(range(quarter))
    if overlap:
        three = [tuple(range(start, start + quarter)) for start in range(0, 3 * quarter, quarter)]
        shared, parts = (), [three[one] + three[other] for one, other in ((0, 1), (1, 2), (0, 2))]
    division = Division.of(shared, parts)
    kept = {KV_GROUP: tuple(range(GROUPS - 2)), FFN: division.union}
    full = tuple({KV_GROUP: GROUPS, FFN: WIDTH} for _ in range(layers))
    return Plan("llama", 4, full, (kept,) * layers, experts=(division,) * layers, top_k=2)


def write_experts(
    folder: Path,
    *,
    layers: int = 3,
    overlap: bool = False,
    finished: bool = True,
    shares: list[list[float]] | None = None,
    changes: dict[str, Any] | None = None,
    **recipe: Any,
) -> Path:
    """The folder of a run that makes experts: three steps of a search and three that recover.

    Args:
        shares: of the experts of each layer; by default the last layer's last one has half of its choices.
        changes: of the result's figures.
    """
    budget = {"keep": 0.6, "of": "block"}
    write_run(folder, steps=6, search=3, layers=layers, bench=False, finished=finished, method="tomoe", budget=budget, **recipe)
    rows = []
    for index in range(6):
        row = {
            "stage": "main",
            "phase": "search" if index < 3 else "recover",
            "step": index % 3,
            "adapt_loss": 3.0 - index / 10,
        }
        row |= {"adapt_generator_target": 0.9 - index / 10} if index < 3 else {}
        rows.append({**row, "kept": 0.6, "seconds": 0.5, "valid_ppl": 20.0 - index})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not finished:
        return folder
    plan = experts_of(layers, overlap)
    number = len(plan.experts[0].routed)
    (folder / "plan.json").write_text(plan.to_json())
    summary = json.loads((folder / "summary.json").read_text())
    active = {"active_parameters": 620_000, "active_ratio": 0.6}
    result = {**summary["result"], "parameters": 950_000, "block_ratio": 0.9, "class": "Glm4MoeForCausalLM", **active}
    base = {**summary["base"], "active_parameters": 1_000_000, "active_ratio": 1.0}
    even = [[1 / number] * number for _ in range(layers)]
    given = shares or [*even[:-2], [0.1, 0.3, 0.3, 0.3], [0.1, 0.2, 0.2, 0.5]] if number == 4 else shares or even
    told = {"method": "tomoe", "plan": plan.digest, "shares": given, "base": base, "dense_lora": {}}
    (folder / "summary.json").write_text(json.dumps({**summary, **told, "result": {**result, **(changes or {})}}))
    return folder

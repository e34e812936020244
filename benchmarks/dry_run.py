"""Run a shipped recipe on random weights of its model's true shape and hold the estimate against what was measured.

    python benchmarks/dry_run.py llama-3-8b --rows docs/results/dry-run.json

Nothing is downloaded: the shape is that of ``shapes.json``, the tokenizer and the text are the embedded ones. Steps and batch
are few; micro-batch, window, LoRA rank, budget and checkpointing are the recipe's. The model is cut, recovered, written
and loaded again like any other; its perplexity means nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import slimtune
from slimtune.estimate import estimate
from slimtune.recipe import Recipe

HERE = Path(__file__).parent
WARM = 2
"""First steps of a phase that are not timed."""


def recipe_of(shape: str, steps: int, batch: int, out: str, more: list[str]) -> Recipe:
    """The shape's shipped recipe, its model drawn at random, its data replaced by the embedded ones."""
    path = min((HERE.parent / "recipes").glob(f"{shape}-*.yaml"))
    config = json.loads((HERE / "shapes.json").read_text())[shape]
    changes = ["model.path=''", "model.init=config", f"model.config={json.dumps(config)}", "model.tokenizer=builtin:base-10m"]
    changes += ["data.train=builtin:python-docs", "data.valid=null", "data.test=null", "generator.prior_steps=1"]
    changes += [f"search.steps={steps}", f"recover.steps={steps}", f"train.batch={batch}", "train.checkpoint_every=0"]
    changes += ["evaluate.every=0", "evaluate.windows=4", "evaluate.batch=2", "export.verify=false", "export.dtype=bfloat16"]
    return slimtune.load_recipe(str(path), [*changes, f"out={out}", *more])


def measured(recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step and training tokens a second (those of ``adapt`` turns alone) by phase; peak memory."""
    lines = (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "step" in row and row["step"] >= WARM]
    tokens = recipe.train.batch * recipe.data.max_length
    memory = summary["result"].get("memory")  # of a GPU only
    found: dict[str, Any] = {"peak_gib": memory / 2**30} if memory else {}
    for phase in ("search", "recover"):
        seconds = statistics.median(row["seconds"] for row in rows if row["phase"] == phase)
        found |= {f"{phase}_seconds": seconds, f"{phase}_tokens_per_second": tokens / seconds}
    return found


def expected(recipe: Recipe) -> dict[str, Any]:
    """The same from ``slimtune estimate``, without the passes for prior and moments, which come before the first step."""
    found = estimate(recipe)
    values: dict[str, Any] = {"peak_gib": sum(found.memory.values()) / 2**30}
    for phase in found.phases:
        if phase.step_seconds and phase.name in ("search", "recover"):
            values[f"{phase.name}_seconds"] = phase.step_seconds
    return values


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as a Markdown table, measured and in brackets expected."""
    names = ("peak_gib", "search_seconds", "recover_seconds")
    heads = ("model", "compensate", "parameters after", "batch x window", "peak memory, GiB", "a search step, s")
    print(f"| {' | '.join(heads)} | a recovery step, s | machine |")
    print(f"|{' --- |' * (len(heads) + 2)}")
    for row in rows:
        cells = [f"{row[name]:.2f} ({row[f'expected_{name}']:.2f})" if name in row else "" for name in names]
        size, shape = f"{row['parameters']:,}", f"{row['batch']} x {row['window']}"
        print(f"| {row['model']} | {row['compensate']} | {size} | {shape} | {' | '.join(cells)} | {row['machine']} |")


def main() -> None:
    """Run, print measured beside expected, append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(json.loads((HERE / "shapes.json").read_text()))
    parser.add_argument("shape", nargs="?", choices=shapes, help="without it: only print the table of --rows")
    parser.add_argument("overrides", nargs="*", help="key=value, after the recipe's and this script's")
    parser.add_argument("--steps", type=int, default=8, help="of search and of recovery")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", default="runs/dry-run")
    parser.add_argument("--rows", type=Path)
    args = parser.parse_intermixed_args()
    if args.shape is None:
        print_table(json.loads(args.rows.read_text()))
        return
    recipe = recipe_of(args.shape, args.steps, args.batch, f"{args.out}/{args.shape}", args.overrides)
    guess = expected(recipe)
    summary = slimtune.tune(recipe, overwrite=True)
    found = measured(recipe, summary)
    print(f"{args.shape} on {summary['machine']}: measured (expected)")
    for key, value in found.items():
        print(f"  {key:28s}{value:12,.3f}" + (f"  ({guess[key]:,.3f}, {guess[key] / value:.2f}x)" if key in guess else ""))
    row = {
        "model": args.shape,
        "compensate": recipe.compensate.weights,
        "machine": summary["machine"],
        "batch": args.batch,
        "window": recipe.data.max_length,
    }
    row |= {"parameters": summary["result"]["parameters"], **found} | {f"expected_{key}": value for key, value in guess.items()}
    if args.rows:
        rows = json.loads(args.rows.read_text()) if args.rows.exists() else []
        same = ("model", "compensate")
        rows = [other for other in rows if any(other[key] != row[key] for key in same)] + [row]
        args.rows.write_text("[\n" + ",\n".join(json.dumps(item) for item in rows) + "\n]\n")


if __name__ == "__main__":
    main()

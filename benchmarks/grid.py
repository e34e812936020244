"""Run one recipe in several variants and seeds, as words on the command line, and collect flat rows.

    python benchmarks/grid.py recipes/health-docs.yaml --seeds 0,1,2 --jobs 3 --rows docs/results/x.json \
        "atp:" "aware: lora.semantics=lora_aware" "dense_lora: method=finetune train.steps=1000"

A variant is ``name: key=value ...``. For methods and budgets at equal cost, from a file: ``slimtune compare``, which does the
work here too (docs/compare.md). Dense LoRA supplies ``dense_value`` for the same seed: the reference inside a run
(``evaluate.dense_lora=true``: on the very rows and windows of its adapt turns), or a variant called ``dense_lora``. A failed
run is a row whose metric is ``failed``. A run that the same words and the same program have made is taken as it is. ``--add``
keeps the rows that the file has and this call does not make, so that a table can be made in several calls. With more
``--jobs`` than GPUs runs share a device: figures stay, seconds do not compare.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slimtune.comparison.jobs import Job, shared_text
from slimtune.comparison.launch import Launcher
from slimtune.comparison.rows import Row, read
from slimtune.comparison.run import run
from slimtune.comparison.stats import spread
from slimtune.recipe import load

Variant = tuple[str, list[str]]


def jobs_of(recipe: str, variants: list[Variant], seeds: list[int], runs: Path, base: str, domain: str) -> list[Job]:
    """A run for each seed and variant, at the budget of its recipe."""
    shared, jobs = shared_text(recipe), []
    for seed in seeds:
        for name, overrides in variants:
            loaded = load(recipe, overrides)
            keep = 1.0 if loaded.method == "finetune" else loaded.budget.keep
            folder = runs / f"{name}-{seed}"
            jobs.append(Job(base, domain, name, keep, seed, recipe, tuple(overrides), folder, loaded, shared))
    return jobs


def references(recipe: str, variants: list[Variant]) -> list[str]:
    """The variants that bring a dense LoRA: the one of that name, and those that take it as a reference inside the run."""
    found = []
    for name, overrides in variants:
        loaded = load(recipe, overrides)
        if name == "dense_lora" or (loaded.method != "finetune" and loaded.evaluate.dense_lora):
            found.append(name)
    return found


def print_table(rows: list[Row]) -> None:
    """Mean and standard deviation over seeds of the perplexity and of its ratio to dense LoRA, as a Markdown table."""
    print("| method | parameters | perplexity | of dense LoRA | tokens | seeds |\n| --- | --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and row["metric"] == "domain_ppl"]
        if not mine:
            print(f"| {name} | failed | | | | |")
            continue
        size = next(row["value"] for row in rows if row["method"] == name and row["metric"] == "parameters")
        ratios = [row["value"] / row["dense_value"] for row in mine if row["dense_value"]]
        cells = [f"{size:,}", spread([row["value"] for row in mine], 2), spread(ratios, 3), f"{mine[0]['tokens']:,}"]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(str(row['seed']) for row in mine)} |")


def main() -> None:
    """Parse, run, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="without it: only print the table of --rows")
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", default="", help="GPU numbers to deal runs out to, e.g. 0,1")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/grid"))
    parser.add_argument("--add", action="store_true", help="keep the other rows of --rows")
    parser.add_argument("--base", default="base-44m")
    parser.add_argument("--domain", default="")
    args = parser.parse_intermixed_args()
    if args.recipe is None:
        print_table(read(args.rows))
        return
    parts = [variant.partition(":") for variant in args.variants]
    variants = [(name.strip(), overrides.split()) for name, _, overrides in parts]
    if len(dense := references(args.recipe, variants)) > 1:  # which differ: in steps, in rows
        parser.error(f"{', '.join(dense)} each bring a dense LoRA; leave one, with evaluate.dense_lora=false in the others")
    seeds, domain = [int(seed) for seed in args.seeds.split(",")], args.domain or Path(args.recipe).stem
    work = jobs_of(args.recipe, variants, seeds, args.runs, args.base, domain)
    if not args.add:
        args.rows.unlink(missing_ok=True)
    gpus = [gpu for gpu in args.gpus.split(",") if gpu]
    print_table(run(work, args.rows, Launcher(args.jobs, gpus, args.threads), lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()

"""Run one recipe in several variants and seeds and collect flat rows.

    python benchmarks/grid.py recipes/health-docs.yaml --seeds 0,1,2 --jobs 3 --rows docs/results/x.json \
        "atp:" "aware: lora.semantics=lora_aware" "dense_lora: method=finetune train.steps=1000"

A variant is ``name: key=value ...``. Dense LoRA supplies ``dense_value`` for the same seed: the reference inside a run
(``evaluate.dense_lora=true``: on the very rows and windows of its adapt turns), or a variant called ``dense_lora``. Rows are
``{base, domain, method, keep, seed, metric, value, se, dense_value, tokens, gpu_seconds, machine, commit, ...}``
(``gpu_seconds``: of training, on whatever ``machine`` is); a failed run is a row
whose metric is ``failed``. A run that an earlier call finished with the same words is taken as it is (delete ``--runs`` when
the program has changed). ``--add`` keeps the rows that the file has and this call does not make, so that a table can be made in
several calls. With more ``--jobs`` than GPUs runs share a device: figures stay, seconds do not compare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.recipe import load

Row = dict[str, Any]


def commit() -> str | None:
    """Of the program, with a mark where its files differ from it; the variable ``COMMIT`` where there is no repository."""
    home = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=home, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", "src", "benchmarks", "recipes")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


@dataclass(frozen=True)
class Job:
    """One run: a variant's name and overrides, a seed, and the GPU it may see ("" for all)."""

    name: str
    overrides: list[str]
    seed: int
    gpu: str


def run(recipe: str, job: Job, runs: Path, threads: int) -> tuple[str, int, dict[str, Any]]:
    """One ``slimtune tune`` in a process of its own; its summary, or the end of its error output."""
    out = runs / f"{job.name}-{job.seed}"
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "slimtune",
        "tune",
        recipe,
        *job.overrides,
        f"seed={job.seed}",
        f"out={out}",
        "--overwrite",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if job.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = job.gpu
    summary_file, words, log = out / "summary.json", out.with_suffix(".words"), out.with_suffix(".log")
    if words.exists() and words.read_text() == " ".join(command) and summary_file.exists():
        return job.name, job.seed, json.loads(summary_file.read_text())
    made_by = commit()
    summary_file.unlink(missing_ok=True)
    words.write_text(" ".join(command))
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        print(f"{job.name} seed {job.seed}: failed, see {log}", flush=True)
        return job.name, job.seed, {"failed": log.read_text()[-400:]}
    summary: dict[str, Any] = {
        **json.loads(summary_file.read_text()),
        "commit": made_by,
        "kv_groups": kv_groups(out / "plan.json"),
    }
    summary_file.write_text(json.dumps(summary))
    print(
        f"{job.name} seed {job.seed}: ppl {summary['result']['ppl']:.3f} (base {summary['base'].get('ppl', 0):.3f})", flush=True
    )
    return job.name, job.seed, summary


def kv_groups(plan: Path) -> int:
    """KV groups that stay, over all layers: what the KV cache holds."""
    return sum(len(layer["kv_group"]) for layer in json.loads(plan.read_text())["plan"]["kept"])


def rows_of(done: list[tuple[str, int, dict[str, Any]]], base: str, domain: str) -> list[Row]:
    """Flat rows, ``dense_value`` joined by seed."""
    rows: list[Row] = []
    for name, seed, summary in done:
        if "failed" in summary:
            where = {"base": base, "domain": domain, "method": name, "seed": seed}
            rows.append({**where, "metric": "failed", "value": summary["failed"]})
            continue
        common = {"base": base, "domain": domain, "seed": seed, **_common(summary)}
        own = {"method": name, "keep": summary["keep"], "tokens": sum(summary["tokens"].values()), "leak": summary["leak"]}
        own |= {"reload_difference": summary["reload_difference"], "plan": summary["plan"]}
        own |= {"block_ratio": summary["result"]["block_ratio"], "kv_groups": summary.get("kv_groups")}
        rows += _rows({**common, **own}, summary["result"], summary["base"])
        if reference := summary.get("dense_lora"):
            own = {"method": "dense_lora", "keep": 1.0, "tokens": reference.get("tuning_tokens")}
            rows += _rows({**common, **own}, reference, summary["base"])
    return joined([], rows)


def _common(summary: dict[str, Any]) -> Row:
    return {
        **{key: summary[key] for key in ("of", "version", "machine")},
        **{key: summary.get(key) for key in ("torch", "commit")},
    }


def _rows(common: Row, figures: dict[str, Any], base: dict[str, Any]) -> list[Row]:
    return [
        {
            "gpu_seconds": figures["seconds"],
            **common,
            "metric": metric,
            "value": figures[key],
            "se": figures.get(f"{key}_se"),
            "base_value": base.get(key),
            "dense_value": None,
        }
        for metric, key in (("domain_ppl", "ppl"), ("accuracy", "accuracy"), ("parameters", "parameters"))
        if key in figures
    ]


def joined(kept: list[Row], new: list[Row]) -> list[Row]:
    """``kept`` with the runs in ``new`` put in place of theirs (same method and seed); ``dense_value`` joined over all rows."""
    made = {(row["method"], row["seed"]) for row in new}
    rows = [row for row in kept if (row["method"], row["seed"]) not in made] + new
    rows.sort(key=lambda row: (row["method"], row["seed"]))
    dense = {(row["seed"], row["metric"]): row["value"] for row in rows if row["method"] == "dense_lora"}
    return [{**row, "dense_value": dense.get((row["seed"], row["metric"]))} if "dense_value" in row else row for row in rows]


def references(recipe: str, variants: list[tuple[str, list[str]]]) -> list[str]:
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
        cells = [f"{size:,}", _spread([row["value"] for row in mine], 2), _spread(ratios, 3), f"{mine[0]['tokens']:,}"]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(str(row['seed']) for row in mine)} |")


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


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
        print_table(json.loads(args.rows.read_text()))
        return
    domain = args.domain or Path(args.recipe).stem
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.rows.read_text()) if args.add and args.rows.exists() else []
    gpus = itertools.cycle(args.gpus.split(","))
    parts = [variant.partition(":") for variant in args.variants]
    variants = [(name.strip(), overrides.split()) for name, _, overrides in parts]
    if len(dense := references(args.recipe, variants)) > 1:  # which differ: in steps, in rows
        parser.error(f"{', '.join(dense)} each bring a dense LoRA; leave one, with evaluate.dense_lora=false in the others")
    work = [Job(name, overrides, int(seed), next(gpus)) for seed in args.seeds.split(",") for name, overrides in variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, args.recipe, job, args.runs, args.threads) for job in work]
        done = []
        for future in as_completed(futures):  # rows are written as they come: an interrupted grid keeps what it has
            done.append(future.result())
            rows = joined(kept, rows_of(done, args.base, domain))
            args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print_table(rows)


if __name__ == "__main__":
    main()

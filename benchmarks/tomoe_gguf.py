"""Speed in llama.cpp, on the CPU, at a model's true shape with random weights: experts and cuts beside the dense model.

    python benchmarks/tomoe_gguf.py llama-3.2-1b --rows docs/results/tomoe-gguf.json    # two cores, 25 minutes, 13 GB of disk
    python benchmarks/tomoe_gguf.py --rows docs/results/tomoe-gguf.json                 # only print the table

``partition``: experts that have each channel once, of which a token uses the shared one and some others; ``unshared``: none
is shared; ``overlap``: each is a subset of all channels; ``uniform``: a cut of equal widths to the same part of the blocks.
Files of one budget are timed by turns beside the dense one, each in a fresh process, by llama.cpp's own clocks; a step reads
the chosen experts alone, a prompt all. A cell is how many times faster than dense (lowest to highest of the turns; what the
bytes of a step or the operations of a prompt allow).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from speed import HERE, OF_ASSETS, gguf_file, short
from tomoe_speed import MOE, about, base_of, other_of, put

from slimtune.bench import llama_runs
from slimtune.bench.measure import Settings, compared, key_of
from slimtune.comparison.program import commit

Row = dict[str, Any]
KINDS = ("partition", "unshared", "overlap", "uniform")


def rows_of(args: argparse.Namespace) -> None:
    """Of every budget the dense file beside the others, written as they come."""
    say, settings = partial(print, flush=True), Settings((1,), args.prompt, repeats=args.repeats)
    with tempfile.TemporaryDirectory(prefix="slimtune-speed-") as name:
        scratch = Path(name)
        dense = gguf_file("dense", base_of(args.shape, **OF_ASSETS), scratch, args.gguf)
        for keep in args.keeps:
            others = {kind: other_of(kind, keep, args, **OF_ASSETS) for kind in args.kinds}
            files = {kind: gguf_file(kind, config, scratch, args.gguf) for kind, (config, _) in others.items()}
            found = llama_runs.bench({"dense": dense, **files}, settings, say)
            head = {"shape": args.shape, "keep": keep, "weights": "random", "seed": args.seed, "dtype": args.gguf}
            head |= {"machine": found["machine"], "xllamacpp": found["xllamacpp"], "prompt": args.prompt}
            head |= {"repeats": args.repeats, "steps": settings.steps} | ({"commit": by} if (by := commit()) else {})
            sizes = {model["name"]: {key: model[key] for key in ("parameters", "weight_bytes")} for model in found["models"]}
            rows = list[Row]()
            for row in found["rows"]:
                told = others[row["model"]][1] if row["model"] in others else {}
                rows.append({**head, **told, **sizes[row["model"]], **row, "seconds": short(row["seconds"])})
            put(args.rows, rows, ("shape", "dtype", "machine", "keep"))  # turns of a budget are paired: all of it is new
            for file in files.values():
                file.unlink()


def table(rows: list[Row]) -> str:
    """Per shape and machine, as Markdown."""
    groups = dict.fromkeys((row["shape"], row["dtype"], row["machine"]) for row in rows)
    return "\n".join(_table([row for row in rows if (row["shape"], row["dtype"], row["machine"]) == group]) for group in groups)


def _table(rows: list[Row]) -> str:
    first, keeps = rows[0], sorted({row["keep"] for row in rows}, reverse=True)
    kinds = [kind for kind in KINDS if any(row["model"] == kind for row in rows)]
    lines = [f"{first['shape']} shape, random weights, {first['dtype']}, {first['machine']}; steps of one row.", ""]
    for kind in kinds:
        shapes = {row["keep"]: row for row in rows if row["model"] == kind}
        lines += [f"- {kind}, {about(shapes[keep])}" for keep in keeps if keep in shapes]
    lines += ["", f"| | experts | dense, ms | {' | '.join(f'{100 * keep:g}%' for keep in keeps)} |"]
    lines += [f"|{' --- |' * (3 + len(keeps))}"]
    for what, how, batch in dict.fromkeys(map(key_of, rows)):
        alike = [row for row in rows if key_of(row) == (what, how, batch)]
        dense = median(row["ms"] for row in alike if row["model"] == "dense")
        named = f"prompt of {first['prompt']:,}" if what == "prefill" else "step"
        for kind in kinds:
            cells = " | ".join(_cell([row for row in alike if row["keep"] == keep], kind) for keep in keeps)
            lines.append(f"| {named} | {kind if kind in MOE else 'none: a cut'} | {dense:,.2f} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[Row], kind: str) -> str:
    timed = [{**row, "seconds": [float(each) for each in row["seconds"].split()]} for row in rows]
    if not (found := compared(timed, kind, "dense")):
        return ""
    return f"{found[0]['faster']:.2f}x ({found[0]['low']:.2f} to {found[0]['high']:.2f}; {found[0]['by_size']:.2f})"


def main() -> None:
    """Measure, or only print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=sorted(json.loads((HERE / "shapes.json").read_text())))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.8, 0.7, 0.6, 0.5], help="active part of the blocks")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of that part")
    parser.add_argument("--gguf", default="q8_0", help="kind of the files")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    if args.shape:
        rows_of(args)
    print(table(json.loads(args.rows.read_text())))


if __name__ == "__main__":
    main()

"""Speed at a model's true shape, with random weights: the dense one beside experts, of which a token uses a part, and cuts.

    python benchmarks/tomoe_speed.py llama-3-8b --rows docs/results/tomoe-speed.json   # an H200, 8 minutes, up to 120 GB
    python benchmarks/tomoe_speed.py --rows docs/results/tomoe-speed.json              # only print the tables

``partition``: experts that have each channel once, and a shared one; ``unshared``: without that; ``overlap``: each expert is a
subset of all channels; ``uniform``: a cut of equal widths to the same part of the blocks. The dense one and one other at a
time, by turns in one process, its experts computed in each way of ``expert_ways.py``. Routers are random too, so that tokens
spread evenly over experts: ``experts_read`` were used by a step, in the mean of the layers; ``experts_expected`` are those of
E (1 - (1 - k / E)^B). ``bytes_read_model`` are those of the weights that a step of B rows reads, so many experts among them;
``bytes`` has keys and values too. A cell is how many times faster than dense (lowest to highest of the turns; what operations
of a prompt or ``bytes`` of a step allow, then what ``bytes_read_model`` does). Rows are written as they come: a run that was
stopped is taken up with ``--kinds`` and ``--keeps``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from expert_ways import WAYS, Way
from kernel_times import looked_at
from speed import CUTS, HERE, cut_config, drawn
from transformers import AutoConfig, PreTrainedConfig

from slimtune.bench.measure import Rates, Settings, Subject, compared, key_of, measured
from slimtune.bench.work import Work
from slimtune.comparison.program import commit
from slimtune.models.load import structure_of
from slimtune.models.moe import Layout, config_of
from slimtune.prune.shape import shape_of
from slimtune.runtime import machine
from slimtune.sections import BudgetConfig, MoeConfig
from slimtune.version import versions

Row = dict[str, Any]
Say = Callable[[str], None]
MOE: dict[str, dict[str, Any]] = {"partition": {}, "unshared": {"shared": False}, "overlap": {"experts": "overlap"}}
KINDS = ("partition", "unshared", "uniform", "overlap")
SAME = ("shape", "machine", "kind", "keep", "model", "implementation", "what", "how", "batch")
"""What rows that measured the same have in common."""


def base_of(shape: str, **more: Any) -> PreTrainedConfig:
    """Its config."""
    keys = {**json.loads((HERE / "shapes.json").read_text())[shape], **more}
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def other_of(kind: str, keep: float, args: argparse.Namespace, **more: Any) -> tuple[PreTrainedConfig, Row]:
    """A config, and what rows tell of it."""
    base = base_of(args.shape, **more)
    if kind == "uniform":
        config = cut_config(base, keep, args.seed, **{**CUTS["uniform"], "of": "block"})
        return config, {"groups": config.num_key_value_heads, "width": config.intermediate_size}
    structure = structure_of(base)
    found = shape_of(structure, BudgetConfig(keep=keep, of="block", tolerance=args.tolerance), MoeConfig(**MOE[kind]))
    layout = Layout(found.number, found.top_k, found.width, found.shares, found.groups)
    told = {"number": found.number, "top_k": found.top_k, "width": found.width, "shared": found.shares * found.width}
    return config_of(base, structure, layout), {**told, "groups": found.groups}


def pair_rows(kind: str, keep: float, dense: Subject, args: argparse.Namespace, say: Say) -> Iterator[list[Row]]:
    """Rows of the dense model and of another, measurement by measurement."""
    config, told = other_of(kind, keep, args)
    torch.manual_seed(args.seed)
    model = drawn(f"{kind} {keep:g}", config, dense.runs.device, dense.runs.model.dtype)
    work = Work.of(model)
    told |= {"class": config.model_type, "active": work.block_flops / dense.work.block_flops}
    ways = [Way(model, name) for name in (args.ways if kind in MOE else [""])]
    subjects = [dense, *(subject(way.name or kind, way, work) for way in ways)]
    for batch in args.batches:
        step: Row = {}
        if kind in MOE:
            step["experts_read"] = ways[0].read(batch, args.context)
            step["experts_expected"] = told["number"] * (1 - (1 - told["top_k"] / told["number"]) ** batch)
        prompt = max(1, min(args.prompt, args.tokens // batch))
        for how, count in (("eager", args.launched), ("graph", args.steps), ("compiled graph", args.steps)):
            if how not in hows(args, batch):
                continue
            settings = Settings((batch,), prompt, args.context, count, args.repeats, (how,), prompts=how == "eager")
            try:
                found = measured(subjects, settings, say)
            except RuntimeError as error:  # too little memory, or a graph that fails after all: what follows is still wanted
                say(f"NOT MEASURED: batch {batch}, {how}: {error}")
                free(dense.runs.device)
                continue
            yield [{**finished(row, found, subjects, settings), **_of(row, told, step)} for row in found]


def hows(args: argparse.Namespace, batch: int) -> tuple[str, ...]:
    """In which ways steps of a batch are launched; those of one kind are measured in one call."""
    if args.compile:
        return ("compiled graph",) if batch in args.compile else ()
    return ("eager",) if args.no_graphs else ("eager", "graph")


def subject(name: str, way: Way, work: Work) -> Subject:
    """Under a name."""
    runs: Any = way
    return Subject(name, runs, work)


def _of(row: Row, told: Row, step: Row) -> Row:
    """What is told of a model's shape, and of its decode steps."""
    return {} if row["model"] == "dense" else {**told, **(step if row["what"] == "decode" else {})}


def finished(row: Row, found: list[Row], subjects: Sequence[Subject], settings: Settings) -> Row:
    """A row with its counts, and, beside the dense one, how many times faster it is and what counts say it could be."""
    dense, mine = (next(each for each in subjects if each.name == name) for name in ("dense", row["model"]))
    decode, is_dense = row["what"] == "decode", mine is dense
    whole: Row = {"model": "dense" if is_dense else "other", "implementation": row["model"] if row["model"] in WAYS else ""}
    whole |= {key: row[key] for key in ("what", "how", "batch")}
    whole |= {"steps": settings.steps} if decode else {"prompt": settings.prompt}
    way: Any = mine.runs
    whole |= {"graphs": "graph" in row["how"], "capturable": way.capturable(row["batch"])}
    weights = [each.work.decode_bytes(row["batch"], 0) if decode else each.work.step_bytes for each in (dense, mine)]
    whole |= {"parameters": mine.work.parameters, "weight_bytes": mine.work.weight_bytes, "bytes_read_model": weights[1]}
    whole |= {key: value for key, value in row.items() if key != "model"}
    whole["seconds"] = " ".join(f"{value:.5g}" for value in row["seconds"])
    if is_dense:
        return whole
    ratio = next(each for each in compared(found, row["model"], "dense") if key_of(each) == key_of(row))
    whole |= {"faster": ratio["faster"], "faster_low": ratio["low"], "faster_high": ratio["high"]}
    whole["faster_by_counts"] = ratio["by_size"]
    return whole | ({"faster_by_weights": weights[0] / weights[1]} if decode else {})


def rows_of(args: argparse.Namespace) -> None:
    """Measure everything, and write rows as they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, begun = torch.bfloat16 if device.type == "cuda" else torch.float32, time.monotonic()

    def say(line: str) -> None:
        if not line.startswith("first token"):  # which is not measured here
            print(f"[{time.monotonic() - begun:4.0f} s] {line}", flush=True)

    torch.manual_seed(args.seed)
    model = drawn("dense", base_of(args.shape), device, dtype)
    dense = subject("dense", Way(model, ""), Work.of(model))
    head = {"shape": args.shape, "machine": machine(device), "dtype": str(dtype)[6:], "weights": "random", "seed": args.seed}
    head |= {"context": args.context, "repeats": args.repeats, **Rates.of(device, dtype).told(), **versions()}
    head |= {"commit": by} if (by := commit()) else {}
    gc.freeze()  # each measurement ends with a collection, which goes over what is imported for longer than a step takes
    for keep in args.keeps:
        for kind in args.kinds:
            say(f"{kind}, {keep:g} of the blocks' parameters ...")
            for rows in pair_rows(kind, keep, dense, args, say):
                put(args.rows, [{**head, "kind": kind, "keep": keep, **row} for row in rows])
            free(device)
    gc.unfreeze()
    say("done")


def look(args: argparse.Namespace) -> None:
    """Print which kernels a prompt of each batch and a decode step take, of the dense model and of every other."""
    device = torch.device("cuda")
    torch.manual_seed(args.seed)
    kinds: list[tuple[str, float]] = [("dense", 1.0), *((kind, keep) for keep in args.keeps for kind in args.kinds)]
    for kind, keep in kinds:
        config = base_of(args.shape) if kind == "dense" else other_of(kind, keep, args)[0]
        way = Way(drawn(f"{kind} {keep:g}", config, device, torch.bfloat16), args.ways[0] if kind in MOE else "")
        for batch in args.batches:
            prompt = max(1, min(args.prompt, args.tokens // batch))
            calls = {f"prompt of {prompt}": way.prefill(batch, prompt), "step": way.decode(batch, args.context, 1)}
            for what, call in calls.items():
                if call is None:
                    continue
                call()  # kernels are loaded
                with looked_at(f"{kind} {keep:g}, batch {batch}, {what}"):
                    call()
        del way
        free(device)


def free(device: torch.device) -> None:
    """Give back what a model took that is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def put(file: Path, new: list[Row], same: Sequence[str] = SAME) -> None:
    """Rows in place of those that measured the same."""
    rows = json.loads(file.read_text()) if file.exists() else []
    later = {tuple(row[key] for key in same) for row in new}
    rows = [row for row in rows if tuple(row[key] for key in same) not in later] + new
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def table(rows: list[Row]) -> str:
    """Per shape, machine and kind: how many times faster than dense, and what counts say, as Markdown."""
    groups = dict.fromkeys((row["shape"], row["machine"], row["kind"]) for row in rows)
    return "\n".join(_table([row for row in rows if (row["shape"], row["machine"], row["kind"]) == group]) for group in groups)


def _table(rows: list[Row]) -> str:
    mine = [row for row in rows if row["model"] != "dense"]
    parts = {row["keep"]: row for row in sorted(mine, key=lambda row: -row["keep"])}
    first, per_cent = mine[0], [f"{100 * keep:g}%" for keep in parts]
    lines = [
        f"{first['shape']} shape, {first['kind']} ({first['class']}), random weights, {first['dtype']}, {first['machine']};"
    ]
    shown = {keep: about(parts[keep]) + _read([row for row in mine if row["keep"] == keep]) for keep in parts}
    lines += [f"steps after {first['context']:,} tokens.", "", *(f"- {each}" for each in shown.values()), ""]
    lines += [f"| | batch | experts | dense, ms | {' | '.join(per_cent)} |", f"|{' --- |' * (4 + len(parts))}"]
    for what, how, batch in dict.fromkeys(key_of(row) for row in mine):
        alike = [row for row in rows if key_of(row) == (what, how, batch)]
        dense = median(row["ms"] for row in alike if row["model"] == "dense")
        for way in dict.fromkeys(row["implementation"] for row in alike if row["model"] != "dense"):
            cells = {row["keep"]: _cell(row) for row in alike if row["model"] != "dense" and row["implementation"] == way}
            added = f" of {alike[0]['prompt']:,}" if what == "prefill" else f", {how}" * ("graph" in how)
            named = f"{what}{added} | {batch} | {way} | {dense:,.2f}"
            lines.append(f"| {named} | {' | '.join(cells.get(keep, '') for keep in parts)} |")
    return "\n".join([*lines, "", *_fastest(rows, list(parts))]) + "\n"


def _fastest(rows: list[Row], keeps: list[float]) -> list[str]:
    """The same with each model in its fastest way, beside the dense one in its own: what a user can get."""
    lines = [f"| each in its fastest way | batch | dense, ms | {' | '.join(f'{100 * keep:g}%' for keep in keeps)} |"]
    lines += [f"|{' --- |' * (3 + len(keeps))}"]
    for what, batch in dict.fromkeys((row["what"], row["batch"]) for row in rows):
        cells, times = list[str](), list[float]()
        for keep in keeps:
            alike = [row for row in rows if (row["what"], row["batch"], row["keep"]) == (what, batch, keep)]
            best = [
                min((row for row in alike if row["model"] == model), key=lambda row: row["ms"]) for model in ("dense", "other")
            ]
            times.append(best[0]["ms"])
            cells.append(f"{best[0]['ms'] / best[1]['ms']:.2f}x ({' and '.join(dict.fromkeys(row['how'] for row in best))})")
        lines.append(f"| {what} | {batch} | {median(times):,.2f} | {' | '.join(cells)} |")
    return lines


def about(row: Row) -> str:
    """Of one model: its experts and bytes."""
    experts = f"{row['groups']} KV groups, "
    if "number" in row:
        beside = f" and {row['shared']:,} shared" if row["shared"] else ""
        experts += f"{row['top_k']} of {row['number']} experts of {row['width']:,} channels{beside}"
    else:
        experts += f"{row['width']:,} channels"
    return f"{100 * row['keep']:g}%: {experts}; {row['weight_bytes'] / 1e9:.1f} GB"


def _read(rows: list[Row]) -> str:
    """Experts that steps of each batch read, in the mean of the layers, and as many as the formula expects."""
    steps = {row["batch"]: row for row in rows if "experts_read" in row}
    if not steps:
        return ""
    read, expected = (", ".join(f"{row[key]:.2f}" for row in steps.values()) for key in ("experts_read", "experts_expected"))
    return f"; a step of {', '.join(map(str, steps))} rows reads {read} experts of a layer ({expected} expected)"


def _cell(row: Row) -> str:
    weights = f", {row['faster_by_weights']:.2f}" if row["what"] == "decode" else ""
    return f"{row['faster']:.2f}x ({row['faster_low']:.2f} to {row['faster_high']:.2f}; {row['faster_by_counts']:.2f}{weights})"


def main() -> None:
    """Measure, or only print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=sorted(json.loads((HERE / "shapes.json").read_text())))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5, 0.8, 0.6, 0.7], help="active part of the blocks")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="to compute experts")
    parser.add_argument("--tolerance", type=float, default=0.002, help="of that part; a small shape needs more")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt, at most")
    parser.add_argument("--tokens", type=int, default=4096, help="of all prompts of a batch, at most")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="of a graph, in one measurement")
    parser.add_argument("--launched", type=int, default=4, help="steps without a graph, in one measurement")
    parser.add_argument("--no-graphs", action="store_true", help="only steps that Python launches")
    parser.add_argument("--compile", nargs="+", type=int, default=[], help="of these batches compiled graphs alone")
    parser.add_argument("--look", action="store_true", help="only print where the GPU's time goes; no rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    if args.look:
        look(args)
        return
    if args.shape:
        rows_of(args)
    print(table(json.loads(args.rows.read_text())))


if __name__ == "__main__":
    main()

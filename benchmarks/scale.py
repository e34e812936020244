"""What several GPUs of a host are worth: the same steps by one process, and by several with the whole model each or a part.

    python benchmarks/scale.py llama-3-8b --processes 2 --rows docs/results/scale.json   # on as many GPUs
    python benchmarks/scale.py --rows docs/results/scale.json                            # only print the table

Each row is ATP from its first turn to its last, without what comes before and after (reading, drawing weights, measuring,
writing), in processes of its own; the peak is the largest of any process. What a process receives in a second is of gathers of
one tensor, before all that. All read the same batches, so losses must agree; a pass has the same windows everywhere, one
process makes more of them. Weights are random, of the true shape. The first step of a phase warms up and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cost import told

import slimtune
from slimtune.methods import atp
from slimtune.pipeline import Run
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, forget_peak, leave_group, machine, peak_memory, rank, seed_everything, world_size
from slimtune.version import versions

HERE = Path(__file__).parent
WAYS = {"one": "one process", "none": "whole model each (DDP)", "full": "a part each (FSDP2)"}


def recipe_of(args: argparse.Namespace, shard: str) -> Recipe:
    config = json.loads((HERE / "shapes.json").read_text())[args.shape]
    batch = args.batch * args.processes
    changes = ["model.path=''", "model.init=config", f"model.config={json.dumps(config)}", "model.tokenizer=builtin:base-10m"]
    changes += ["evaluate={}", "generator={}", "model.checkpointing=non_reentrant", f"data.max_length={args.window}"]
    changes += [f"train.batch={batch}", f"train.micro_batch={args.batch}", f"search.batch={batch}", "train.checkpoint_every=0"]
    changes += ["train.compile=false"]  # auto would have these compile, and not a sharded model
    changes += ["train.lr=1e-5", f"train.shard={shard}", "lora.rank=32", "budget.keep=0.6", f"search.steps={args.search}"]
    changes += [
        f"recover.steps={args.recover}",
        f"generator.prior_steps={args.prior}",
        f"out={args.out}/{args.shape}-{args.way}",
    ]
    return slimtune.load_recipe(HERE.parent / "recipes" / "demo.yaml", [*changes, *args.overrides])


def asked(row: dict[str, Any]) -> Recipe:
    """The recipe of a row, on GPUs."""
    told = {**row, "shape": row["model"], "out": "runs/scale", "overrides": row["overrides"].split()}
    told |= {"batch": row["micro_batch"], "processes": row["batch"] // row["micro_batch"]}
    return recipe_of(argparse.Namespace(**told), "full" if row["way"] == "full" else "none").model_copy(
        update={"device": "cuda"}
    )


def gathering(device: torch.device, count: int) -> float:
    """Bytes a second that a process receives while all gather ``count`` fp32 numbers of each: the median of five times."""
    own, seconds = torch.zeros(count, device=device), []
    whole = torch.empty(world_size() * count, device=device)
    for _ in range(7):
        begun = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, own)
        float(whole[-1])  # waits for it
        seconds.append(time.perf_counter() - begun)
    return (world_size() - 1) * own.nbytes / statistics.median(seconds[2:])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The row of this process group; every process of it must call this."""
    recipe = recipe_of(args, "full" if args.way == "full" else "none")
    run = Run(recipe, RunFolder(recipe.out), resume=False)
    run.check()
    seed_everything(recipe.seed)
    device = run.accelerator.device
    links = gathering(device, 2**26 if device.type == "cuda" else 2**22) if world_size() > 1 else 0.0
    load = atp.gated_model

    def loaded(session: Any) -> Any:  # rank 0 draws random weights whole; files it would read into host memory
        found = load(session)
        forget_peak(run.accelerator.device)
        return found

    atp.gated_model = loaded
    outcome, cost = run.train(atp.run, "main")
    peaks = torch.tensor(float(peak_memory(run.accelerator.device) or 0), device=run.accelerator.device)
    peak = float(run.accelerator.gather(peaks).max())
    lines = map(json.loads, (Path(recipe.out) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "step" in line]
    found: dict[str, Any] = {
        "way": args.way,
        "program": args.program,
        "model": args.shape,
        "gpu": machine(run.accelerator.device),
        "gpus": world_size(),
    }
    found |= {
        "batch": recipe.train.batch,
        "micro_batch": args.batch,
        "window": args.window,
        "seconds": cost["seconds"],
        "tokens": sum(outcome.tokens.values()),
    }
    found |= {name: getattr(args, name) for name in ("search", "recover", "prior")}
    found |= {"overrides": " ".join(args.overrides), "losses": " ".join(str(row["adapt_loss"]) for row in steps), **versions()}
    found |= {"peak_gib": peak / 2**30} if peak else {}
    found |= {"gathered_gb_per_second": links / 1e9} if links else {}
    for name, phase, turn in (("decide", "search", "decide"), ("adapt", "search", "adapt"), ("recover", "recover", "adapt")):
        taken = [row[f"{turn}_seconds"] for row in steps if row["phase"] == phase and row["step"]]
        found[f"{name}_seconds"] = statistics.median(taken)
        found[f"{name}_tokens_per_second"] = recipe.train.batch * args.window / found[f"{name}_seconds"]
    return found


def children(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of every way, each in processes of its own."""
    for way in args.ways:
        ranks = 1 if way == "one" else args.processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        target = Path(args.out) / f"row-{way}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way, "--row", str(target)]
        done = subprocess.run(
            command, check=False, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")}
        )
        if done.returncode:
            print(f"{way}: failed with {done.returncode}", flush=True)
        else:
            yield json.loads(target.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; factors and differences to one process with the same steps on the same machine."""
    lines = [
        "| way | program | model | GPUs | batch x window | decide, tokens/s | x one | adapt, gated | x one | recovery | x one |"
    ]
    lines = [f"{lines[0]} whole run, s | of one | peak, GiB | gathers, GB/s | losses differ by |", f"|{' --- |' * 16}"]
    same = ("program", "model", "gpu", "batch", "window", "overrides")
    alone = {tuple(row[key] for key in same): row for row in rows if row["way"] == "one"}
    for row in rows:
        one = alone.get(tuple(row[key] for key in same))
        cells = [
            WAYS[row["way"]],
            row["program"],
            row["model"],
            f"{row['gpus']} {row['gpu']}",
            f"{row['batch']} x {row['window']}",
        ]
        for name in (f"{turn}_tokens_per_second" for turn in ("decide", "adapt", "recover")):
            cells += [f"{row[name]:,.0f}", f"{row[name] / one[name]:.2f}" if one else ""]
        cells += [f"{row['seconds']:.1f}", f"{row['seconds'] / one['seconds']:.2f}" if one else ""]
        cells.append(f"{row['peak_gib']:.1f}" if "peak_gib" in row else "")
        cells.append(f"{row['gathered_gb_per_second']:.1f}" if "gathered_gb_per_second" in row else "")
        losses = [map(float, each["losses"].split()) for each in (row, one)] if one and one is not row else []
        pairs = list(zip(*losses, strict=True))
        cells.append(f"{max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs):.1e}" if pairs else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    """What the measurement is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(json.loads((HERE / "shapes.json").read_text()))
    parser.add_argument("shape", nargs="?", choices=shapes, help="without it: only print the table of --rows")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument(
        "--batch", type=int, default=8, help="windows of a pass, and of a step of each process where there are several"
    )
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--search", type=int, default=4)
    parser.add_argument("--recover", type=int, default=8)
    parser.add_argument("--prior", type=int, default=2)
    parser.add_argument("--program", default="", help="its name, where it is another than the present one")
    parser.add_argument("--out", default="runs/scale")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def main() -> None:
    args = parsed()
    if not args.way:
        told(args, children(args), table, ("way", "program", "model", "gpu", "gpus", "batch", "window", "overrides"))
        return
    row = measured(args)
    if rank() == 0:
        args.row.write_text(json.dumps(row))
    leave_group()


if __name__ == "__main__":
    main()

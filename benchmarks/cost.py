"""What a whole run costs beside plain LoRA on the dense model: the same tokens, the same data, one process.

    python benchmarks/cost.py llama-3-8b --rows docs/results/cost.json   # on a GPU
    python benchmarks/cost.py --rows docs/results/cost.json              # only print the table

``lora`` is transformers and PEFT alone, as a user would write it: LoRA on all linears of the blocks under bf16 autocast, fused
AdamW, gradient checkpointing, the model's own loss. ``atp`` is ``slimtune tune`` from its first to its last step. Weights are
random, of the true shape; what is read is the embedded text with the embedded tokenizer. Times begin with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kernel_times import looked_at
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import slimtune
from slimtune.comparison.program import commit
from slimtune.estimate import estimate
from slimtune.estimate.machines import sheet_of
from slimtune.methods import atp
from slimtune.methods.compensation import Compensation
from slimtune.methods.decide import Decider
from slimtune.methods.passes import Passes
from slimtune.methods.scores import Scorer
from slimtune.models.compiled import decided
from slimtune.pipeline import Run
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, forget_peak, machine, peak_memory, seed_everything
from slimtune.train import loop, offload
from slimtune.version import versions

HERE = Path(__file__).parent
Table = Callable[[list[dict[str, Any]]], str]
EARLIER = ("before", "compiled, a graph a width")
"""Rows of earlier programs: the estimate tells nothing of them."""


def recipe_of(args: argparse.Namespace) -> Recipe:
    """ATP on random weights of the shape; its recovery is as long as makes its tokens those of ``args.steps`` LoRA steps."""
    config = json.loads((HERE / "shapes.json").read_text())[args.shape]
    changes = ["model.path=''", "model.init=config", f"model.config={json.dumps(config)}", "model.tokenizer=builtin:base-10m"]
    changes += ["evaluate={}", "generator={}", "model.checkpointing=non_reentrant", f"data.max_length={args.window}"]
    changes += [f"train.batch={args.batch}", f"search.batch={args.batch}", "train.checkpoint_every=0", "train.lr=1e-5"]
    changes += [f"lora.rank={args.rank}", "budget.keep=0.6", f"search.steps={args.search}"]
    changes += [f"generator.prior_steps={args.prior}", f"out={args.out}/{args.shape}"]
    recipe = slimtune.load_recipe(HERE.parent / "recipes" / "demo.yaml", [*changes, *args.overrides])
    whole = args.steps * args.batch
    steps = (whole - recipe.decide_windows) // args.batch - recipe.search.steps
    if steps < 1:
        raise SystemExit(f"{recipe.decide_windows} of {whole} windows are for the decision: give more --steps")
    return recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"steps": steps})})


def plain(recipe: Recipe, run: Run, steps: int, probe: Callable[[int], Any]) -> Iterator[dict[str, float]]:
    """Steps of LoRA by transformers and PEFT alone: what each took, and its loss."""
    keys = dict(recipe.model.config)
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    device = run.accelerator.device
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    targets = [row.path for row in run.structure.family.linears]
    model = get_peft_model(model, LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.rank, target_modules=targets))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.train.lr, fused=device.type == "cuda")
    windows, batch = run.splits.train, recipe.train.batch
    model.train()
    yield {}
    for step in range(steps):
        begun = time.perf_counter()
        with probe(step):
            rows = windows.collate([index % len(windows) for index in range(step * batch, (step + 1) * batch)])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(rows["input_ids"].to(device), labels=rows["labels"].to(device), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.train.clip)
            optimizer.step()
            optimizer.zero_grad()
            value = float(loss.detach())
        yield {"loss": value, "seconds": time.perf_counter() - begun}


def measure_plain(recipe: Recipe, run: Run, steps: int, probe: Callable[[int], Any]) -> dict[str, Any]:
    """A row of plain LoRA."""
    device = run.accelerator.device
    forget_peak(device)
    steps_ = plain(recipe, run, steps, probe)
    next(steps_)
    begun = time.perf_counter()
    rows = list(steps_)
    seconds = time.perf_counter() - begun
    step = statistics.median(row["seconds"] for row in rows)
    return {"what": "lora", "seconds": seconds, "step_seconds": step, "loss": rows[-1]["loss"], **peak(device)} | {
        "tokens": steps * recipe.train.batch * recipe.data.max_length
    }


def peak(device: torch.device) -> dict[str, float]:
    """Of a GPU only."""
    memory = peak_memory(device)
    return {"peak_gib": memory / 2**30} if memory else {}


def resident(name: str) -> int:
    """Bytes of this process in host memory by a line of /proc/self/status: ``VmRSS`` now, ``VmHWM`` at most. 0 elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(found[1]) << 10 if found else 0


def measure_atp(recipe: Recipe, run: Run, probe: Callable[[str, str, int], Any]) -> dict[str, Any]:
    """A row of ATP, and where its time went, by phase and turn."""
    device = run.accelerator.device
    forget_peak(device)
    marks, before = dict[str, float](), resident("VmRSS")
    with timed(marks, probe):
        outcome = atp.run(run.session("main"))
        marks["end"] = time.perf_counter()
    lines = map(json.loads, (Path(recipe.out) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "step" in line]
    found: dict[str, Any] = {"what": "atp", "seconds": marks["end"] - marks["loaded"], **peak(device)}
    found["prepare_seconds"] = marks["search"] - marks["loaded"]
    found["host_gib"] = (resident("VmHWM") - before) / 2**30  # more than before, once in the process: of a run without lora's
    found |= {f"{name.removeprefix('of which ')}_seconds": value for name, value in marks.items() if "of which" in name}
    found["cut_seconds"] = marks["recover"] - marks["search"] - sum(row["seconds"] for row in steps if row["phase"] == "search")
    for phase in ("search", "recover"):
        rows = [row for row in steps if row["phase"] == phase]
        if not rows:
            continue
        found[f"{phase}_seconds"] = sum(row["seconds"] for row in rows)
        found[f"{phase}_step_seconds"] = statistics.median(row["seconds"] for row in rows)
        found[f"{phase}_steps"] = len(rows)
        for turn in ("decide", "adapt") if phase == "search" else ():
            found[f"{turn}_seconds"] = statistics.median(row[f"{turn}_seconds"] for row in rows if f"{turn}_seconds" in row)
    found |= {"loss": steps[-1]["adapt_loss"], "tokens": sum(outcome.tokens.values()), "keep": recipe.budget.keep}
    found["compiled"] = run.resolved.train.compile
    return found | {"parameters": sum(p.numel() for n, p in outcome.model.named_parameters() if "lora_" not in n)}


@contextmanager
def timed(marks: dict[str, float], probe: Callable[[str, str, int], Any]) -> Iterator[None]:
    """Note when the model is loaded and when each phase begins; let ``probe`` look at turns."""
    load, phase_of = atp.gated_model, atp.run_phase

    def loaded(session: Any) -> Any:
        found = load(session)
        torch.cuda.synchronize() if session.device.type == "cuda" else None
        marks["loaded"] = time.perf_counter()
        return found

    def phase(session: Any, what: loop.Phase, first: int = 0) -> None:
        marks[what.name] = time.perf_counter()
        marks.setdefault("of which first_solves", marks.get("of which solves", 0.0))
        turns = [replace(turn, run=watched(what.name, turn)) for turn in what.turns]
        phase_of(session, replace(what, turns=turns), first)

    def watched(name: str, turn: loop.Turn) -> loop.Step:
        def run(step: int) -> dict[str, Any]:
            with probe(name, turn.name, step):
                return {key: float(value) for key, value in turn.run(step).items()}

        return run

    parts: dict[str, tuple[Any, str]] = {"moments": (Passes, "second_moments"), "wanda": (Scorer, "wanda")}
    parts |= {"taylor": (Decider, "taylor"), "consumers": (Compensation, "__init__"), "solves": (Compensation, "_solve")}
    parts |= {"unlock": (offload, "_unlock")}
    saved = {name: getattr(owner, method) for name, (owner, method) in parts.items()}
    atp.gated_model, atp.run_phase = loaded, phase
    for name, (owner, method) in parts.items():
        setattr(owner, method, clocked(saved[name], marks, f"of which {name}"))
    try:
        yield
    finally:
        atp.gated_model, atp.run_phase = load, phase_of
        for name, (owner, method) in parts.items():
            setattr(owner, method, saved[name])


def clocked(function: Callable[..., Any], marks: dict[str, float], name: str) -> Callable[..., Any]:
    """``function``, whose seconds are added up; the GPU is waited for, as what is called here does several times itself."""

    def call(*args: Any, **rest: Any) -> Any:
        begun = time.perf_counter()
        found = function(*args, **rest)
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        marks[name] = marks.get(name, 0.0) + time.perf_counter() - begun
        return found

    return call


@contextmanager
def unseen(*_: Any) -> Iterator[None]:
    """No profile."""
    yield


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure what is asked for."""
    recipe = recipe_of(args)
    run = Run(recipe, RunFolder(recipe.out), resume=False)
    run.check()
    seed_everything(recipe.seed)
    search, profiled = recipe.search.steps, args.profile

    def of_lora(step: int) -> Any:
        return looked_at("plain LoRA") if profiled and step == 3 else unseen()

    def of_atp(phase: str, turn: str, step: int) -> Any:
        wanted = (phase == "search" and step in (1, search - 1)) or (phase == "recover" and step == 3)
        return looked_at(f"{phase}, {turn}, step {step}") if profiled and wanted else unseen()

    if run.accelerator.device.type == "cuda":  # what a process does once is nobody's
        measure_plain(recipe, run, 2, unseen)
    for what in args.what:
        gc.collect()
        torch.cuda.empty_cache()
        found = measure_plain(recipe, run, args.steps, of_lora) if what == "lora" else measure_atp(recipe, run, of_atp)
        name = args.name if args.name and what != "lora" else what
        shape = {"model": args.shape, "gpu": machine(run.accelerator.device), "gpus": 1}
        shape |= {"batch": args.batch, "window": args.window}
        if what != "lora" and not sheet_of(shape["gpu"]):  # else the table tells it
            shape |= expected(recipe, shape["gpu"])
        shape |= {"steps": args.steps, "prior": args.prior, "rank": args.rank}
        more = {"bitsandbytes": version("bitsandbytes")} if what != "lora" and recipe.model.quantize != "none" else {}
        yield {**found, "what": name, **shape, "overrides": " ".join(args.overrides), **versions(), **more}


def asked(row: dict[str, Any]) -> Recipe:
    """The recipe of a row that searched, on a GPU."""
    told = {"shape": row["model"], "search": row["search_steps"], "prior": 8, "rank": 32, "out": "runs/cost"}
    recipe = recipe_of(argparse.Namespace(**{**told, **row, "overrides": row["overrides"].split()}))
    compiled = row.get("compiled", "train.compile=true" in row["overrides"])
    return decided(recipe, compiled).model_copy(update={"device": "cuda"})


def renewed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the estimate says by now, where it knows the GPU."""
    known = row["what"] not in EARLIER and "search_steps" in row and sheet_of(row["gpu"])
    if known:
        return {**row, **expected(asked(row), row["gpu"])}
    return {key: value for key, value in row.items() if not key.startswith("expected_")}


def expected(recipe: Recipe, gpu: str) -> dict[str, float]:
    """What ``slimtune estimate`` says of the run, of a GPU by its data sheet."""
    sheet = sheet_of(gpu)
    found = estimate(recipe, gpu=sheet)
    memory = {"expected_peak_gib": sum(found.memory.values()) / 2**30} if sheet else {}
    steps = {f"expected_{phase.name}_step_seconds": phase.step_seconds or 0.0 for phase in found.phases}
    return {"expected_seconds": sum(phase.seconds or 0.0 for phase in found.phases), **steps, **memory}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; ratios to the plain LoRA of the same model, machine and size."""
    lines = ["| what | model | GPU | batch x window | M tokens | seconds | x LoRA | expected | peak, GiB | x LoRA | expected |"]
    lines.append(f"|{' --- |' * 11}")
    size = ("model", "gpu", "gpus", "batch", "window", "steps")
    lora = {tuple(row[key] for key in size): row for row in rows if row["what"] == "lora"}
    for row in map(renewed, rows):
        base = lora.get(tuple(row[key] for key in size), {})
        cells = [row["what"], row["model"], row["gpu"], f"{row['batch']} x {row['window']}", f"{row['tokens'] / 1e6:.2f}"]
        for key, digits in (("seconds", 1), ("peak_gib", 2)):
            both = key in row and key in base
            cells += [f"{row[key]:.{digits}f}" if key in row else "", f"{row[key] / base[key]:.2f}" if both else ""]
            cells.append(f"{row[f'expected_{key}']:.{digits}f}" if f"expected_{key}" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + times(rows)


def times(rows: list[dict[str, Any]]) -> str:
    """Where the seconds of runs that search went, as a Markdown table; a step's are medians."""
    parts = ("prepare", "moments", "taylor", "search", "decide", "adapt", "solves", "recover", "recover_step")
    lines = ["| what | model | GPU | steps | prepare | moments in it | Taylor in it | search | a decide turn | an adapt turn |"]
    lines = [f"{lines[0]} solves in all | recovery | a step |", f"|{' --- |' * 13}"]
    for row in rows:
        if "search_steps" in row:
            steps = f"{row['search_steps']} + {row['recover_steps']}"
            told = (f"{row[f'{part}_seconds']:.3g}" if f"{part}_seconds" in row else "" for part in parts)
            lines.append(f"| {' | '.join((row['what'], row['model'], row['gpu'], steps, *told))} |")
    return "\n".join(lines) + "\n"


def kept(file: Path | None, new: list[dict[str, Any]], same: tuple[str, ...]) -> None:
    """Write rows into a file in place of those that measured the same."""
    if file:
        rows = json.loads(file.read_text()) if file.exists() else []
        later = [tuple(row.get(key) for key in same) for row in new]
        rows = [row for row in rows if tuple(row.get(key) for key in same) not in later] + new
        file.write_text("[\n" + ",\n".join(json.dumps(item) for item in rows) + "\n]\n")


def parser(about: str) -> argparse.ArgumentParser:
    """What a measurement is told."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(json.loads((HERE / "shapes.json").read_text()))
    made.add_argument("shape", nargs="?", choices=shapes, help="without it: only print the table of --rows")
    made.add_argument("overrides", nargs="*", help="key=value, for atp")
    made.add_argument("--what", nargs="+", default=["lora", "atp"], choices=("lora", "atp"))
    made.add_argument("--name", help="of the atp row, where overrides make it another thing")
    made.add_argument("--steps", type=int, default=200, help="of plain LoRA; atp reads as many tokens in all")
    made.add_argument("--search", type=int, default=10, help="steps of the search")
    made.add_argument("--prior", type=int, default=8, help="decision batches for prior and moments")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--window", type=int, default=1024)
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--profile", action="store_true", help="where the GPU's time goes, for single steps")
    made.add_argument("--out", default="runs/cost")
    made.add_argument("--rows", type=Path)
    return made


def told(args: argparse.Namespace, rows: Iterator[dict[str, Any]], shown: Table, same: tuple[str, ...]) -> None:
    """Print rows as they come, keep them in ``--rows``, show their table; without a shape the table of ``--rows``."""
    if args.shape is None:
        if not args.rows:
            raise SystemExit("error: give a shape to measure, or --rows FILE whose table is to be printed")
        print(shown(json.loads(args.rows.read_text())))
        return
    new, by = [], commit()
    for row in rows:
        new.append({**row, "commit": by} if by else row)
        print(json.dumps(new[-1]), flush=True)
        kept(args.rows, new, same)
    print(shown(new))


def main() -> None:
    """Measure, print, write rows."""
    args = parser(__doc__ or "").parse_intermixed_args()
    told(args, rows_of(args), table, ("what", "model", "gpu", "gpus", "batch", "window", "steps", "search_steps"))


if __name__ == "__main__":
    main()

"""Speed at a model's true shape, with random weights: the dense one, and cuts of it with aligned and unaligned widths.

    python benchmarks/speed.py llama-3-8b --rows docs/results/speed.json    # on a GPU
    python benchmarks/speed.py llama-3.2-1b --gguf q8_0 --rows docs/results/speed.json   # llama.cpp, on the CPU
    python benchmarks/speed.py --rows docs/results/speed.json               # only print the tables

The cuts are what ``budget.keep`` makes of random scores: ``aligned`` (widths by layer, MLPs in multiples of 128, the default),
``uniform`` (equal widths, a stock class) and ``unaligned`` (widths by layer, to the channel). All are timed by turns in one
process, GGUF files each in a fresh one. Those have the vocabulary of the embedded base, for they need a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.resources import files as package
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from slimtune.bench import llama_runs
from slimtune.bench.measure import Rates, Settings, Subject, compared, key_of, measured
from slimtune.bench.torch_runs import Runs
from slimtune.bench.work import Work
from slimtune.export import gguf
from slimtune.export.huggingface import config_for
from slimtune.models.load import structure_of
from slimtune.models.surgery import cut
from slimtune.prune.solve import solve
from slimtune.runtime import machine
from slimtune.sections import BudgetConfig
from slimtune.version import versions

HERE = Path(__file__).parent
ASSETS = Path(str(package("slimtune"))) / "assets" / "base-10m"
CUTS: dict[str, dict[str, Any]] = {
    "aligned": {"ffn_multiple": 128},
    "uniform": {"ffn_multiple": 128, "layout": "uniform", "tolerance": 0.02},
    "unaligned": {"ffn_multiple": 1},
}


def cut_config(base: PreTrainedConfig, keep: float, seed: int, **budget: Any) -> PreTrainedConfig:
    """The config of ``base`` cut to ``keep`` by scores that differ by layer and by unit."""
    structure = structure_of(base)
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for layer, axis in structure.sites():
        units = structure.layers[layer].units[axis]
        scores[layer, axis] = 0.5 * torch.randn(1, generator=generator) + torch.randn(units, generator=generator)
    plan, _ = solve(scores, structure, BudgetConfig(keep=keep, **budget))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    cut(model, structure, plan)
    return config_for(base, plan, {name: tuple(each.shape) for name, each in model.named_parameters()})


def configs(args: argparse.Namespace, **more: Any) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The dense shape and its cuts by name."""
    keys = {**json.loads((HERE / "shapes.json").read_text())[args.shape], **more}
    base = AutoConfig.for_model(keys.pop("model_type"), **keys)
    yield "dense", base
    yield from ((name, cut_config(base, args.keep, args.seed, **CUTS[name])) for name in args.cuts)


def drawn(name: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of ``config`` with random weights."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    print(f"{name}: {type(model).__name__}, {sum(map(torch.numel, model.parameters())):,} parameters", flush=True)
    return model


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything; a row for each model, measurement and way to run it, with what it was taken on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = ((name, drawn(name, config, device, dtype)) for name, config in configs(args))
    taken = [Subject(name, Runs(model), Work.of(model)) for name, model in models]
    sizes = {subject.name: subject.work for subject in taken}
    batches, fuller = tuple(args.batches), [subject for subject in taken if subject.name != "unaligned"]
    head = {"shape": args.shape, "keep": args.keep, "seed": args.seed, "machine": machine(device), "dtype": str(dtype)[6:]}
    head |= {"prompt": args.prompt, "context": args.context, **Rates.of(device, dtype).told(), **versions()}
    say = partial(print, flush=True)
    found = measured(taken, Settings(batches, args.prompt, args.context, repeats=args.repeats), say)
    if args.compile and device.type == "cuda":  # half a minute a model and batch
        last = Settings(tuple(args.compile), args.prompt, args.context, 32, args.repeats, ("compiled graph",), prompts=False)
        found += measured(fuller, last, say)
    return [{**head, **row, "parameters": sizes[row["model"]].parameters, "seconds": short(row["seconds"])} for row in found]


def gguf_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of files in llama.cpp, by its own clocks: one row of tokens."""
    with tempfile.TemporaryDirectory(prefix="slimtune-speed-") as scratch:
        models = configs(args, **OF_ASSETS)
        files = {name: gguf_file(name, config, Path(scratch), args.gguf) for name, config in models}
        found = llama_runs.bench(files, Settings((1,), args.prompt, repeats=args.repeats), partial(print, flush=True))
    head = {"shape": args.shape, "keep": args.keep, "seed": args.seed, "dtype": args.gguf, "context": args.prompt}
    head |= {key: value for key, value in found.items() if key in ("machine", "prompt", "xllamacpp")}
    sizes = {model["name"]: model["parameters"] for model in found["models"]}
    return [{**head, **row, "parameters": sizes[row["model"]], "seconds": short(row["seconds"])} for row in found["rows"]]


OF_ASSETS = {"vocab_size": 6144, "bos_token_id": None, "eos_token_id": 0}
"""Of a shape with the embedded base's tokenizer, for a file needs one."""


def gguf_file(name: str, config: PreTrainedConfig, folder: Path, kind: str) -> Path:
    """A file of this kind, with random weights."""
    drawn(name, config, torch.device("cpu"), torch.bfloat16).save_pretrained(folder / name)
    for file in (ASSETS / "tokenizer.json", ASSETS / "tokenizer_config.json"):
        copyfile(file, folder / name / file.name)
    gguf.write(folder / name, folder / f"{name}.gguf", kind)
    rmtree(folder / name)
    return folder / f"{name}.gguf"


def short(seconds: list[float]) -> str:
    """Of all turns, as text: rows are flat."""
    return " ".join(f"{value:.5g}" for value in seconds)


def tables(rows: list[dict[str, Any]]) -> str:
    """Per shape and machine: how much faster the cuts are, and what their sizes allow, as Markdown."""
    return "\n".join(_table(rows, key) for key in dict.fromkeys(map(_group, rows)))


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["machine"], row["keep"]


def _table(rows: list[dict[str, Any]], key: tuple[Any, ...]) -> str:
    mine = [{**row, "seconds": [float(each) for each in row["seconds"].split()]} for row in rows if _group(row) == key]
    first, cuts = mine[0], [name for name in dict.fromkeys(row["model"] for row in mine) if name != "dense"]
    sizes = ", ".join(f"{row['model']} {row['parameters']:,}" for row in {row["model"]: row for row in mine}.values())
    known = "copy_gb_s" in first
    rates = Rates(1e9 * first["copy_gb_s"], 1e12 * first["matmul_tflops_s"]) if known else None
    best = f" ({first['copy_gb_s']:,.0f} GB/s copied, {first['matmul_tflops_s']:,.0f} TFLOP/s)" if known else ""
    lines = [f"{key[0]} shape, random weights, {first['dtype']}, {key[1]}{best}; parameters: {sizes}.", ""]
    lines += [f"| | batch | dense, ms | {' | '.join(cuts)} |", f"| --- | --- | --- |{' --- |' * len(cuts)}"]
    found = {name: {key_of(each): each for each in compared(mine, name, "dense", rates)} for name in cuts}
    for row in (row for row in mine if row["model"] == "dense"):
        cells = [_cell(found[name].get(key_of(row))) for name in cuts]
        how = "" if row["how"] in ("eager", "llama.cpp") else f", {row['how']}"
        lines.append(f"| {row['what']}{how} | {row['batch']} | {row['ms']:,.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    saved = f", {ratio['of_saved']:.2f}" if "of_saved" in ratio else ""
    return f"{ratio['faster']:.2f}x ({spread}; {ratio['of_size']:.2f}{saved})"


def main() -> None:
    """Measure and put the rows in place of earlier ones of the same shape and machine, or only print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=sorted(json.loads((HERE / "shapes.json").read_text())))
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0, help="of the random scores")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", nargs="*", type=int, default=[1, 32], help="batches whose decode is compiled, too")
    parser.add_argument("--gguf", metavar="KIND", help="GGUF files of this kind in llama.cpp instead")
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text()) if args.rows.exists() else []
    if args.shape:
        new = gguf_rows(args) if args.gguf else rows_of(args)
        same = ("shape", "keep", "machine")
        rows = [row for row in rows if any(row[key] != new[0][key] for key in same)] + new
        args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(tables(rows))


if __name__ == "__main__":
    main()

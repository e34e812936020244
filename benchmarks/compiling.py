"""What ``train.compile`` takes and gives where the layers of a cut model differ: a graph for each, or one of symbolic widths.

    python benchmarks/compiling.py llama-3-8b --rows docs/results/compiling.json                                # on a GPU
    python benchmarks/compiling.py cpu-size --layers 24 --window 64 --batch 2 --backend aot_eager               # tracing alone
    python benchmarks/compiling.py --rows docs/results/compiling.json                                           # only the table

Forward and backward passes of LoRA under bf16 autocast, by a model of random weights, each layer cut to widths that are drawn.
The first step compiles; nothing that was compiled before is used. Steps after it are medians. Gradients are held to those of
``fp32`` (no autocast, weights in fp32), which tells what of a difference is bf16's rounding, and of ``eager``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo as dynamo
from cost import HERE, told
from transformers import AutoConfig, AutoModelForCausalLM

from slimtune.models import compiled
from slimtune.models.load import attach_lora, enable_checkpointing, structure_of
from slimtune.models.surgery import cut
from slimtune.recipe import LoraConfig
from slimtune.runtime import machine
from slimtune.structure.plan import Plan
from slimtune.version import versions

WAYS = {"fp32": None, "eager": None, "a graph a width": 10**9, "symbolic": 0}
"""Ways, and how many different widths get a graph each."""
REFERENCES = ("fp32", "eager")


def cut_model(args: argparse.Namespace, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    """A model of random weights by ``seed``, of random widths that are always the same ones, and its structure."""
    keys = json.loads((HERE / "shapes.json").read_text())[args.shape]
    if args.layers:
        keys["num_hidden_layers"] = args.layers
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    structure, draw = structure_of(config), random.Random(0)
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = attach_lora(model, structure, LoraConfig(rank=args.rank), autocast=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)  # zeros would leave A without gradients
    enable_checkpointing(model, "non_reentrant")
    kept = []
    for layer in structure.layers:
        groups, rows = layer.units["kv_group"], layer.units["ffn"]
        part, multiple = draw.uniform(0.3, 0.8), max(1, rows // 112)
        kept.append({"kv_group": range(max(1, round(part * groups))), "ffn": range(round(part * rows / multiple) * multiple)})
    cut(model, structure, Plan.of(structure, kept))
    return model.train(), structure


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    torch.compiler.config.force_disable_caches = True
    device, known = torch.device("cuda" if torch.cuda.is_available() else "cpu"), dict[str, list[torch.Tensor]]()
    for way in args.ways:
        dynamo.reset()
        dynamo.utils.counters.clear()
        model, structure = cut_model(args, device)
        widths = compiled.different(model, structure)
        ids = torch.randint(model.config.vocab_size, (args.batch, args.window), device=device)
        weights = torch.randn(model.config.hidden_size, device=device, dtype=torch.bfloat16)
        if way == "fp32":
            model.float()
        with compiled.compiling(WAYS[way] is not None):
            if WAYS[way] is not None:
                compiled.MOST_GRAPHS = WAYS[way]
                compiled.compile_blocks(model, structure, args.backend)
            seconds = [step(model, ids, weights, way != "fp32") for _ in range(args.steps)]
        found = [each.grad.cpu() for each in model.parameters() if each.grad is not None]
        if way in REFERENCES:
            known[way] = found
        row = {"way": way, "model": args.shape, "layers": len(structure.layers), "widths": widths, "gpu": machine(device)}
        row |= {"first_seconds": seconds[0], "step_seconds": statistics.median(seconds[2:])}
        row |= {f"apart_{other}": apart(found, theirs) for other, theirs in known.items() if other != way}
        row |= {"graphs": dynamo.utils.counters["stats"]["unique_graphs"], "backend": args.backend}
        row |= {"batch": args.batch, "window": args.window}
        yield {**row, **versions()}


def step(model: Any, ids: torch.Tensor, weights: torch.Tensor, autocast: bool) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad()
    begun = time.perf_counter()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden * weights).sum(-1).float().square().mean().backward()
    torch.cuda.synchronize() if ids.is_cuda else None
    return time.perf_counter() - begun


def apart(found: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """By how much of their norm gradients of all LoRA factors differ from those of another way."""
    pairs = list(zip(found, theirs, strict=True))
    squares = [sum(float(each.double().square().sum()) for each in some) for some in ([a - b for a, b in pairs], theirs)]
    return float((squares[0] / squares[1]) ** 0.5)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    head = ("layers are compiled", "model", "layers", "of different widths", "machine", "graphs", "first step, s")
    more = ("a later one, s", "gradients differ from fp32's by", "from eager's by")
    lines = [f"| {' | '.join((*head, *more))} |", f"|{' --- |' * (len(head) + len(more))}"]
    for row in rows:
        backend = "" if row["way"] in REFERENCES or row["backend"] == "inductor" else f" ({row['backend']})"
        cells = [row["way"] + backend, *(str(row[key]) for key in ("model", "layers", "widths", "gpu", "graphs"))]
        cells += [f"{row['first_seconds']:.1f}", f"{row['step_seconds']:.3f}"]
        cells += [f"{row[f'apart_{other}']:.1e}" if f"apart_{other}" in row else "" for other in REFERENCES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parser(about: str, batch: int, window: int) -> argparse.ArgumentParser:
    """What a measurement of a cut model is told; the sizes by default."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = sorted(json.loads((HERE / "shapes.json").read_text()))
    made.add_argument("shape", nargs="?", choices=shapes, help="without it: only print the table of --rows")
    made.add_argument("--layers", type=int, help="default: the shape's")
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--window", type=int, default=window)
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--rows", type=Path)
    return made


def main() -> None:
    """Measure, print, write rows."""
    made = parser(__doc__ or "", batch=8, window=1024)
    made.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.add_argument("--steps", type=int, default=8)
    args = made.parse_args()
    told(args, measured(args), table, ("way", "model", "layers", "gpu", "backend", "batch", "window"))


if __name__ == "__main__":
    main()

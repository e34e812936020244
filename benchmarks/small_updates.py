"""What bf16 makes of LoRA's first small updates: eager layers lose some, compiled ones make too much of the smallest.

    python benchmarks/small_updates.py cpu-size --layers 8 --rows docs/results/small-updates.json   # 5 minutes on a CPU
    python benchmarks/small_updates.py --rows docs/results/small-updates.json                       # only print the table

A model of random weights, each layer cut to widths that are drawn (``compiling.py``), is tuned in fp32 for a few steps on
tokens drawn by Zipf's law. Its LoRA is then put into the same model with the base in bf16, under autocast, eager and compiled
(symbolic widths). What counts is the change of the loss on other such tokens, for each seed of weights and tokens. An output
of a layer's base weight is a bf16 number before LoRA's is added, and a sum that is rounded to bf16 is that number again where
LoRA's is less than half of its last place. Inductor adds both, and what comes after, in fp32 before it rounds, but can be told
to round where eager layers do.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
import torch._dynamo as dynamo
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from compiling import cut_model, parser
from cost import told
from torch import Tensor, nn

from slimtune.models import compiled
from slimtune.runtime import machine
from slimtune.version import versions

Factors = dict[str, Tensor]
SIZE = ("model", "layers", "gpu", "steps", "rate", "batch", "window")
SAME = (*SIZE, "way", "seed")


def factors_of(model: nn.Module) -> Factors:
    """All LoRA factors, as they are."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def put(factors: Factors, model: nn.Module) -> None:
    """Write ``factors`` into ``model``."""
    for name, parameter in model.named_parameters():
        if name in factors:
            parameter.copy_(factors[name])


def loss_of(model: Any, ids: Tensor, autocast: bool) -> Tensor:
    """Cross-entropy, from the logits on in fp32."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def tuned(model: nn.Module, start: Factors, batches: list[Tensor], rate: float) -> Factors:
    """LoRA's factors after a step of AdamW on each of ``batches``."""
    put(start, model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for ids in batches:
        optimizer.zero_grad()
        loss_of(model, ids, False).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return factors_of(model)


@torch.no_grad()
def losses(model: nn.Module, all_factors: list[Factors], ids: Tensor, autocast: bool) -> list[float]:
    """The loss under each of ``all_factors``."""
    found = []
    for factors in all_factors:
        put(factors, model)
        found.append(float(loss_of(model, ids, autocast)))
    return found


def of_seed(args: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each way and rate, of one model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, structure = cut_model(args, device, seed)
    start = {name: torch.zeros_like(each) if "lora_B" in name else each for name, each in factors_of(model).items()}
    vocabulary, draw = model.config.vocab_size, torch.Generator().manual_seed(seed + 1)
    zipf = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float32)

    def drawn() -> Tensor:
        return torch.multinomial(zipf, args.batch * args.window, True, generator=draw).view(args.batch, -1).to(device)

    held, batches, whole = drawn(), [drawn() for _ in range(args.steps)], copy.deepcopy(model).float()
    states = [start, *(tuned(whole, start, batches, rate) for rate in args.rates)]
    ways = {"fp32": losses(whole, states, held, False), "eager": losses(model, states, held, True)}
    compiled.MOST_GRAPHS = 0
    for way, rounded in (("compiled", False), ("compiled, rounded as eager", True)):
        dynamo.reset()
        with compiled.compiling(True), inductor_config.patch(emulate_precision_casts=rounded):
            compiled.compile_blocks(model, structure)
            ways[way] = losses(model, states, held, True)
    known = {"model": args.shape, "layers": len(structure.layers), "gpu": machine(device), "steps": args.steps}
    known |= {"batch": args.batch, "window": args.window, "rank": args.rank, "seed": seed}
    for way, (before, *after) in ways.items():
        for rate, loss in zip(args.rates, after, strict=True):
            yield {**known, "way": way, "rate": rate, "before": before, "after": loss, **versions()}


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all seeds."""
    for seed in args.seeds:
        yield from of_seed(args, seed)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table: means over seeds, and the share of what the same LoRA changes in fp32 with its deviation."""
    lines = [
        "| way | model | layers | machine | steps | rate | seeds | loss before | change | of fp32's |",
        f"|{' --- |' * 10}",
    ]
    change = {tuple(row[key] for key in SAME): row["after"] - row["before"] for row in rows}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in (*SIZE, "way")), []).append(row)
    for size, group in groups.items():
        first, changes = group[0], [change[*size, row["seed"]] for row in group]
        shares = [each / change[*size[:-1], "fp32", row["seed"]] for each, row in zip(changes, group, strict=True)]
        cells = [first["way"], first["model"], str(first["layers"]), first["gpu"], str(first["steps"]), f"{first['rate']:.0e}"]
        cells += [str(len(group)), f"{mean(row['before'] for row in group):.5f}", f"{mean(changes):.5f}"]
        spread = f" ± {stdev(shares):.2f}" if len(group) > 1 and first["way"] != "fp32" else ""
        cells.append(f"{mean(shares):.2f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write rows."""
    made = parser(__doc__ or "", batch=4, window=128)
    made.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3])
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = made.parse_args()
    told(args, measured(args), table, SAME)


if __name__ == "__main__":
    main()

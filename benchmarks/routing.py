"""Whether a run's written experts do what its gated model did: routes, perplexity, logits, in fp32 and in bf16.

    slimtune convert recipes/tomoe-demo.yaml
    python benchmarks/routing.py runs/tomoe-demo --rows docs/results/tomoe-routing.json
    python benchmarks/routing.py --rows docs/results/tomoe-routing.json    # only print the table

The gated model is built anew from the base, ``plan.json`` and the adapter. ``same_given``: the part of the tokens for which the
written model's routers choose the same experts from what the gated one's read, ``same``: from what they read themselves, in the
layer where that is least. ``same_stock``: how far the written model agrees with itself once transformers computes its experts
one by one and attention without a kernel, the same sums in another order. Text: full windows of the test split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimtune.comparison.program import commit
from slimtune.data.batches import load_splits
from slimtune.export import adapter, apply
from slimtune.methods.masked import routed
from slimtune.models.buffers import exact_buffers
from slimtune.models.load import load_config, load_tokenizer, structure_of
from slimtune.prune.router import Router
from slimtune.recipe import Recipe, load
from slimtune.runtime import machine
from slimtune.structure.experts import host_of
from slimtune.structure.plan import Plan

Row = dict[str, Any]


def rows_of(out: Path, count: int, device: torch.device, again: bool = True) -> list[Row]:
    """A row for each type of ``count`` windows; ``again``: the written model beside itself, too."""
    recipe = load(out / "recipe.yaml")
    ids = windows(recipe, count).to(device)
    told = {"run": out.name, "machine": machine(device), "windows": len(ids), "length": ids.shape[1], "commit": commit()}
    types = (torch.float32, torch.bfloat16)
    return [{**told, "dtype": str(dtype)[6:], **compared(out, recipe, ids, dtype, again)} for dtype in types]


def windows(recipe: Recipe, count: int) -> Tensor:
    """Full windows of the test split [B, T]."""
    test = load_splits(recipe.data, load_tokenizer(recipe.model), frozenset({"test"})).test
    every = (test.collate([index])["input_ids"] for index in range(len(test)))
    return torch.cat([each for each in every if each.shape == (1, recipe.data.max_length)][:count])


@torch.no_grad()
def compared(out: Path, recipe: Recipe, ids: Tensor, dtype: torch.dtype, again: bool) -> Row:
    """Of the gated model and the written one, both in ``dtype``."""
    folder = out / "adapter"
    plan, structure = Plan.from_json((out / "plan.json").read_text(encoding="utf-8")), structure_of(load_config(recipe.model))
    if plan.values:
        raise SystemExit(f"error: {out} has masks of tokens in its attention (moe.attention=tokens), which are not built here")
    model, _ = apply._built(recipe.model, structure, plan, folder, adapter.read_record(folder))
    exact_buffers(model.to(dtype), model.config)
    model = model.to(ids.device).eval()
    stored, first = load_file(folder / adapter.ROUTERS), plan.experts[0]
    host = host_of(structure.family, bool(first.shared))
    router = Router(structure.hidden, len(stored), len(first.routed), plan.top_k, host)
    router.start({int(layer): weight for layer, weight in stored.items()})
    router = router.rounded(dtype).to(ids.device)
    read, ours = list[Tensor](), list[Tensor]()
    logits_of, choose = router.logits, router.choose

    def reading(layer: int, x: Tensor) -> Tensor:
        read.append(x)
        return logits_of(layer, x)

    def choosing(logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = choose(logits)
        ours.append(chosen.flatten(0, 1).sort(-1).values)
        return chosen, weights

    router.logits, router.choose = reading, choosing  # type: ignore[method-assign]
    with routed(model, structure, plan, router):
        gated = model(input_ids=ids).logits.float()
    written = stock(out, ids, dtype)
    found, own = chosen_of(written, ids)
    given = [sorted_choice(each(x)) for each, x in zip(routers_of(written), read, strict=True)]
    row: Row = {
        "class": type(written).__name__,
        "difference": float((found - gated).abs().max() / gated.abs().max()),
        "ppl_gated": perplexity(gated, ids),
        "ppl_written": perplexity(found, ids),
        "same_given": min(same(a, b) for a, b in zip(ours, given, strict=True)),
        "same": min(same(a, b) for a, b in zip(ours, own, strict=True)),
    }
    if again:
        _, other = chosen_of(stock(out, ids, dtype, experts_implementation="eager", attn_implementation="eager"), ids)
        row["same_stock"] = min(same(a, b) for a, b in zip(own, other, strict=True))
    return row


def stock(out: Path, ids: Tensor, dtype: torch.dtype, **ways: str) -> Any:
    """The written model by transformers alone, where ``ids`` are."""
    return AutoModelForCausalLM.from_pretrained(out / "model", dtype=dtype, **ways).to(ids.device).eval()


def chosen_of(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] of a stock model and the experts of each layer [B T, k], sorted."""
    found: list[Tensor] = []
    hooks = [
        each.register_forward_hook(lambda _, __, output: found.append(sorted_choice(output))) for each in routers_of(model)
    ]
    logits = model(input_ids=ids).logits.float()
    for hook in hooks:
        hook.remove()
    return logits, found


def routers_of(model: Any) -> list[Any]:
    """Those of a stock model, from the first layer on."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def sorted_choice(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Experts [N, k] of what a router gives: logits, weights, experts."""
    return output[2].sort(-1).values


def same(ours: Tensor, theirs: Tensor) -> float:
    """The part of the tokens [N, k] that use the same experts."""
    return float((ours == theirs).all(-1).float().mean())


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """Of ``ids`` [B, T] by logits [B, T, V]."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


def table(rows: list[Row]) -> str:
    """As Markdown."""
    head = (
        "run",
        "class",
        "type",
        "tokens",
        "largest logit off by",
        "perplexity, gated",
        "written",
        "same experts, inputs given",
        "its own",
        "itself, otherwise computed",
    )
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [row["run"], row["class"], row["dtype"], f"{row['windows'] * row['length']:,}", f"{row['difference']:.1e}"]
        cells += [f"{row[key]:.4f}" for key in ("ppl_gated", "ppl_written")]
        cells += [f"{row[key]:.2%}" for key in ("same_given", "same", "same_stock")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    rows: list[Row] = json.loads(args.rows.read_text()) if args.rows.exists() else []
    for out in args.runs:
        new = rows_of(out, args.windows, torch.device(args.device))
        rows = [row for row in rows if (row["run"], row["machine"]) != (new[0]["run"], new[0]["machine"])] + new
        args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(table(rows))


if __name__ == "__main__":
    main()

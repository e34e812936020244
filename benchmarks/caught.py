"""How much of what channels add the routed ones of a split catch, and how much the best fixed ones, on text it has not seen.

    python benchmarks/caught.py recipes/tomoe-demo.yaml recipes/tomoe-health.yaml --rows docs/results/tomoe-caught.json
    python benchmarks/caught.py --rows docs/results/tomoe-caught.json    # only print the table

Of a token and a channel that is e = (h |W_down|)^2, the square of what it adds to the stream. The split is the one that a run
of the recipe begins with, from decision rows; measured is the base on validation rows, in each layer as a part of what the best
channels of each single token would catch, as many as the token uses. ``routed``: shared expert and chosen ones; ``fixed``:
those that catch most on decision rows; ``fixed_seen``: those that catch most on the very rows it is measured on, which no cut
of as many channels in each layer can beat.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.comparison.program import commit
from slimtune.data.batches import load_splits
from slimtune.methods import routes
from slimtune.methods.passes import Passes
from slimtune.methods.tomoe import _ToMoE
from slimtune.models.load import load_config, load_tokenizer, structure_of
from slimtune.recipe import load
from slimtune.runtime import Metrics, RunFolder, machine
from slimtune.structure.axes import FFN
from slimtune.train.progress import Progress
from slimtune.train.session import Session, make_accelerator

Row = dict[str, Any]


@torch.no_grad()
def rows_of(file: Path, keep: float, folder: str, *words: str) -> list[Row]:
    """A row for each layer of the recipe's base; ``words`` change the recipe."""
    recipe = load(file, [f"out={folder}", f"budget.keep={keep}", *words])
    structure, run = structure_of(load_config(recipe.model)), RunFolder(folder)
    splits = load_splits(recipe.data, load_tokenizer(recipe.model), frozenset({"train", "decision", "valid"}))
    accelerator = make_accelerator(recipe)
    session = Session(recipe, accelerator, structure, splits, run, Metrics(run), Progress(), valid_figures=lambda _: {})
    method, config = _ToMoE(session), recipe.moe
    experts = method.experts
    routes.prior_of(session, method.model, method.bank, method.decision, experts)
    masks = experts.fixed(experts.plan())
    method.bank.open()
    batch = recipe.search.batch or recipe.train.batch
    most = max(1, config.prior_tokens // config.prior_steps)
    seen, unseen = (
        routes._read(session, method.model, Passes(session, method.model, batches, config.prior_steps), most)
        for batches in (method.decision, session.batches(splits.valid, "caught", batch))
    )
    told = {"recipe": file.stem, "keep": keep, "seed": recipe.seed, "machine": machine(session.device), "commit": commit()}
    rows = []
    for layer in range(len(structure.layers)):
        weights = experts.router.combined(layer, unseen[1][layer][None])[0]
        routed = (weights > 0).float() @ masks[layer, FFN][1:] + masks[layer, FFN][0]
        parts = caught(unseen[0][layer].float(), routed, seen[0][layer].float().sum(0), experts.shape.active)
        rows.append({**told, "layer": layer, "active": experts.shape.active, "tokens": len(weights), **parts})
    return rows


def caught(energy: Tensor, routed: Tensor, before: Tensor, active: int) -> dict[str, float]:
    """Parts of ``energy`` [T, F] that channels catch, of what the ``active`` best of each token would.

    Args:
        routed: 0/1 [T, F].
        before: energies of the channels [F] on other text.
    """
    most = float(energy.topk(active, 1).values.sum())
    return {
        "routed": float((energy * routed).sum()) / most,
        "fixed": float(energy[:, before.topk(active).indices].sum()) / most,
        "fixed_seen": float(energy.sum(0).topk(active).values.sum()) / most,
    }


def table(rows: list[Row]) -> str:
    """Of each recipe and budget the least, mean and largest part over its layers."""
    lines = ["| recipe | keep | channels of a token | routed | fixed | fixed, seen |", "| --- | --- | --- | --- | --- | --- |"]
    for recipe, keep in dict.fromkeys((row["recipe"], row["keep"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["keep"]) == (recipe, keep)]
        cells = (_spread([row[name] for row in own]) for name in ("routed", "fixed", "fixed_seen"))
        lines.append(f"| {recipe} | {keep} | {own[0]['active']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(parts: list[float]) -> str:
    return f"{sum(parts) / len(parts):.1%} ({min(parts):.1%} to {max(parts):.1%})"


def main() -> None:
    """Measure, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    rows: list[Row] = json.loads(args.rows.read_text()) if args.rows.exists() else []
    for file in args.recipes:
        for keep in args.keep:
            with tempfile.TemporaryDirectory() as folder:
                new = rows_of(file, keep, folder)
            rows = [row for row in rows if (row["recipe"], row["keep"]) != (file.stem, keep)] + new
            args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(table(rows), end="")


if __name__ == "__main__":
    main()

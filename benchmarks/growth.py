"""How time and memory of ATP grow with windows, batch, layers and what is pruned, beside plain LoRA of the same size.

    python benchmarks/growth.py llama-3-8b --layers 8 --rows docs/results/growth.json   # on a GPU
    python benchmarks/growth.py cpu-size --window 64 --batch 2                          # ratios on a CPU
    python benchmarks/growth.py --rows docs/results/growth.json                         # only print the table

From one size, one of the four is changed at a time. All are measured in one process: plain LoRA (transformers and PEFT alone,
as in cost.py), then a decide turn, an adapt turn while gates are closed, and a step of recovery; medians. The text is drawn.
"""

from __future__ import annotations

import json
import random
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost import HERE, parser, recipe_of, rows_of, told

from slimtune.recipe import Recipe
from slimtune.version import versions

FACTORS = (0.5, 1.0, 2.0, 4.0)
KEEPS = (0.8, 0.6, 0.4)
START = {"steps": 12, "search": 3, "prior": 1}
AXES = ("window", "batch", "layers", "keep")
TURNS = ("decide", "adapt", "recover_step")
PREPARED = ("prepare", "moments", "wanda", "taylor", "consumers", "first_solves")


def drawn_text(folder: Path, window: int) -> str:
    """A file of random words: reading a corpus would take longer than the steps."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(5000)]
    rows = [{"text": " ".join(draw.choices(words, k=window))} for _ in range(160)]
    file = folder / "drawn.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def sizes(args: Namespace) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(what is changed, to what, changes): the size that is asked for once for each."""
    for axis in args.axes:
        start = {"window": args.window, "batch": args.batch, "layers": args.layers}.get(axis)
        for value in KEEPS if start is None else [max(1, int(start * factor)) for factor in FACTORS]:
            yield axis, value, {axis: value}


def measured(args: Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size; that which all start from is measured once."""
    known = dict[tuple[Any, ...], dict[str, Any]]()
    start = {"window": args.window, "batch": args.batch, "layers": args.layers, "keep": 0.6}
    with tempfile.TemporaryDirectory() as name:
        text = drawn_text(Path(name), int(args.window * max(FACTORS)))
        for axis, value, changes in sizes(args):
            size = {**start, **changes}
            key = tuple(size.values())
            if key not in known:
                known[key] = at(args, size, text, name)
            yield {"axis": axis, "value": value, **known[key]}


def words_of(shape: str, size: dict[str, Any]) -> list[str]:
    """What makes a model of a size, and a budget."""
    config = json.loads((HERE / "shapes.json").read_text())[shape]
    model = json.dumps({**config, "num_hidden_layers": size["layers"], "max_position_embeddings": 2**15})
    return [f"model.config={model}", f"budget={{keep: {size['keep']}, of: block, tolerance: 0.02}}", "train.compile=false"]


def asked(row: dict[str, Any]) -> Recipe:
    """The recipe of a row, on a GPU."""
    told = {**row, **START, "shape": row["model"], "rank": 32, "out": "runs/cost", "overrides": words_of(row["model"], row)}
    return recipe_of(Namespace(**told)).model_copy(update={"device": "cuda"})


def at(args: Namespace, size: dict[str, Any], text: str, folder: str) -> dict[str, Any]:
    """What plain LoRA and the turns of ATP take at one size."""
    words = [*words_of(args.shape, size), f"data.train={text}", "data.on_overlap=drop", *args.overrides]
    told = {"window": size["window"], "batch": size["batch"], "overrides": words, "out": folder, "profile": False}
    lora, atp = rows_of(Namespace(**{**vars(args), **told}))
    row = {"model": args.shape, "gpu": lora["gpu"], **size, "lora_seconds": lora["step_seconds"], **versions()}
    row |= {f"{part}_seconds": atp[f"{part}_seconds"] for part in PREPARED}
    row |= {f"{turn.removesuffix('_step')}_seconds": atp[f"{turn}_seconds"] for turn in TURNS}
    return row | {f"{each['what']}_peak_gib": each["peak_gib"] for each in (lora, atp) if "peak_gib" in each}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table: plain LoRA's own, and what the turns of ATP take of it."""
    lines = [
        "| changed | to | LoRA step, s | decide | adapt, gated | recovery | LoRA peak, GiB | ATP peak |",
        f"|{' --- |' * 8}",
    ]
    for row in rows:
        cells = [row["axis"], f"{row['value']:g}", f"{row['lora_seconds']:.3f}"]
        cells += [f"{row[f'{turn}_seconds'] / row['lora_seconds']:.2f}x" for turn in ("decide", "adapt", "recover")]
        peaks = "atp_peak_gib" in row
        cells += [f"{row['lora_peak_gib']:.2f}", f"{row['atp_peak_gib'] / row['lora_peak_gib']:.2f}x"] if peaks else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write rows."""
    made = parser(__doc__ or "")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    made.set_defaults(**START)
    args = made.parse_intermixed_args()
    told(args, measured(args), table, ("model", "gpu", "axis", "value"))


if __name__ == "__main__":
    main()

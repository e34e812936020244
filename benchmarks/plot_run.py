"""Draw a run: validation perplexity and kept share of the parameters, step by step.

    python benchmarks/plot_run.py runs/demo docs/demo.svg

Reads metrics.jsonl and summary.json of the run folder; needs ``evaluate.every``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt


def series(rows: list[dict[str, Any]], stage: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Steps counted over the phases of a stage, and its rows."""
    mine = [row for row in rows if row.get("stage") == stage and "step" in row]
    return list(range(1, len(mine) + 1)), mine


def main() -> None:
    """Read the run, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((args.run / "summary.json").read_text())
    plt.rcParams.update({"svg.hashsalt": "slimtune", "font.size": 9})
    figure, left = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    right = left.twinx()
    for stage, label, colour in (("dense_lora", "dense LoRA", "tab:gray"), ("main", "slimtune", "tab:blue")):
        steps, mine = series(rows, stage)
        points = [(step, row["valid_ppl"]) for step, row in zip(steps, mine, strict=True) if "valid_ppl" in row]
        if points:
            left.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=f"{label}, validation perplexity")
    steps, mine = series(rows, "main")
    right.plot(steps, [100 * row["kept"] for row in mine], color="tab:orange", lw=1, label="slimtune, parameters kept")
    cut = next((step for step, row in zip(steps, mine, strict=True) if row["phase"] == "recover"), None)
    if cut:
        left.axvline(cut, color="black", lw=0.7, ls=":")
        left.annotate("cut", (cut, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    left.set(xlabel="step", ylabel="perplexity")
    right.set(ylabel="% of all parameters", ylim=(0, 105))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="upper right", frameon=False)
    told = {"untuned base": summary["base"], "result": summary["result"]}
    figures = ", ".join(f"{name} {found['ppl']:.1f}" for name, found in told.items() if "ppl" in found)
    left.set_title(f"test perplexity: {figures}", loc="left", fontsize=9)
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()

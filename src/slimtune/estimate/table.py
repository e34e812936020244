"""An Estimate as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from slimtune.estimate.build import Estimate
from slimtune.estimate.cost import windows
from slimtune.recipe import Recipe
from slimtune.runtime import world_size


def render(estimate: Estimate, recipe: Recipe, console: Console | None = None) -> None:
    """Print structure, sizes, phases and memory."""
    out = console or Console()
    out.print(_units(estimate))
    out.print(_sizes(estimate, recipe))
    out.print(_phases(estimate))
    out.print(_memory(estimate))
    if short := _short(estimate, recipe):
        out.print(f"[yellow]{short}[/yellow]", highlight=False)
    out.print(_footnote(estimate), highlight=False)


def _units(estimate: Estimate) -> Table:
    table = Table(title=f"What can be cut: {estimate.model_type}", title_justify="left")
    axes = list(estimate.units[0][1])
    for name in ("layers", *axes):
        table.add_column(name, justify="right")
    for layers, units in estimate.units:
        table.add_row(layers, *(f"{units[axis]:,}" for axis in axes))
    return table


def _sizes(estimate: Estimate, recipe: Recipe) -> Table:
    target = f"budget.keep={recipe.budget.keep} of {recipe.budget.of}" if recipe.prunes else "after (nothing is cut)"
    table = Table("parameters", title="Size", title_justify="left")
    columns = {"before": estimate.before, target: estimate.after, "smallest possible": estimate.smallest}
    if estimate.active:
        columns = {"before": estimate.before, "stored": estimate.after, f"a token uses: {target}": estimate.active}
    for name in columns:
        table.add_column(name, justify="right")
    sizes = [size for size in columns.values() if size]
    table.add_row("total", *(f"{size.total:,} ({size.total_ratio:.3f})" for size in sizes))
    table.add_row("in prunable units", *(f"{size.block:,} ({size.block_ratio:.3f})" for size in sizes))
    table.add_row("LoRA", f"{estimate.lora_params:,}", f"{estimate.lora_params_after:,}", "")
    table.add_row("generator", f"{estimate.generator_params:,}", "", "")
    return table


def _phases(estimate: Estimate) -> Table:
    table = Table("phase", title="Work", title_justify="left")
    for name in ("steps", "tokens of all turns", "TFLOP", "expected time"):
        table.add_column(name, justify="right")
    for phase in estimate.phases:
        cells = (f"{phase.steps:,}", f"{phase.tokens:,}", f"{phase.flops / 1e12:,.1f}", _clock(phase.seconds))
        table.add_row(phase.name, *cells)
    return table


def _memory(estimate: Estimate) -> Table:
    ranks = world_size()
    whose = f"of one of {ranks} processes" if ranks > 1 else "of one process"
    table = Table(whose, title="Memory, fullest phase", title_justify="left")
    table.add_column("GB", justify="right")
    for name, size in estimate.memory.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    table.add_row("sum", f"{sum(estimate.memory.values()) / 1e9:,.2f}", style="bold")
    if estimate.machine and estimate.machine.memory:
        table.add_row(f"{estimate.machine.name} has", f"{estimate.machine.memory / 1e9:,.2f}")
    for name, size in estimate.host_memory.items():
        table.add_row(f"host, all processes: {name}", f"{size / 1e9:,.2f}")
    return table


def _short(estimate: Estimate, recipe: Recipe) -> str | None:
    """What to do where the memory of the GPU is not enough."""
    machine, needed = estimate.machine, sum(estimate.memory.values())
    if not machine or not machine.memory or needed <= machine.memory:
        return None
    ways = ["a smaller train.micro_batch"] if windows(recipe, recipe.train.batch)[1] > 1 else []
    ways += ["model.checkpointing=non_reentrant"] if recipe.model.checkpointing == "none" else []
    ways += ["model.quantize=nf4"] if recipe.model.quantize == "none" and recipe.train.shard == "none" else []
    ways += ["train.shard=full on several processes (--processes)" if recipe.train.shard == "none" else "more processes"]
    return f"That is {needed / machine.memory:.2f} times what the {machine.name} has: try {', '.join(ways)}."


def _footnote(estimate: Estimate) -> str:
    if estimate.machine is None:
        what = f"{estimate.device}, {estimate.dtype}"
        return f"Nothing was timed for {what} here: no time is expected; --gpu names a GPU of which it is."
    how = ", with compiled blocks" if estimate.compiled else ""
    return (
        f"Expected on {estimate.machine.name}, {estimate.dtype}{how}, by {estimate.machine.told}. In it are steps (a GPU's "
        "kernels, or the host's launching where that takes longer), what is read before the search, fits and compiling; "
        "evaluation, data, loading, freeze and cut, writing, and what processes send one another are not. The formulas stand "
        "in slimtune/estimate/."
    )


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a run hands over: the merged model's folder, reloaded and measured, the plan, and the adapter that rebuilds it."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.markup import escape
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from slimtune.data.batches import Splits
from slimtune.errors import UserError
from slimtune.evaluate.figures import Measure
from slimtune.evaluate.perplexity import Influences
from slimtune.export import adapter, card, card_facts, huggingface
from slimtune.export.verify import sample, verify
from slimtune.methods.masked import routed
from slimtune.methods.outcome import Outcome
from slimtune.models import moe
from slimtune.models.identity import weight_bytes
from slimtune.models.load import attention_of, straight_to, without_flash
from slimtune.models.piecewise import in_fp32
from slimtune.models.quantized import to_measure, unquantized
from slimtune.models.sharded import gathered, is_sharded, sharded, template_of
from slimtune.models.surgery import merge_lora
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, pick_dtype, rank, writing
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan, count
from slimtune.train.progress import Progress
from slimtune.train.session import Figures, shards

RELOAD_LIMIT = 1e-4
"""Largest allowed difference of the reloaded model's logits, relative to the largest logit. A tighter, absolute one would
throw away long runs for the rounding of fp32 sums, which grows with the logits; what is above it absolutely is told."""


@dataclass(frozen=True)
class Made:
    """The parts of a run that its export needs."""

    recipe: Recipe
    config: PreTrainedConfig
    structure: Structure
    folder: RunFolder
    splits: Splits
    figures: Measure
    accelerator: Accelerator
    progress: Progress


def deliver(run: Made, outcome: Outcome, figures: dict[str, Figures]) -> tuple[Figures, float | None]:
    """Merge in fp32, round once to the export dtype, write, reload in a fresh process, measure what was written.

    The outcome's model is used up: its weights are merged and rounded where they are, one by one, and given free when written.

    Args:
        figures: of the base and the dense reference, for the card.

    Returns:
        Figures of the written model, and by how much its logits differ after a reload (None: not checked).
    """
    gc.collect()  # a method's parts know one another: its teacher, an uncut model, would stay until chance takes it
    target, total = run.folder / "model", count(run.structure, outcome.plan).total
    plan = _noted(run, outcome.plan)
    if run.recipe.model.quantize != "none":
        unquantized(outcome.model)
    model, differences = gathered(outcome.model), list[float]()
    if model is not None:
        differences += _written(run, model, replace(outcome, plan=plan), total)
    run.folder.write_text("plan.json", plan.to_json())
    del model
    if not is_sharded(outcome.model):
        outcome.model.to("meta")  # what was written is loaded now
    difference = differences[0] if differences else None
    run.accelerator.wait_for_everyone()
    result, influences = _measured(run, outcome.plan, target)
    run.folder.write_json("windows.json", asdict(influences))
    if rank() == 0:
        with writing(target / "README.md"):
            card.write(target, _facts(run, total, {**figures, "result": result}, difference), plan)
    return result, difference


def _written(run: Made, model: Any, outcome: Outcome, total: int) -> list[float]:
    """What rank 0 alone does with the whole model; by how much it differs after a reload, if that is asked for."""
    recipe, target, dtype, plan = run.recipe, run.folder / "model", export_dtype(run.recipe, run.config), outcome.plan
    tuned, router, values = recipe.export.adapter and isinstance(model, PeftModel), outcome.router, outcome.values
    routers = list(router.cpu().rounded(dtype).weights) if router else []
    modules = values.cpu().rounded(dtype).tensors() if values else {}
    bound = adapter.taken(model, recipe.model, run.structure, plan, routers, modules) if tuned else None
    model = merge_lora(model, dtype)
    differences = list[float]()
    run.progress.say(f"writing {escape(str(target))} ...")
    model = without_flash(model.cpu()).eval()
    laid = None
    if routers:
        weights = moe.tensors_of(model, run.structure, plan, routers, modules)
        laid = moe.config_of(run.config, run.structure, moe.Layout.of(plan)), weights
    check = (lambda written: differences.append(_verify(run, model, written, outcome))) if recipe.export.verify else None
    huggingface.save(model, recipe.model, plan, target, dtype, _facts(run, total, {}, None), check, run.progress.say, laid)
    if not recipe.export.adapter:  # one of before would be of other weights
        shutil.rmtree(run.folder / adapter.FOLDER, ignore_errors=True)
    if bound:
        adapter.write(run.folder / adapter.FOLDER, bound, adapter.digest_of(model, dtype), dtype)
    return differences


def export_dtype(recipe: Recipe, config: PreTrainedConfig) -> torch.dtype:
    """Of the written weights."""
    if (name := recipe.export.dtype) != "auto":
        found: torch.dtype = pick_dtype(name, "cpu")
        return found
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) and recipe.model.init == "pretrained" else torch.float32


def _noted(run: Made, plan: Plan) -> Plan:
    ratio = count(run.structure, plan).total_ratio
    return replace(
        plan, notes={"base": card_facts.public(run.recipe.model.path), "seed": run.recipe.seed, "total_ratio": ratio}
    )


def _measured(run: Made, plan: Plan, target: Path) -> tuple[Figures, Influences]:
    recipe, influences = run.recipe, Influences()
    loaded = _loaded(run, target)
    made = type(loaded.template() if is_sharded(loaded) else loaded)
    kind = made.__name__
    if recipe.budget.layout == "uniform" and not made.__module__.startswith("transformers."):
        run.progress.say(
            f"[yellow]no stock class takes these equal widths, so the model is a {kind}, which the folder carries; "
            "another budget.keep or a wider budget.tolerance may give head counts that one takes[/yellow]"
        )
    active = count(run.structure, plan, active=True)
    figures = {
        "class": kind,
        **run.figures.test(loaded, influences),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "block_ratio": count(run.structure, plan).block_ratio,
        "bytes": weight_bytes(target),
        **({"active_parameters": active.total, "active_ratio": active.block_ratio} if plan.experts else {}),
    }
    return figures, influences


def _loaded(run: Made, target: Path) -> Any:
    """The written model, where and as the base was measured."""
    device = run.accelerator.device
    dtype, how = pick_dtype(run.recipe.model.dtype, str(device)), attention_of(run.recipe.model, run.config)

    def read(**where: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(target, dtype=dtype, local_files_only=True, **how, **where)

    if run.recipe.model.quantize != "none":
        return to_measure(read(), run.structure, device)
    if not shards(run.recipe, run.accelerator):
        return read(**straight_to(str(device)))
    template = template_of(AutoConfig.from_pretrained(target, local_files_only=True), dtype, **how)
    return sharded(template, run.structure, device, read() if rank() == 0 else None)


def _facts(run: Made, parameters: int, figures: dict[str, Figures], difference: float | None) -> dict[str, Any]:
    return card_facts.facts(run.recipe, run.structure.total_params, parameters, figures, difference)


@torch.no_grad()
def _verify(run: Made, model: nn.Module, target: Path, outcome: Outcome) -> float:
    ids = sample(run.splits.test.collate([0])["input_ids"][:, :64], run.config.vocab_size)
    router, values = outcome.router, outcome.values
    own = routed(model, run.structure, outcome.plan, router, values) if router else nullcontext()
    with run.figures.eager(), in_fp32(model), own:
        expected = model(input_ids=ids, use_cache=False).logits
    difference = verify(target, ids, expected)
    if difference > RELOAD_LIMIT * float(expected.abs().max()):
        raise UserError(
            f"the written model computes something else than the one in memory: logits differ by {difference:.1e}; "
            "nothing was replaced, and the trained weights are in the checkpoint (--resume writes them again)"
        )
    note = f"reload: logits of a fresh process differ by {difference:.1e}"
    run.progress.say(note if difference <= RELOAD_LIMIT else f"[yellow]{note}[/yellow]")
    return difference

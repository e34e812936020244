"""What a run reads and expects before its first step: its data, checked against the model, and what its phases will cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from slimtune.data.batches import Splits, load_splits
from slimtune.errors import UserError
from slimtune.estimate import check_experts, job_of, phases, present, with_compiling, with_room
from slimtune.evaluate.rows import held_out
from slimtune.evaluate.tasks import find_task
from slimtune.models.load import check_weights, load_config, locate
from slimtune.models.quantized import check_bitsandbytes, check_quantizable
from slimtune.prune.depth import drop_layers
from slimtune.prune.solve import check_budget
from slimtune.recipe import Recipe
from slimtune.runtime import pick_precision
from slimtune.sections import DataConfig
from slimtune.structure.axes import Structure
from slimtune.structure.families import check_biases
from slimtune.train.progress import Progress


def read(recipe: Recipe, vocabulary: int, tokenizer: Any, progress: Progress) -> Splits:
    """The splits of a recipe, tokenised; what was left out is told.

    Args:
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: the data cannot be read, do not fit the model, or leave nothing to measure.
    """
    if unread := idle(recipe):
        progress.say(f"[yellow]no effect with method={recipe.method}: {', '.join(unread)}[/yellow]")
    progress.say("reading and tokenising data ...")
    need = frozenset({"train", "valid", "test", *(["decision"] if recipe.prunes else [])})
    splits = load_splits(guarded(recipe), tokenizer, need)
    _check_vocabulary(splits, vocabulary, tokenizer)
    sizes = ", ".join(f"{name} {count:,} rows" for name, count in splits.rows.items())
    progress.say(f"data: {sizes}")
    if splits.notes:
        left_out = ", ".join(f"{name.replace('.', ' ')} {count:,}" for name, count in sorted(splits.notes.items()))
        progress.say(f"[yellow]rows left out or cut: {left_out}[/yellow]")
    if splits.in_train:
        parts = ", ".join(f"{name} {percent:.1f}%" for name, percent in splits.in_train.items())
        progress.say(f"runs of {recipe.data.ngram} words that also stand somewhere in the train rows: {parts}")
    _check_held_out(splits, recipe)
    return splits


def idle(recipe: Recipe) -> list[str]:
    """Keys that are not at their defaults, of sections that are for other methods alone."""
    unread = {"atp": ("moe", "twostage"), "tomoe": ("generator", "compensate", "twostage"), "twostage": ("moe",)}
    sections = {name: getattr(recipe, name) for name in unread.get(recipe.method, ())}  # finetune: another method's recipe
    keys = ((name, section, key) for name, section in sections.items() for key in type(section).model_fields)
    return [f"{name}.{key}" for name, section, key in keys if getattr(section, key) != getattr(type(section)(), key)]


def guarded(recipe: Recipe) -> DataConfig:
    """The data with the rows of ``evaluate.tasks`` kept from being learned, as those of ``data.protect`` are."""
    tasks = [find_task(name) for name in recipe.evaluate.tasks]
    return recipe.data.model_copy(update={"protect": (*recipe.data.protect, *held_out(tasks))})


def check_method(recipe: Recipe, config: PreTrainedConfig, structure: Structure) -> None:
    """Raise UserError where no Plan meets the budget, the family cannot carry what the method adds, or a rank adds nothing."""
    if recipe.model.init == "pretrained" and recipe.lora.rank > structure.hidden:
        raise UserError(
            f"lora.rank={recipe.lora.rank} is more than the model's width of {structure.hidden}, beyond which it adds nothing; "
            f"give {structure.hidden} at most"
        )
    scores = recipe.twostage.scores if recipe.method == "twostage" else None
    if scores == "layer_drop":
        level = {site: torch.zeros(structure.layers[site[0]].units[site[1]]) for site in structure.sites()}
        drop_layers([0.0] * len(structure.layers), level, structure, recipe.budget)
    elif recipe.method == "tomoe":
        check_experts(recipe, config, structure)
    elif recipe.prunes:
        check_budget(structure, recipe.budget)
    if scores == "flap" and recipe.twostage.compensate:
        check_biases(structure.family)


def check_quantize(recipe: Recipe, device: str) -> None:
    """Raise UserError where ``model.quantize`` does not go with another key, or bitsandbytes does not do it on ``device``."""
    check_quantizable(recipe)
    if recipe.model.quantize != "none":
        check_bitsandbytes(recipe.model.quantize, device)


def recovers_in_4_bits(recipe: Recipe, config: PreTrainedConfig, structure: Structure, device: torch.device) -> bool:
    """What ``recover.quantize`` means on ``device``."""
    if recipe.model.quantize == "none" or not recipe.prunes:
        return False
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return with_room(job_of(recipe, config, structure, device.type), device.type, room).recipe.recover.quantize is True


def compiles(recipe: Recipe, config: PreTrainedConfig, structure: Structure, device: torch.device) -> bool:
    """What ``train.compile`` means on ``device``."""
    if recipe.train.compile != "auto":
        return recipe.train.compile
    job = job_of(recipe, config, structure, device.type)
    if device.type != "cuda" or not job.may_compile:
        return False
    return with_compiling(job, present(device, pick_precision(recipe.train.precision, device.type))).compiled


def can_compile(device: torch.device) -> bool:
    """Whether ``train.compile=auto`` can be had: on a GPU, for which a small kernel is made and run.

    That takes Triton, a C compiler and Python's headers, and not every GPU has it.
    """
    if device.type != "cuda":
        return False
    try:
        return bool(torch.compile(lambda numbers: 2 * numbers + 1)(torch.ones(8, device=device)).sum() == 24)
    except Exception:  # whatever is missing, the run does without
        return False


def check_teacher(recipe: Recipe, vocabulary: int) -> None:
    """Raise UserError where ``distill.teacher`` is absent, broken, or of another vocabulary, before anything is trained.

    Args:
        vocabulary: rows of the student's embedding.
    """
    path = recipe.distill.teacher
    if not path or recipe.method not in ("atp", "tomoe"):
        return
    locate(path, "distill.teacher")
    theirs = load_config(recipe.model.at(path)).vocab_size
    if theirs != vocabulary:
        raise UserError(
            f"distill.teacher={path!r} has a vocabulary of {theirs:,} tokens and the model one of {vocabulary:,}; a "
            "teacher needs the same tokenizer: best the same base, tuned"
        )
    check_weights(recipe.model.at(path))


def _check_vocabulary(splits: Splits, vocabulary: int, tokenizer: Any) -> None:
    # by the ids that occur: some tokenizers hold tokens for other models of their family beyond the vocabulary
    windows = (splits.train, splits.decision, splits.valid, splits.test)
    largest = max(int(part.ids.max()) for part in windows if len(part.ids))
    if largest >= vocabulary:
        raise UserError(
            f"the data holds token id {largest} (the tokenizer has {len(tokenizer)} tokens) but the model's "
            f"vocab_size is {vocabulary}; give the tokenizer that belongs to the model (model.tokenizer)"
        )


def _check_held_out(splits: Splits, recipe: Recipe) -> None:
    for name in ("valid", "test") if recipe.evaluate.every else ("test",):
        if not getattr(splits, name).targets:
            raise UserError(
                f"data.{name} has no token to measure ({splits.rows[name]} rows); give it a file of its own, "
                f"more rows in data.train, or raise data.{name}_fraction"
            )


def check_base(loss: float, recipe: Recipe) -> None:
    """Raise UserError where the base's own loss is no number: no training would mend that."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of model.path={recipe.model.path!r} on the test data is {loss} before any training: its weights hold "
            "values that are no numbers, or overflow; check the folder's files, or set train.precision=float32"
        )


def costs(recipe: Recipe, config: PreTrainedConfig, structure: Structure) -> dict[str, float]:
    """Floating-point operations of the steps of all phases, in the order in which they come."""
    flops = {phase.name: phase.step_flops for phase in phases(job_of(recipe, config, structure), None)}
    reference = flops.pop("dense LoRA", None)
    return {"tune": reference, **flops} if reference else flops

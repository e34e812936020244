"""A whole run: check, measure, tune and prune, export, reload, report. ``tune`` is the public entry."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import nn
from transformers import AutoModelForCausalLM

from slimtune import preflight
from slimtune.data.batches import Splits
from slimtune.errors import UserError
from slimtune.evaluate.figures import Measure
from slimtune.evaluate.perplexity import Influences
from slimtune.export import card, huggingface
from slimtune.export.folder import check_target
from slimtune.export.verify import sample, verify
from slimtune.methods import atp, finetune, twostage
from slimtune.methods.outcome import Method, Outcome
from slimtune.models.identity import fingerprint, weight_bytes
from slimtune.models.load import (
    attention_of,
    check_attention,
    check_length,
    check_weights,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    structure_of,
    without_flash,
)
from slimtune.models.selfcheck import self_check
from slimtune.models.surgery import merge_lora
from slimtune.recipe import Recipe
from slimtune.report.table import render
from slimtune.runtime import (
    Metrics,
    RunFolder,
    forget_peak,
    machine,
    peak_memory,
    pick_dtype,
    rank,
    seed_everything,
    writing,
)
from slimtune.structure.axes import Structure
from slimtune.structure.plan import count
from slimtune.train import checkpoint
from slimtune.train.claim import check_model, claim, open_folder, read_stages, same_input
from slimtune.train.progress import Progress
from slimtune.train.session import Figures, Session, check_launcher, make_accelerator
from slimtune.version import __version__, versions

RELOAD_LIMIT = 1e-4
"""Largest allowed difference of the reloaded model's logits, relative to the largest logit. A tighter, absolute one would
throw away long runs for the rounding of fp32 sums, which grows with the logits; what is above it absolutely is told."""
METHODS: dict[str, Method] = {"atp": atp.run, "finetune": finetune.run, "twostage": twostage.run}

Summary = dict[str, Any]


def tune(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Summary:
    """Run a recipe from data to verified export.

    Args:
        recipe: what to do; see :class:`slimtune.recipe.Recipe`.
        resume: continue an interrupted run in ``recipe.out`` (losses and Plan are those of an uninterrupted run).
        overwrite: replace an earlier run in ``recipe.out``. Nothing of it is touched before the new run has passed its
            checks; then its checkpoints and figures go, and its model when the new one is complete.

    Returns:
        The summary that also stands in ``summary.json``.

    Raises:
        UserError: anything the user can mend.
    """
    started = time.perf_counter()
    if not isinstance(recipe, Recipe):
        raise UserError(f"tune needs a Recipe, not {type(recipe).__name__}: slimtune.load_recipe(file), slimtune.Recipe(...)")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    check_launcher()
    folder = open_folder(recipe, resume, overwrite)
    seed_everything(recipe.seed)
    with folder.held():
        with folder.on_trial():
            run = _Run(recipe, folder, resume)
            run.check()
        summary = run.execute()
        summary["seconds"], summary["resumed"] = round(time.perf_counter() - started, 1), run.resumed
        folder.write_json("summary.json", summary)
    if rank() == 0:
        run.progress.console.print(render(summary))
    if recipe.trackers:
        run.accelerator.end_training()
    return summary


class _Run:
    """One run's parts, built in the order in which they can fail cheaply."""

    def __init__(self, recipe: Recipe, folder: RunFolder, resume: bool):
        self.recipe, self.folder, self.resume, self.config = recipe, folder, resume, load_config(recipe.model)
        self.structure: Structure = structure_of(self.config)
        self.progress = Progress(costs=preflight.costs(recipe, self.config, self.structure))
        self.accelerator = make_accelerator(recipe)
        if recipe.trackers:
            self.accelerator.init_trackers("slimtune", config={"recipe": recipe.to_yaml()})
        self.metrics, self.resumed = Metrics(folder), False
        self.stages: dict[str, Any] = {"cwd": str(Path.cwd())}  # that relative paths of the recipe go by
        self.tokenizer: Any = None
        self.splits: Splits
        self.figures: Measure

    def check(self) -> None:
        """Everything that can be wrong is found before the first step: budget, family, data, masked = cut."""
        recipe = self.recipe
        check_target(self.folder / "model")
        check_model(self.folder, recipe)
        preflight.check_method(recipe, self.structure)
        preflight.check_teacher(recipe, self.config.vocab_size)
        check_attention(recipe.model, str(self.accelerator.device))
        check_length(self.config, recipe.data.max_length)
        self.tokenizer = load_tokenizer(recipe.model)
        self.splits = preflight.read(recipe, self.config.vocab_size, self.tokenizer, self.progress)
        self.figures = Measure(recipe, self.splits, self.tokenizer, self.accelerator, self.config, self.progress.say)
        difference = self_check(self.config, recipe.seed)
        self.progress.say(f"self-check: masked and cut logits differ by {difference:.1e} on a two-layer clone")
        check_weights(recipe.model)
        if self.resume and not (self.folder / "recipe.yaml").is_file():
            self.progress.say(f"nothing to resume in {escape(recipe.out)}: this run starts from the beginning")
        self.accelerator.wait_for_everyone()  # no rank looks for an earlier run after rank 0 has begun this one
        claim(self.folder, recipe, self.resume)
        self._start_or_resume()
        self.accelerator.wait_for_everyone()

    def _start_or_resume(self) -> None:
        stages = self.folder / "stages.json"
        if self.resume and stages.is_file():
            self.stages, self.resumed = read_stages(stages), True
        base = self.recipe.model
        same_input(self.stages, "data", self.splits.fingerprint, "data")
        same_input(self.stages, "weights", fingerprint(base, self.config), f"config or weights of model.path={base.path!r}")
        unread = {"weights"} if base.init != "config" and "base" not in self.stages else set()  # they may still be mended
        self.folder.write_json("stages.json", {name: value for name, value in self.stages.items() if name not in unread})
        before = None
        for stage in ("main", "dense_lora"):
            state = checkpoint.load(self.folder / f"checkpoint-{stage}.pt", torch.device("cpu")) if self.resume else None
            if state:
                before = (stage, state["phase"], state["step"])
                break
        self.metrics.restart(before)

    def execute(self) -> Summary:
        """Measure the base, run the reference if asked for, run the method, export and measure what was written."""
        recipe = self.recipe
        base = self._stage("base", self._measure_base) if recipe.model.init == "pretrained" else {}
        wanted = recipe.evaluate.dense_lora and recipe.method != "finetune"
        dense = self._stage("dense_lora", self._measure_dense) if wanted else {}
        outcome, cost = self._train(METHODS[recipe.method], "main")
        result, difference = self._export(outcome, {"base": base, "dense_lora": dense})
        return {
            "version": __version__,
            "method": recipe.method,
            "out": recipe.out,
            "model": str(self.folder / "model"),
            "seed": recipe.seed,
            "keep": recipe.budget.keep if recipe.prunes else 1.0,
            "of": recipe.budget.of,
            "base": base,
            "dense_lora": dense,
            "result": {**result, **cost},
            "reload_difference": difference,
            "leak": outcome.notes.get("leak"),
            "plan": outcome.plan.digest,
            "tokens": outcome.tokens,
            **self.splits.summary,
            **self.figures.summary,
            "machine": machine(self.accelerator.device),
            **(versions() | {"torch": torch.__version__}),
        }

    def _stage(self, name: str, measure: Callable[[], Figures]) -> Figures:
        if name not in self.stages:
            self.stages[name] = measure()
            self.folder.write_json("stages.json", self.stages)
        found: Figures = self.stages[name]
        return found

    def _train(self, method: Method, stage: str) -> tuple[Outcome, Figures]:
        """A method's outcome, and what it cost: seconds, and the most bytes on a GPU."""
        forget_peak(self.accelerator.device)
        session = self._session(stage)
        outcome = method(session)
        peak = peak_memory(self.accelerator.device)
        return outcome, {"seconds": round(session.seconds, 1), **({"memory": peak} if peak else {})}

    def _session(self, stage: str) -> Session:
        return Session(
            recipe=self.recipe,
            accelerator=self.accelerator,
            structure=self.structure,
            splits=self.splits,
            folder=self.folder,
            metrics=self.metrics,
            progress=self.progress,
            valid_figures=self.figures.valid,
            stage=stage,
            resume=self.resume,
        )

    def _measure_base(self) -> Figures:
        self.progress.say("measuring the base model ...")
        device = str(self.accelerator.device)
        model = load_model(self.recipe.model, device, pick_dtype(self.recipe.model.dtype, device))
        found = self.figures.test(model) if self.recipe.evaluate.base else self.figures.glance(model)
        preflight.check_base(found["loss"], self.recipe)
        location, local = locate(self.recipe.model.path)
        found |= {"parameters": self.structure.total_params, "block_ratio": 1.0}
        found |= {"bytes": weight_bytes(Path(location))} if local else {}
        return found if self.recipe.evaluate.base else {}

    def _measure_dense(self) -> Figures:
        self.progress.say("reference: LoRA on the uncut model, same tokens")
        outcome, cost = self._train(finetune.run, "dense_lora")
        cost |= {"parameters": self.structure.total_params, "block_ratio": 1.0}
        return {**self.figures.test(outcome.model), **cost, "tuning_tokens": sum(outcome.tokens.values())}

    def _export(self, outcome: Outcome, figures: dict[str, Figures]) -> tuple[Figures, float | None]:
        """Merge in fp32, round once to the export dtype, write, reload in a fresh process, measure what was written."""
        recipe, target, dtype = self.recipe, self.folder / "model", self._export_dtype()
        counts = count(self.structure, outcome.plan)
        notes = {"base": card.public(recipe.model.path), "seed": recipe.seed, "total_ratio": counts.total_ratio}
        plan = replace(outcome.plan, notes=notes)
        model: Any = merge_lora(outcome.model.float())
        for parameter in model.parameters():  # not model.to(dtype): buffers such as RoPE's frequencies stay fp32
            parameter.data = parameter.data.to(dtype).float()
        differences, influences = list[float](), Influences()
        if rank() == 0:
            self.progress.say(f"writing {escape(str(target))} ...")
            model = without_flash(model.cpu()).eval()
            check = (lambda written: differences.append(self._verify(model, written))) if recipe.export.verify else None
            huggingface.save(model, recipe.model, plan, target, dtype, self._facts(counts.total, {}, None), check)
        self.folder.write_text("plan.json", plan.to_json())
        difference = differences[0] if differences else None
        self.accelerator.wait_for_everyone()
        measured = pick_dtype(recipe.model.dtype, str(self.accelerator.device))  # as the base was
        how = attention_of(recipe.model, self.config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(target, dtype=measured, local_files_only=True, **how)
        kind = type(loaded).__name__
        if recipe.budget.layout == "uniform" and not type(loaded).__module__.startswith("transformers."):
            self.progress.say(
                f"[yellow]no stock class takes these equal widths, so the model is a {kind}, which the folder carries; "
                "another budget.keep or a wider budget.tolerance may give head counts that one takes[/yellow]"
            )
        result = {
            "class": kind,
            **self.figures.test(loaded.to(self.accelerator.device), influences),
            "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
            "block_ratio": counts.block_ratio,
            "bytes": weight_bytes(target),
        }
        self.folder.write_json("windows.json", asdict(influences))
        if rank() == 0:
            with writing(target / "README.md"):
                card.write(target, self._facts(counts.total, {**figures, "result": result}, difference), plan)
        return result, difference

    def _facts(self, parameters: int, figures: dict[str, Figures], difference: float | None) -> dict[str, Any]:
        return card.facts(self.recipe, self.structure.total_params, parameters, figures, difference)

    def _export_dtype(self) -> torch.dtype:
        if (name := self.recipe.export.dtype) != "auto":
            return pick_dtype(name, "cpu")
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) and self.recipe.model.init == "pretrained" else torch.float32

    @torch.no_grad()
    def _verify(self, model: nn.Module, target: Path) -> float:
        ids = sample(self.splits.test.collate([0])["input_ids"][:, :64], self.config.vocab_size)
        with self.figures.eager():
            expected = model(input_ids=ids, use_cache=False).logits
        difference = verify(target, ids, expected)
        if difference > RELOAD_LIMIT * float(expected.abs().max()):
            raise UserError(
                f"the written model computes something else than the one in memory: logits differ by {difference:.1e}; "
                "nothing was replaced, and the trained weights are in the checkpoint (--resume writes them again)"
            )
        note = f"reload: logits of a fresh process differ by {difference:.1e}"
        self.progress.say(note if difference <= RELOAD_LIMIT else f"[yellow]{note}[/yellow]")
        return difference

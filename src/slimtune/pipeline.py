"""A whole run: check, measure, tune and prune, export, reload, report. ``tune`` is the public entry."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.markup import escape

from slimtune import preflight
from slimtune.appraisal import Appraisal
from slimtune.data.batches import Splits
from slimtune.delivery import Made, deliver
from slimtune.errors import UserError
from slimtune.evaluate.figures import Measure
from slimtune.export.folder import check_target
from slimtune.methods import atp, finetune, tomoe, twostage
from slimtune.methods.outcome import Method, Outcome
from slimtune.methods.start import untuned_model
from slimtune.models.compiled import compiling, decided
from slimtune.models.identity import fingerprint, weight_bytes
from slimtune.models.load import (
    check_attention,
    check_length,
    check_weights,
    load_config,
    load_tokenizer,
    locate,
    structure_of,
)
from slimtune.models.quantized import to_measure, unquantized
from slimtune.models.selfcheck import self_check
from slimtune.recipe import Recipe
from slimtune.report.table import render
from slimtune.runtime import (
    Metrics,
    RunFolder,
    forget_peak,
    machine,
    pick_dtype,
    rank,
    seed_everything,
    world_size,
)
from slimtune.structure.axes import Structure
from slimtune.train import checkpoint
from slimtune.train.claim import check_model, claim, open_folder, read_stages, same_input, seen_from
from slimtune.train.judgement import Judgement, not_judged
from slimtune.train.progress import Progress
from slimtune.train.session import Figures, Session, check_launcher, make_accelerator, shards
from slimtune.train.task_figures import OF_EXPERTS
from slimtune.train.trackers import Trackers
from slimtune.version import __version__, versions

METHODS: dict[str, Method] = {"atp": atp.run, "finetune": finetune.run, "tomoe": tomoe.run, "twostage": twostage.run}

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
        Breach: a figure is out of its bound in ``guard`` and ``alarm.then`` is ``stop``; at the end everything is written.
    """
    started = time.perf_counter()
    if not isinstance(recipe, Recipe):
        raise UserError(f"tune needs a Recipe, not {type(recipe).__name__}: slimtune.load_recipe(file), slimtune.Recipe(...)")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    check_launcher(recipe)
    folder = open_folder(recipe, resume, overwrite)
    seed_everything(recipe.seed)
    with folder.held():
        with folder.on_trial():
            run = Run(recipe, folder, resume)
        with run.trackers:
            with folder.on_trial():
                run.check()
            summary = run.execute()
            summary["seconds"], summary["resumed"] = round(time.perf_counter() - started, 1), run.resumed
            folder.write_json("summary.json", summary)
            run.trackers.final(summary, run.metrics.path)
    if rank() == 0:
        run.progress.console.print(render(summary))
    if run.last.stop:
        raise run.last.stop
    return summary


class Run:
    """One run's parts, built in the order in which they can fail cheaply: ``check``, then ``execute`` (or ``train`` alone)."""

    def __init__(self, recipe: Recipe, folder: RunFolder, resume: bool):
        self.recipe, self.folder, self.resume, self.config = recipe, folder, resume, load_config(recipe.model)
        self.structure: Structure = structure_of(self.config)
        self.progress = Progress(costs=preflight.costs(recipe, self.config, self.structure))
        self.accelerator = make_accelerator(recipe)
        tight = preflight.recovers_in_4_bits(recipe, self.config, self.structure, self.accelerator.device)
        pays = preflight.compiles(recipe, self.config, self.structure, self.accelerator.device)
        told = gather_object([(tight, pays)])  # the processes' GPUs may differ
        self.recover_in_4_bits = any(tight for tight, _ in told)
        self.resolved = decided(recipe, all(pays for _, pays in told))
        self.trackers = Trackers(recipe, self.progress.say)
        self.metrics, self.resumed = Metrics(folder), False
        self.stages: dict[str, Any] = {"cwd": str(Path.cwd())}  # that relative paths of the recipe go by
        self.tokenizer: Any = None
        self.splits: Splits
        self.figures: Measure
        self.appraisal: Appraisal
        self.last = Judgement()

    def check(self) -> None:
        """Everything that can be wrong is found before the first step: budget, family, data, masked = cut."""
        recipe = self.recipe
        check_target(self.folder / "model", of_run=True)
        check_model(self.folder, recipe)
        preflight.check_method(recipe, self.config, self.structure)
        self.appraisal = Appraisal(recipe, self.config, self.folder, self.stages, self.progress.say)
        preflight.check_teacher(recipe, self.config.vocab_size)
        check_attention(recipe.model, str(self.accelerator.device))
        preflight.check_quantize(recipe, str(self.accelerator.device))
        check_length(self.config, recipe.data.max_length)
        self.tokenizer = load_tokenizer(recipe.model)
        self.splits = preflight.read(recipe, self.config.vocab_size, self.tokenizer, self.progress)
        self.figures = Measure(self.resolved, self.splits, self.tokenizer, self.accelerator, self.config, self.progress.say)
        self.appraisal.check(self.figures.names, self.accelerator.device.type)
        difference = self_check(self.config, recipe.seed)
        self.progress.say(f"self-check: masked and cut logits differ by {difference:.1e} on a two-layer clone")
        check_weights(recipe.model)
        if self.resume and not (self.folder / "recipe.yaml").is_file():
            self.progress.say(f"nothing to resume in {escape(recipe.out)}: this run starts from the beginning")
        self.accelerator.wait_for_everyone()  # no rank looks for an earlier run after rank 0 has begun this one
        self._remember()
        self.stages["track"] = self.trackers.start(self.stages.get("track", {}))
        claim(self.folder, recipe, self.resume)
        self._start_or_resume()
        if self.recover_in_4_bits and recipe.recover.quantize == "auto":
            self.progress.say("[yellow]the cut model's whole weights are not expected to fit: recovery in 4 bits, too[/yellow]")
        if self.resolved.train.compile and recipe.train.compile == "auto":
            self.progress.say("layers will be compiled: it is expected to save more time than it takes (train.compile=auto)")
        self.accelerator.wait_for_everyone()

    def _remember(self) -> None:
        """What a resumed run has behind it, which must have read what this one is about to read."""
        if self.resume and (stages := self.folder / "stages.json").is_file():
            self.stages.update(read_stages(stages))
            self.resumed = True
        base = self.recipe.model
        same_input(self.stages, "data", self.splits.fingerprint, "data")
        same_input(self.stages, "weights", fingerprint(base, self.config), f"config or weights of model.path={base.path!r}")

    def _start_or_resume(self) -> None:
        base = self.recipe.model
        if base.quantize != "none":  # what fits may be another on the machines that a run goes on with
            self.recover_in_4_bits = self.stages.setdefault("recover_in_4_bits", self.recover_in_4_bits)
        if self.recipe.train.compile == "auto":
            wanted = self.stages.setdefault("compiled", self.resolved.train.compile)
            compiled = wanted and self._can_compile()
            self.figures.recipe = self.resolved = decided(self.recipe, compiled)
            if wanted and not compiled:
                self.progress.say(
                    "layers are not compiled, though that was decided: the model is spread, or no kernel can be made"
                )
        self.stages |= {"place": seen_from(self.folder.path), "costs": self.progress.costs, "units": self.structure.units()}
        unread = {"weights"} if base.init != "config" and "base" not in self.stages else set()  # they may still be mended
        self.folder.write_json("stages.json", {name: value for name, value in self.stages.items() if name not in unread})
        before = None
        for stage in ("main", "dense_lora"):
            state = checkpoint.load(self.folder / f"checkpoint-{stage}.pt", torch.device("cpu")) if self.resume else None
            if state:
                before = (stage, state["phase"], state["step"])
                break
        self.metrics.restart(before)

    def _can_compile(self) -> bool:
        """Whether every process can, which may be others than the run began with."""
        here = not shards(self.recipe, self.accelerator) and preflight.can_compile(self.accelerator.device)
        return all(gather_object([here]))

    def execute(self) -> Summary:
        """Measure the base, run the reference if asked for, run the method, export and measure what was written."""
        recipe = self.recipe
        base = self._stage("base", self._measure_base) if recipe.model.init == "pretrained" else {}
        wanted = recipe.evaluate.dense_lora and recipe.method != "finetune"
        dense = self._stage("dense_lora", self._measure_dense) if wanted else {}
        self.appraisal.start(base, dense, {"dense": self._measure_base, "dense_lora": self._measure_dense})
        outcome, cost = self.train(METHODS[recipe.method], "main")
        result, difference = deliver(self._made(), outcome, {"base": base, "dense_lora": dense})
        result |= cost
        speed = self.appraisal.speed(self.accelerator)
        rulings, self.last = self.appraisal.at_end(result, base, dense, speed)
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
            "result": result,
            "speed": speed,
            "guard": rulings,
            "reload_difference": difference,
            "compiled": self.resolved.train.compile,
            "leak": outcome.notes.get("leak"),
            "plan": outcome.plan.digest,
            **{key: outcome.notes[key] for key in ("shares", "coverage") if key in outcome.notes},
            "tokens": outcome.tokens,
            "data": self.splits.fingerprints,
            "weights": self.stages["weights"],
            "processes": world_size(),
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

    def train(self, method: Method, stage: str) -> tuple[Outcome, Figures]:
        """A method's outcome, and what it cost: seconds, and the most bytes on a GPU."""
        forget_peak(self.accelerator.device)
        session = self.session(stage)
        with compiling(self.resolved.train.compile is True):
            outcome = method(session)
        return outcome, {"seconds": round(session.seconds, 1), **({"memory": session.peak} if session.peak else {})}

    def session(self, stage: str) -> Session:
        return Session(
            recipe=self.resolved,
            accelerator=self.accelerator,
            structure=self.structure,
            splits=self.splits,
            folder=self.folder,
            metrics=self.metrics,
            progress=self.progress,
            valid_figures=self.figures.valid,
            stage=stage,
            resume=self.resume,
            trackers=self.trackers,
            recover_in_4_bits=self.recover_in_4_bits,
            judge=self.appraisal.at_step if stage == "main" else not_judged,
        )

    def _made(self) -> Made:
        return Made(
            self.recipe, self.config, self.structure, self.folder, self.splits, self.figures, self.accelerator, self.progress
        )

    def _measure_base(self) -> Figures:
        self.progress.say("measuring the base model ...")
        dtype = pick_dtype(self.recipe.model.dtype, str(self.accelerator.device))
        model = untuned_model(self.session("base"), dtype)
        found = self.figures.test(model) if self.recipe.evaluate.base else self.figures.glance(model)
        self.appraisal.refer("dense", lambda: self.figures.valid(model))
        preflight.check_base(found["loss"], self.recipe)
        location, local = locate(self.recipe.model.path)
        found |= self._sizes()
        found |= {"bytes": weight_bytes(Path(location))} if local else {}
        return found if self.recipe.evaluate.base else {}

    def _sizes(self) -> Figures:
        """Of the uncut model, of which a token uses all."""
        found = {"parameters": self.structure.total_params, "block_ratio": 1.0}
        return found | ({name: found[stored] for name, stored in OF_EXPERTS.items()} if self.recipe.method == "tomoe" else {})

    def _measure_dense(self) -> Figures:
        self.progress.say("reference: LoRA on the uncut model, same tokens")
        outcome, cost = self.train(finetune.run, "dense_lora")
        cost |= self._sizes()
        model = outcome.model
        if self.recipe.model.quantize != "none":
            model = to_measure(
                unquantized(model), self.structure, self.accelerator.device
            )  # what its LoRA would be merged into
        self.appraisal.refer("dense_lora", lambda: self.figures.valid(model))
        return {**self.figures.test(model), **cost, "tuning_tokens": sum(outcome.tokens.values())}

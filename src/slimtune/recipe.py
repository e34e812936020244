"""The recipe: one frozen, validated description of a run, from YAML plus ``key=value`` overrides.

Unknown keys fail with the nearest known name. ``${NAME}`` in any string is replaced by the environment variable of
that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from slimtune.errors import UserError, nearest
from slimtune.section import Section
from slimtune.sections import (
    AlarmConfig,
    BudgetConfig,
    CompensateConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    GeneratorConfig,
    Guard,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    Names,
    RecoverConfig,
    SearchConfig,
    Source,
    SpeedConfig,
    TrainConfig,
    TwoStageConfig,
    unsearched,
)
from slimtune.yaml_file import Loader, read_yaml, told


class Recipe(Section):
    """A run."""

    literal: ClassVar[frozenset[str]] = frozenset({"alarm"})
    earlier: ClassVar[Mapping[str, str]] = {"trackers": "track"}

    method: Literal["atp", "tomoe", "finetune", "twostage"] = "atp"
    """``atp``: tune and prune in one stage; ``tomoe``: tune, and make experts of the MLPs (``moe``); ``twostage``: prune, then
    tune (the rivals, see ``twostage.scores``); ``finetune``: tune only (LoRA, or all weights with ``init: config``)."""
    out: Annotated[str, Field(min_length=1)] = "runs/run"
    """Output folder."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Of everything random."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``."""
    track: Names = ()
    """Trackers to feed besides metrics.jsonl, e.g. ``[tensorboard, trackio]``, also ``wandb``, ``mlflow``: docs/track.md."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    lora: LoraConfig = LoraConfig()
    generator: GeneratorConfig = GeneratorConfig()
    search: SearchConfig = SearchConfig()
    compensate: CompensateConfig = CompensateConfig()
    recover: RecoverConfig = RecoverConfig()
    distill: DistillConfig = DistillConfig()
    moe: MoeConfig = MoeConfig()
    twostage: TwoStageConfig = TwoStageConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guard: Guard = {}
    """Bounds on figures, ``{figure: condition}``, held at every evaluation and at the end: docs/guard.md."""
    alarm: AlarmConfig = AlarmConfig()
    speed: SpeedConfig = SpeedConfig()
    export: ExportConfig = ExportConfig()

    @property
    def settle_steps(self) -> int:
        """Steps between the decision and the cut (``lora.settle``)."""
        settle = round(self.lora.settle * self.search.steps) if self.lora.semantics == "lora_aware" else 0
        return min(settle, self.recover.steps)

    @property
    def updates(self) -> int:
        """Updates of LoRA by ``atp``, over all phases."""
        return self.search.steps + self.recover.steps

    @property
    def prior_passes(self) -> tuple[int, int]:
        """Passes over ``generator.prior_steps`` decision batches before a search: with a backward pass, and without."""
        looks = self.generator.prior in ("wanda", "mixed") or self.compensate.weights != "none"  # one serves both
        return int(self.generator.prior in ("taylor", "running", "mixed")), int(looks)

    @property
    def decide_windows(self) -> int:
        """Windows that ``atp`` reads for its decision: for the prior, for compensation, in all ``decide`` turns."""
        turns = -(-self.search.steps // self.search.decide_every) if self.search.update == "alternating" else 0
        return (turns + sum(self.prior_passes) * self.generator.prior_steps) * (self.search.batch or self.train.batch)

    @property
    def moe_windows(self) -> int:
        """Windows that ``tomoe`` reads: of its passes over decision batches, its search and its recovery."""
        batch = self.search.batch or self.train.batch
        searched = self.search.steps * (self.train.batch if self.moe.tune else batch)
        prior = self.moe.passes(self.search.steps) * self.moe.prior_steps * batch
        return prior + searched + self.recover.steps * self.train.batch

    @property
    def windows(self) -> int:
        """All windows that the method reads at most, of a rival as many as ``atp`` or what its decision takes."""
        if self.method == "tomoe":
            return self.moe_windows
        tuned = self.method != "twostage" or self.twostage.tune
        read = self.updates * self.train.batch + self.decide_windows if tuned else 0
        return max(read, self.scoring_windows) if self.method == "twostage" else read

    @property
    def prunes(self) -> bool:
        """Whether the method removes anything."""
        return self.method != "finetune"

    @property
    def refit_windows(self) -> int:
        """Windows that ``twostage`` reads between its decision and its cut."""
        return self.twostage.fits * self.twostage.batches * (self.search.batch or self.train.batch)

    @property
    def scoring_windows(self) -> int:
        """Windows that ``twostage`` reads before its cut."""
        if self.twostage.scores == "generator":
            return self.decide_windows + self.refit_windows
        counted = self.twostage.scores not in ("random", "magnitude")
        return counted * self.twostage.batches * (self.search.batch or self.train.batch) + self.refit_windows

    @property
    def tuning_steps(self) -> int:
        """Updates of the model's trainable weights; ``twostage`` makes as many as read the windows of ``atp`` in all."""
        if self.method == "twostage":
            return max(0, self.windows - self.scoring_windows) // self.train.batch
        if self.method == "tomoe" and not self.moe.tune:
            return self.recover.steps
        return self.train.steps if self.method == "finetune" else self.updates

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.generator.width % self.generator.heads:
            raise ValueError(f"generator.heads={self.generator.heads} must divide generator.width={self.generator.width}")
        if self.model.init == "config" and self.method != "finetune" and not self.model.path and not self.model.config:
            raise ValueError("model.init=config needs model.config or model.path")
        if self.model.config and self.model.init != "config":
            raise ValueError("model.config only describes a model to be drawn at random; add model.init=config or leave it out")
        for key in ("recover", "teacher"):
            if (value := getattr(self.distill, key)) and not self.distill.weight:
                shown = "true" if value is True else value
                raise ValueError(f"distill.{key}={shown} has no effect without distill.weight, e.g. distill.weight=1")
        joint = self.search.update == "joint"
        if joint and (self.distill.weight or self.lora.semantics != "hard" or self.search.decide_every > 1):
            raise ValueError("search.update=joint needs lora.semantics=hard, distill.weight=0 and search.decide_every=1")
        if joint and self.method == "twostage":
            raise ValueError("search.update=joint is for method=atp: a rival has no LoRA yet while it decides")
        if joint and self.method == "atp" and self.compensate.weights != "none":
            raise ValueError("search.update=joint trains LoRA under sampled gates; it needs compensate.weights=none")
        if self.method == "atp" and not self.search.steps and self.generator.prior == "none":
            raise ValueError("search.steps=0 leaves nothing to decide by; set generator.prior=taylor or a number of steps")
        return self

    @model_validator(mode="after")
    def _a_rival_can_run(self) -> Recipe:
        if self.method != "twostage":
            return self
        if self.twostage.scores == "generator" and not self.search.steps:
            raise ValueError("search.steps=0 leaves nothing to train the generator by; give it a number of steps")
        if self.twostage.scores == "flap" and self.twostage.compensate and self.twostage.least_squares:
            raise ValueError(
                "twostage.scores=flap puts what was removed into biases, and twostage.least_squares=true would add it to the "
                "weights once more; set twostage.compensate=false"
            )
        if self.twostage.scores == "layer_drop" and self.budget.layout == "uniform":
            raise ValueError("twostage.scores=layer_drop narrows one layer to meet the budget; use budget.layout=per-layer")
        return self

    @model_validator(mode="before")
    @classmethod
    def _unsearched(cls, raw: Any) -> Any:
        return unsearched(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="wrap")
    @classmethod
    def _told(cls, raw: Any, validate: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """One clear error, from a file or from Python; the last validator, so that it holds the others."""
        try:
            return validate(raw)
        except ValidationError as error:
            raise UserError(_explain(error)) from error

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        raw = self.model_dump(mode="json")
        legible: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
        # PyYAML writes these line breaks unescaped and reads them back as another one
        return yaml.safe_dump(raw, sort_keys=False) if re.search("[\x85\u2028\u2029]", legible) else legible


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        UserError: the file is missing or not a mapping, a key is unknown, a value is invalid or a variable unset.
    """
    if {"recipe", "methods"} <= (raw := read_yaml(path, "recipe", "recipes/demo.yaml")).keys():
        raise UserError(f"recipe: {str(path)!r} is a comparison, for slimtune compare; its recipe is {raw['recipe']!r}")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply(raw, override)
    return parse(raw)


def parse(raw: Mapping[str, Any]) -> Recipe:
    """Validate a mapping into a Recipe. Raises UserError with the first problem."""
    return Recipe.model_validate(dict(raw))


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:  # to YAML a > begins a block of text, which has no place in one line: here it begins a condition
        value = text.strip() if text.lstrip().startswith(">") else yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {told(error)}") from error
    *parents, leaf = key.strip().split(".")
    node = raw
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override {override!r}: {name!r} is not a section of the recipe; give {_whole(parents, leaf, text)}"
            )
        node = child
    node[leaf] = _number(value)


def _whole(parents: Sequence[str], leaf: str, text: str) -> str:
    """How to say it instead: a source's keys only as a list of whole sources."""
    if parents[:1] == ["data"] and len(parents) == 2:
        name = ".".join(parents)
        return f"{name}={text}" if leaf == "path" else f"the whole source, e.g. {name}='[{{path: ..., {leaf}: {text}}}]'"
    return f"{'.'.join(parents)} itself a value"


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; everyone else reads a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _explain(error: ValidationError) -> str:
    first, *others = error.errors()
    loc = _keys(first["loc"])
    where = ".".join(loc)
    if first["type"] == "extra_forbidden":
        homes = [name for name in Recipe.model_fields if loc[-1] in _keys_at([name])] if len(loc) == 1 else []
        known = _keys_at(loc[:-1])
        hint = f" Did you mean {homes[0] + '.' + where!r}?" if homes else nearest(loc[-1], known, loc[:-1])
        return f"recipe: unknown key {where!r}.{hint or ' Known: ' + ', '.join(known)}"
    inside = _keys_at(loc)
    if first["type"] == "value_error" and inside and isinstance(first["input"], Mapping):
        return f"recipe: {first['ctx']['error']}"
    if inside and not isinstance(first["input"], Mapping):
        return f"recipe: {where}={first['input']!r} is not valid: it is a section with keys {', '.join(inside)}"
    reasons = dict.fromkeys(item["msg"] for item in (first, *others) if _keys(item["loc"]) == loc)  # one a union's member
    return f"recipe: {where}={first['input']!r} is not valid: {' or '.join(reasons)}"


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The location without what pydantic adds behind a key: the name of the union's member that refused the value."""
    keys: list[str] = []
    for part in loc:
        if not isinstance(part, int) and keys and not _keys_at(keys):
            break
        keys.append(str(part))
    return keys


def _keys_at(loc: Sequence[str]) -> list[str]:
    section: Any = Recipe
    for part in loc:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        section = Source if annotation == tuple[Source, ...] else annotation
    return list(section.model_fields) if hasattr(section, "model_fields") else []

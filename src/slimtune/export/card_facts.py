"""What a model card may say of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from slimtune.models.load import BUILTIN
from slimtune.recipe import Recipe
from slimtune.train.task_figures import names_of, told

_METRICS = {"ppl": "perplexity", "accuracy": "accuracy", "majority": "accuracy of the most frequent answer"}


def facts(
    recipe: Recipe, before: int, after: int, figures: Mapping[str, Mapping[str, float]], difference: float | None
) -> dict[str, Any]:
    """What the card of a run may say.

    Args:
        recipe: what was run.
        before: parameters of the base.
        after: parameters that stayed.
        figures: of ``base``, ``dense_lora`` and ``result``, as far as they were taken.
        difference: of the logits after a reload.
    """
    base, drawn = public(recipe.model.path), recipe.model.init == "config"
    names, tasks = {"base": "base", "dense_lora": "dense LoRA", "result": "this model"}, names_of(figures.values())
    return {
        "base": base if not drawn else f"random weights of the shape of {base}" if base else "random weights",
        "license": None if drawn else licence_of(recipe.model.path),
        "method": f"twostage ({recipe.twostage.scores})" if recipe.method == "twostage" else recipe.method,
        "budget": _budget(recipe),
        "parameters_before": before,
        "parameters_after": after,
        "parameters_used": figures.get("result", {}).get("active_parameters"),
        "figures": {
            names[name]: {_METRICS[key]: round(values[key], 3) for key in _METRICS if key in values}
            | {label: told(values, key) for key, label in tasks.items() if key in values}
            for name, values in figures.items()
            if values
        },
        "size": f"{figures['result']['bytes'] / 1e6:,.1f} MB" if figures.get("result", {}).get("bytes") else None,
        "recipe": recipe_of(recipe),
        "data": [public(source.path) for source in recipe.data.train],
        "reload_difference": difference,
    }


def _budget(recipe: Recipe) -> str | None:
    used = ", used by a token" if recipe.method == "tomoe" else ""
    return f"{recipe.budget.keep} of {recipe.budget.of}{used}" if recipe.prunes else None


def licence_of(base: str) -> str | None:
    """Of a base: slimtune's own, or what the card in a folder (or of a hub model, in the cache) says; None: nothing does."""
    if base.startswith(BUILTIN):
        return "apache-2.0"
    file = Path(base).expanduser() / "README.md"
    if not file.is_file():
        cached = try_to_load_from_cache(base, "README.md") if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
        file = Path(cached) if isinstance(cached, str) else file
    try:
        found = (metadata_load(file) or {}).get("license") if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # a card that is none
        return None
    return str(found) if isinstance(found, str) else None


def recipe_of(recipe: Recipe) -> str:
    """What was asked for, as YAML without defaults; of paths here the names alone, of the output nothing."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"out", "device", "track", "guard", "alarm", "speed"})
    return yaml.safe_dump(_named(raw), sort_keys=False, allow_unicode=True).strip()


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    return public(value) if isinstance(value, str) else value


def public(path: str) -> str:
    """What a path says to others: of a file or folder of the author's machine its name alone."""
    return Path(path).expanduser().resolve().name if path and Path(path).expanduser().exists() else path

"""``slimtune apply``: a run's model rebuilt from its base, a plan and an adapter, without data and without training code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimtune.errors import UserError
from slimtune.export import adapter, card_facts, huggingface
from slimtune.export.folder import check_target
from slimtune.models import moe
from slimtune.models.identity import stored_dtype, weight_bytes
from slimtune.models.load import BUILTIN, check_weights, load_config, load_model, structure_of
from slimtune.models.surgery import cut, merge_lora, put
from slimtune.sections import ModelConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan, count

Say = Callable[[str], None]


def apply_plan(
    plan: str | Path,
    base: str,
    *,
    revision: str | None = None,
    adapter_folder: str | Path | None = None,
    use_adapter: bool = True,
    out: str | Path = "",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Cut ``base`` by a plan, merge an adapter, and write the folder that the run wrote: the same weights, bit for bit.

    Args:
        plan: plan.json, or a folder that has it: of a run, of its adapter, or of a pruned model.
        base: folder, hub id or builtin of the model that the plan was made for.
        revision: of a hub id; default: that of the run, where its recipe named one.
        adapter_folder: default: ``adapter`` beside plan.json, or the folder of plan.json itself.
        use_adapter: False: the plan alone, so an untuned model.
        out: the folder to write; default: named after base and plan, here.
        say: takes a line for what is done.

    Returns:
        ``file``, ``bytes``, ``parameters``, ``total_ratio``, ``adapter`` (its folder, or None), ``dtype`` and ``same``: whether
        the weights are those of the run (None: there is no adapter that tells).

    Raises:
        UserError: the plan or the adapter are of another base, or what comes out is not what the run wrote; nothing is
            left then.
    """
    file = _plan_file(Path(plan).expanduser())
    decided = _plan_in(file)
    found = _adapter_of(file, adapter_folder) if use_adapter else None
    record = _fitting(found, decided) if found else None
    origin = _origin(base, revision, record.revision if record else None)
    structure = structure_of(load_config(origin, "BASE"))
    decided.check(structure)
    target = Path(out).expanduser() if out else Path(f"{card_facts.public(base).replace('/', '-')}-{decided.digest[:8]}")
    check_target(target)
    check_weights(origin)
    say(f"loading {base}{f', merging {found}' if found else ''} ...")
    model, dtype = _built(origin, structure, decided, found, record)
    laid = _laid(model, origin, structure, decided, found, dtype) if decided.experts else None
    counts = count(structure, decided)
    decided = replace(decided, notes={**decided.notes, "base": card_facts.public(base), "total_ratio": counts.total_ratio})
    say(f"writing {target} ...")
    facts = _facts(base, structure, found)
    huggingface.save(model.eval(), origin, decided, target, dtype, facts, say=say, laid=laid)
    return {
        "file": str(target),
        "bytes": weight_bytes(target),
        "parameters": counts.total,
        "total_ratio": counts.total_ratio,
        "adapter": str(found) if found else None,
        "dtype": str(dtype).removeprefix("torch."),
        "same": True if record else None,
    }


def _laid(
    model: Any, origin: ModelConfig, structure: Structure, plan: Plan, found: Path | None, dtype: torch.dtype
) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of the stock class that holds the experts of ``plan``."""
    file = found / adapter.ROUTERS if found else None
    if file is None or not file.is_file():
        raise UserError(
            "this plan divides the model among experts, and their routers lie in its adapter: give it with --adapter"
        )
    routers = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    weights = [routers.pop(str(layer)) for layer in range(len(plan.experts))]
    config = moe.config_of(load_config(origin, "BASE"), structure, moe.Layout.of(plan))
    return config, moe.tensors_of(model, structure, plan, weights, routers)


def _facts(base: str, structure: Structure, found: Path | None) -> dict[str, Any]:
    """For the card."""
    return {
        "method": "plan and adapter" if found else "plan alone",
        "kind": None if found else "smaller",
        "license": card_facts.licence_of(base),
        "base": card_facts.public(base),
        "parameters_before": structure.total_params,
    }


def _built(
    origin: ModelConfig, structure: Structure, plan: Plan, found: Path | None, record: adapter.Record | None
) -> tuple[Any, torch.dtype]:
    """The base cut by ``plan``, the adapter merged, rounded to the dtype that it is written in; and that."""
    stored = load_config(origin, "BASE").dtype
    own = stored if isinstance(stored, torch.dtype) else torch.float32
    dtype = getattr(torch, record.dtype) if record else own
    trained = getattr(torch, record.base_dtype) if record else own
    model: Any = load_model(origin, "cpu", stored_dtype(origin) or trained)
    cut(model, structure, plan.for_good)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained)
    if found:
        model = _with_adapter(model, found, structure)
    model = merge_lora(model, dtype)
    if record:
        _check_same(model, dtype, record, origin.path)
    return model, dtype


def _check_same(model: Any, dtype: torch.dtype, record: adapter.Record, base: str) -> None:
    if adapter.digest_of(model, dtype) != record.weights:
        raise UserError(
            f"BASE={base!r} gives other weights than the run wrote, so it is not the {record.base!r} that was tuned, or "
            "another revision of it; give that one, or --no-adapter. Nothing was written"
        )


def _origin(base: str, asked: str | None, own: str | None) -> ModelConfig:
    """The base at the revision ``asked`` for, of a hub id else at the run's ``own``.

    Raises:
        UserError: it is pruned already, or a revision is asked for of what has none.
    """
    config = Path(base).expanduser() / "config.json"
    if config.is_file() and '"model_type": "slimtune_' in config.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"BASE={base!r} is pruned already; give the model that the plan was made for")
    local = Path(base).expanduser().is_dir() or base.startswith(BUILTIN)
    if local and asked:
        raise UserError(f"--revision {asked} is for a hub id, and BASE={base!r} is a folder: leave it out")
    return ModelConfig(path=base, revision=None if local else asked or own)


def _plan_in(file: Path) -> Plan:
    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else "this is no text"
        raise UserError(f"PLAN={str(file)!r}: {reason}; give the plan.json that a run wrote") from error


def _plan_file(given: Path) -> Path:
    file = given / adapter.PLAN if given.is_dir() else given
    if not file.is_file():
        raise UserError(f"PLAN={str(given)!r} is no plan.json and no folder that has one; a run writes it beside its model")
    return file


def _adapter_of(plan: Path, given: str | Path | None) -> Path:
    here = plan.resolve().parent
    if given is not None:
        return Path(given).expanduser()
    for folder in (here / adapter.FOLDER, here, here.parent / adapter.FOLDER):
        if (folder / adapter.CONFIG).is_file():
            return folder
    raise UserError(
        f"no adapter lies beside {str(plan)!r}; give it with --adapter FOLDER (a run writes it unless export.adapter=false), "
        "or cut the base by the plan alone, untuned: --no-adapter"
    )


def _fitting(folder: Path, plan: Plan) -> adapter.Record:
    """The record of an adapter that was made with ``plan``."""
    record = adapter.read_record(folder)
    if not (folder / adapter.PLAN).is_file():
        raise UserError(f"--adapter {str(folder)!r} has no {adapter.PLAN}; fetch it again")
    own = _plan_in(folder / adapter.PLAN)
    if own.digest != plan.digest:
        raise UserError(
            f"--adapter {str(folder)!r} was trained under another plan ({own.digest[:8]}, not {plan.digest[:8]}); give the one "
            "of the same run"
        )
    return record


def _with_adapter(model: Any, folder: Path, structure: Structure) -> Any:
    changed = folder / adapter.CHANGED
    try:
        if changed.is_file():
            put(model, structure, load_file(changed))
        tuned = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter {str(folder)!r} cannot be loaded ({reason}); fetch it again") from error
    return tuned

"""What rebuilds a run's model from its base: plan, LoRA factors, and the weights that compensation changed (``apply``).

The folder is a PEFT adapter of the *cut* base, with ``plan.json`` beside it and, where consumers compensate for what was
removed, ``changed.safetensors``: those weights cannot be had from the base without the data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.export.card_facts import public
from slimtune.export.folder import replacing
from slimtune.models.load import load_model
from slimtune.models.surgery import cut
from slimtune.sections import ModelConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHANGED = "changed.safetensors"
RECORD = "apply.json"
PLAN = "plan.json"
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Bound:
    """An adapter, on the CPU.

    Attributes:
        base: what it was trained on, as others may read it.
        plan: what stays of the base.
        config: of PEFT.
        factors: LoRA's tensors by PEFT's names.
        changed: weights and biases of the cut base that are not the base's, by name.
        dtype: that the base's weights had in training.
    """

    base: str
    plan: Plan
    config: LoraConfig
    factors: dict[str, Tensor]
    changed: dict[str, Tensor]
    dtype: torch.dtype


@torch.no_grad()
def taken(model: PeftModel, base: ModelConfig, structure: Structure, plan: Plan) -> Bound | None:
    """The adapter of ``model``, which was cut by ``plan``; None where all weights were drawn, so that there is no base.

    The base is loaded once more, on the CPU: what is not its own is what differs.
    """
    if base.init != "pretrained":
        return None
    own = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    dtype = next(iter(own.values())).dtype
    fresh: Any = load_model(base, "cpu", dtype)
    cut(fresh, structure, plan)
    theirs = dict(fresh.named_parameters())
    changed = {
        name: tensor.cpu().clone()
        for name, tensor in own.items()
        if name not in theirs or not torch.equal(theirs[name], tensor.cpu())
    }
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config: Any = model.peft_config["default"]
    told = public(base.path)
    config.base_model_name_or_path = told
    config.inference_mode = True
    return Bound(told, plan, config, {name: each.detach().cpu().clone() for name, each in factors.items()}, changed, dtype)


def write(folder: Path, bound: Bound, digest: str, dtype: torch.dtype) -> None:
    """Write ``bound`` to ``folder``, whole or not at all; an earlier adapter there is replaced.

    Args:
        digest: of the merged model (``digest_of``), for ``apply`` to know that it has built the same one.
        dtype: that the merged model is written in.

    Raises:
        UserError: the disk is full, or the folder may not be replaced.
    """
    needed = sum(each.numel() * each.element_size() for each in (*bound.factors.values(), *bound.changed.values()))
    with replacing(folder, needed + _SPARE_BYTES, marker=CONFIG) as partial:
        bound.config.save_pretrained(str(partial))
        save_file({name: each.contiguous() for name, each in bound.factors.items()}, partial / WEIGHTS, {"format": "pt"})
        if bound.changed:
            save_file({name: each.contiguous() for name, each in bound.changed.items()}, partial / CHANGED, {"format": "pt"})
        (partial / PLAN).write_text(bound.plan.to_json(), encoding="utf-8")
        record = {"base": bound.base, "base_dtype": _name(bound.dtype), "dtype": _name(dtype), "weights": digest}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def digest_of(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 of all parameters by name, rounded to ``dtype``: equal if and only if all bits are."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().to(dtype).cpu().contiguous()
        found.update(f"{name} {_name(dtype)} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(torch.uint8).numpy().data if tensor.ndim else b"")
    return found.hexdigest()


@dataclass(frozen=True)
class Record:
    """What an adapter's folder says of itself: the base's name, dtypes, and the digest of the merged model."""

    base: str
    base_dtype: str
    dtype: str
    weights: str


def read_record(folder: Path) -> Record:
    """The record in ``folder``. Raises UserError where it is no adapter of ours."""
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--adapter {str(folder)!r} is no adapter that slimtune tune wrote ({RECORD}: {error}); give the folder "
            f"'{FOLDER}' of a run, or --no-adapter for the plan alone"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

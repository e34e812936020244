"""What rebuilds a run's model from its base: plan, LoRA factors, and the weights that compensation changed (``apply``).

The folder is a PEFT adapter of the *cut* base, with ``plan.json`` beside it and, where consumers compensate for what was
removed, ``changed.safetensors``: those weights cannot be had from the base without the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.export.card_facts import public
from slimtune.export.folder import replacing
from slimtune.models.identity import stored_dtype
from slimtune.models.load import load_model
from slimtune.models.piecewise import cut_values
from slimtune.sections import ModelConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHANGED = "changed.safetensors"
ROUTERS = "routers.safetensors"
RECORD = "apply.json"
PLAN = "plan.json"
_SPARE_BYTES = 1 << 20
_CARD = """\
An adapter that slimtune trained on {base} after cutting it: it fits the *cut* base alone. The model that it makes:

    slimtune apply . BASE
"""


@dataclass(frozen=True)
class Bound:
    """An adapter, on the CPU.

    Attributes:
        base: what it was trained on, as others may read it.
        revision: of a base on the hub, where one was asked for.
        plan: what stays of the base.
        config: of PEFT.
        factors: LoRA's tensors by PEFT's names.
        changed: weights and biases of the cut base that are not the base's, by name.
        dtype: that the base's weights had in training.
        routers: of each layer [experts, hidden], where the plan has experts; what makes masks on values, where it has such, by
            layer and name.
    """

    base: str
    revision: str | None
    plan: Plan
    config: LoraConfig
    factors: dict[str, Tensor]
    changed: dict[str, Tensor]
    dtype: torch.dtype
    routers: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def taken(
    model: PeftModel,
    base: ModelConfig,
    structure: Structure,
    plan: Plan,
    routers: Sequence[Tensor] = (),
    modules: Mapping[str, Tensor] | None = None,
) -> Bound | None:
    """The adapter of ``model``, which was cut by ``plan``; None where all weights were drawn, so that there is no base.

    The base is opened once more, on the CPU, in the type of its files, and held to the model weight by weight: what is not its
    own is what differs.
    """
    if base.init != "pretrained":
        return None
    own = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    dtype = next(iter(own.values())).dtype
    fresh = load_model(base, "cpu", stored_dtype(base) or dtype)
    for name, theirs in cut_values(fresh, structure, plan.for_good):
        if name in own and torch.equal(theirs.to(dtype), own[name].cpu()):
            del own[name]
    changed = {name: tensor.cpu().clone() for name, tensor in own.items()}
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config: Any = model.peft_config["default"]
    told = public(base.path)
    config.base_model_name_or_path = told
    config.inference_mode = True
    kept = {name: each.detach().cpu().clone() for name, each in factors.items()}
    routing = {str(layer): each.detach().cpu().clone() for layer, each in enumerate(routers)}
    routing |= {name: each.cpu().clone() for name, each in (modules or {}).items()}
    return Bound(told, base.revision, plan, config, kept, changed, dtype, routing)


def write(folder: Path, bound: Bound, digest: str, dtype: torch.dtype) -> None:
    """Write ``bound`` to ``folder``, whole or not at all; an earlier adapter there is replaced.

    Args:
        digest: of the merged model (``digest_of``), for ``apply`` to know that it has built the same one.
        dtype: that the merged model is written in.

    Raises:
        UserError: the disk is full, or the folder may not be replaced.
    """
    parts = {WEIGHTS: bound.factors, CHANGED: bound.changed, ROUTERS: bound.routers}
    needed = sum(each.numel() * each.element_size() for tensors in parts.values() for each in tensors.values())
    with replacing(folder, needed + _SPARE_BYTES, marker=CONFIG) as partial:
        bound.config.save_pretrained(str(partial))
        for name, tensors in parts.items():
            if tensors or name == WEIGHTS:
                save_file({key: each.contiguous() for key, each in tensors.items()}, partial / name, {"format": "pt"})
        (partial / PLAN).write_text(bound.plan.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(_CARD.format(base=bound.base), encoding="utf-8")
        files = {name: _sha256(partial / name) for name in parts if (partial / name).is_file()}
        record = asdict(Record(bound.base, bound.revision, _name(bound.dtype), _name(dtype), digest, files))
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
    """What an adapter's folder says of itself.

    Attributes:
        base, revision: what it was trained on.
        base_dtype: that the base's weights had in training.
        dtype: that the merged model is written in.
        weights: digest of the merged model.
        files: SHA-256 of the folder's weight files by name.
    """

    base: str
    revision: str | None
    base_dtype: str
    dtype: str
    weights: str
    files: dict[str, str]


def read_record(folder: Path) -> Record:
    """The record in ``folder``, whose files are those that were written. Raises UserError where they are not."""
    try:
        record = Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        if not {record.base_dtype, record.dtype} <= {"float32", "bfloat16", "float16"}:
            raise ValueError(f"types {record.base_dtype} and {record.dtype}")
        broken = [name for name, digest in record.files.items() if not _whole(folder / name, digest)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--adapter {str(folder)!r} is no adapter that slimtune tune wrote ({RECORD}: {error}); give the folder "
            f"'{FOLDER}' of a run, or --no-adapter for the plan alone"
        ) from error
    if broken:
        raise UserError(f"{str(folder / broken[0])!r} is missing or not the file that the run wrote; fetch the adapter again")
    return record


def _whole(file: Path, digest: str) -> bool:
    return file.is_file() and _sha256(file) == digest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Write a cut model as a Hugging Face directory: the stock class where one can hold it, else the per-layer class.

Which class fits is not looked up but tried: the candidate config is built on the meta device and its parameter shapes
are compared with the model's. That catches every trap of the stock classes (validators, norms sized as hidden / heads).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slimtune.errors import UserError
from slimtune.export import card, tokenizer
from slimtune.export.folder import replacing
from slimtune.models import per_layer
from slimtune.models.load import TOKENIZER_FILES, load_tokenizer, locate
from slimtune.runtime import log
from slimtune.sections import ModelConfig
from slimtune.structure.axes import AXES
from slimtune.structure.plan import Plan

MAX_SHARD = "4GB"
_GENERATION = "generation_config.json"
_SPARE_BYTES = 1 << 20
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "per_layer_config")


@dataclass(frozen=True)
class _Twin:
    """A stock class with the same arithmetic and tensors but without the first one's check of hidden_size % heads."""

    model_type: str
    keys: Mapping[str, Any]
    without: tuple[str, ...]
    """Keys of the first class the twin lacks; it can only stand in when they are all off."""
    ignored: tuple[str, ...] = ()


_TWINS = {
    "llama": _Twin(
        "mistral",
        {"sliding_window": None},
        without=("attention_bias", "mlp_bias"),
        ignored=("pretraining_tp", "layer_types"),
    )
}


def save(
    model: PreTrainedModel,
    origin: ModelConfig | None,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None,
    facts: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
    say: Callable[[str], None] = log.warning,
    laid: tuple[PreTrainedConfig, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write ``model`` to ``folder``, whole or not at all; an earlier model there is replaced at the very end.

    Args:
        model: a stock causal LM, cut by ``plan``, LoRA merged; ``model.config`` is still that of the base. Not changed.
        origin: where the base and its tokenizer are; the base's generation_config.json and the tokenizer's files are
            copied byte for byte, as far as the latter make the same tokenizer here (``tokenizer.settle``). None: there is
            no tokenizer.
        plan: the decision; also written, as plan.json.
        folder: the target; ``folder.replacing`` says what it may hold.
        dtype: of the written weights; None: as they are.
        facts: for the model card, see ``card.render``.
        check: called with the written folder before it takes the place of ``folder``; what it raises stops that.
        say: takes a line about a tokenizer that is not the base's here.
        laid: config and weights of the class that the model is written as, where that is another one (``models.moe``).

    Raises:
        UserError: the model does not fit the plan, the disk is full, or the folder may not be replaced.
    """
    carried = _carried_files(origin)
    sources = [Path(path).expanduser().resolve() for path in ((origin.path, origin.tokenizer) if origin else ()) if path]
    if Path(folder).resolve() in sources:
        raise UserError(f"the export would replace its own base {str(folder)!r}; choose another folder")
    weights: Mapping[str, Tensor] = dict(model.named_parameters())  # tied ones once
    if laid:
        config, weights = laid
    else:
        config = config_for(model.config, plan, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    config.dtype = dtype or model.dtype

    def finish(partial: Path) -> None:
        for file in carried:
            copyfile(file, partial / file.name)
        if origin:
            tokenizer.settle(lambda: load_tokenizer(origin), partial, say)
        if not (partial / _GENERATION).exists():
            model.generation_config.save_pretrained(partial)
        (partial / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        card.write(partial, {"parameters_after": sum(map(Tensor.numel, weights.values())), **facts}, plan)

    return write(Path(folder), config, weights, dtype, finish, check)


def write(
    folder: Path,
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    finish: Callable[[Path], None],
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``config`` (with the code it carries) and ``weights`` to ``folder``, whole or not at all.

    Args:
        weights: by name, tied ones once.
        dtype: of the written weights; None: as they are, and as ``config.dtype`` says.
        finish: puts the other files into the folder that is being written.
        check: called with the finished folder before it takes the place of ``folder``; what it raises stops that.

    Raises:
        UserError: the disk is full, or the folder may not be replaced.
    """
    size = torch.empty((), dtype=config.dtype).element_size()
    with replacing(folder, sum(tensor.numel() for tensor in weights.values()) * size + _SPARE_BYTES) as partial:
        config.save_pretrained(partial)
        converted = {name: _converted(tensor, dtype) for name, tensor in weights.items()}
        save_torch_state_dict(converted, partial, max_shard_size=MAX_SHARD, metadata={"format": "pt"})
        finish(partial)
        if check:
            check(partial)
    return folder


def config_for(base: PreTrainedConfig, plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> PreTrainedConfig:
    """The config of the cut model: stock if a stock class builds exactly ``shapes``, else the per-layer one.

    Raises:
        UserError: no class builds these shapes, so the model was not cut by ``plan`` (or still carries LoRA).
    """
    found, difference = fitting(_candidates(base, plan), shapes)
    if found is None:
        raise UserError(f"the model does not fit its plan: {difference}; merge LoRA and cut it with this plan before saving")
    return found


def fitting(
    candidates: Iterable[PreTrainedConfig], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[PreTrainedConfig | None, str]:
    """The first config whose class builds exactly ``shapes``, with the class's name in it; else what differs in the last."""
    difference = "no stock class takes these widths"
    for candidate in candidates:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(copy.deepcopy(candidate))
        built = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters()}
        if built == dict(shapes):
            candidate.architectures = [type(shell).__name__]
            return candidate, ""
        difference = _first_difference(built, shapes)
    return None, difference


def _candidates(base: PreTrainedConfig, plan: Plan) -> Iterator[PreTrainedConfig]:
    if all(len(kept[axis]) == full[axis] for kept, full in zip(plan.kept, plan.full, strict=True) for axis in AXES):
        uncut = copy.deepcopy(base)
        uncut.use_cache = True
        yield uncut
        return
    keys = keys_of(base)
    if plan.is_uniform:
        yield from stock(base.model_type, {**keys, **plan.widths(plan.layers[0])})
    per_layer.register()
    widths = {str(index): plan.widths(layer) for index, layer in enumerate(plan.layers)}
    yield per_layer.CONFIGS[base.model_type](**keys, per_layer_config=widths)


def keys_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config for other widths takes over, the size of a head among it."""
    keys = {key: value for key, value in config.to_dict().items() if key not in _NOT_CARRIED}
    keys["use_cache"] = True  # training switches it off; a model folder is for use
    # after a cut hidden_size / heads no longer is the size of a head
    keys["head_dim"] = keys.get("head_dim") or config.hidden_size // config.num_attention_heads
    return keys


def stock(model_type: str, keys: Mapping[str, Any]) -> Iterator[PreTrainedConfig]:
    """Stock configs with ``keys``: the family's own, and one of the same arithmetic, as far as they take the widths."""
    options = [(model_type, dict(keys))]
    twin = _TWINS.get(model_type)
    if twin and not any(keys.get(key) for key in twin.without):
        kept = {key: value for key, value in keys.items() if key not in (*twin.without, *twin.ignored)}
        options.append((twin.model_type, {**kept, **twin.keys}))
    for name, option in options:
        try:
            yield AutoConfig.for_model(name, **option)
        except (StrictDataclassError, ValueError):
            continue  # the class refuses such widths by rule; the next one may not


def _first_difference(built: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    for name in sorted({*built, *given}):
        if built.get(name) != given.get(name):
            return f"{name} should be {built.get(name, 'absent')} and is {given.get(name, 'absent')}"
    return "no difference"


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    detached = tensor.detach()
    return detached.to(dtype) if dtype and detached.is_floating_point() else detached


def _carried_files(origin: ModelConfig | None) -> list[Path]:
    """The tokenizer's files, and the base's own word on generation."""
    if origin is None:
        return []
    source, revision = origin.tokenizer_source
    found = _files_of(source, "model.tokenizer", revision, TOKENIZER_FILES)
    return found + (_files_of(origin.path, "model.path", origin.revision, [_GENERATION]) if origin.path else [])


def _files_of(source: str, what: str, revision: str | None, patterns: Iterable[str]) -> list[Path]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        location, local = locate(source, what)
        folder = Path(location) if local else _fetched(location, revision, patterns)
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _fetched(location: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=list(patterns)))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{', '.join(patterns)} of {location!r} cannot be fetched ({reason}); give a local folder") from error

"""Load configs, tokenizers and models from a folder, the hub or the package; attach LoRA. Nothing on disk changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available

from slimtune.errors import UserError, nearest
from slimtune.models.buffers import exact_buffers
from slimtune.sections import LoraConfig, ModelConfig
from slimtune.structure.axes import Structure
from slimtune.structure.families import describe, family_of

BUILTIN = "builtin:"
TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
"""Names of the files that make up a tokenizer."""
_BAD_FILES = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
"""What transformers raises for files that are absent, broken or of a kind it does not know."""


def locate(path: str, what: str = "model.path") -> tuple[str, bool]:
    """A usable location and whether it is local. Only ``org/name`` may reach the network, and not beside a folder ``org``.

    Raises:
        UserError: a folder that does not exist, a file, or a builtin that is not shipped.
    """
    if path.startswith(BUILTIN):
        assets = Path(str(files("slimtune"))) / "assets"
        folder = assets / path.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            shipped = ", ".join(sorted(BUILTIN + each.parent.name for each in assets.glob("*/config.json")))
            raise UserError(f"{what}={path!r} is not shipped with this package; it has {shipped}")
        return str(folder), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = f": did you mean {str(folder / 'model')!r}?" if (folder / "model" / "config.json").is_file() else ""
            raise UserError(f"{what}={path!r} has no config.json; give a Hugging Face model folder{inside}")
        return str(folder), True
    if folder.is_file():
        raise UserError(f"{what}={path!r} is a file; give the folder that holds a model's config.json and weights")
    # "recipes/nope" beside a folder "recipes" is a mistyped path: it must not become a download
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and not folder.parent.is_dir():
        return path, False
    raise UserError(f"{what}={path!r} does not exist; give a model folder, a hub id org/name, or builtin:base-10m")


def _hub(call: Any, location: str, local: bool, what: str, bad: tuple[type[Exception], ...] = (OSError,), **kwargs: Any) -> Any:
    try:
        # False, not absent: without it transformers stops to ask on the terminal whether to run a folder's own code
        return call(location, local_files_only=local, trust_remote_code=False, **kwargs)
    except bad as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "check the folder's files" if local else "check the id and the network, or give a folder"
        raise UserError(f"{what}={location!r} cannot be loaded ({reason}); {remedy}") from error


def load_config(config: ModelConfig, what: str = "model.path") -> PreTrainedConfig:
    """The Hugging Face config of the recipe's model, inline keys applied for ``init: config``; ``what`` stands in messages."""
    if not config.path:
        if "model_type" not in config.config:
            raise UserError("model.path is empty: give a folder or hub id, or init: config with config.model_type")
        keys = dict(config.config)
        model_type = family_of(str(keys.pop("model_type"))).model_type
        return _configured(AutoConfig.for_model(model_type), keys, lambda: AutoConfig.for_model(model_type, **keys))
    location, local = locate(config.path, what)
    if local and config.revision:
        raise UserError(
            f"model.revision={config.revision!r} is for a hub id; model.path={config.path!r} is a folder: leave it out"
        )
    _refuse_unknown(location, local, what, config.revision)
    loaded = _hub(AutoConfig.from_pretrained, location, local, what, _BAD_FILES, revision=config.revision)
    return _configured(loaded, config.config, lambda: _with(loaded, config.config))


def _configured(base: PreTrainedConfig, keys: Mapping[str, Any], make: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """What ``make`` builds from the recipe's ``keys``, once they are known to be keys of ``base``."""
    known = {*base.to_dict(), *base.attribute_map, "head_dim"}  # which every family reads, declared or not
    for key in keys:
        if key not in known:
            raise UserError(f"model.config: {key!r} is no key of a {base.model_type} config.{nearest(key, sorted(known))}")
    try:
        return make()
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.config={dict(keys)!r} is refused by transformers ({reason}); correct the values") from error


def _with(config: PreTrainedConfig, keys: Mapping[str, Any]) -> PreTrainedConfig:
    """``config`` with other values, made anew: transformers checks a config only as it is made."""
    if not keys:
        return config
    raw = config.to_dict()
    layers, kinds = keys.get("num_hidden_layers"), raw.get("layer_types")
    if kinds and isinstance(layers, int) and layers != len(kinds):  # fewer layers are the first ones; more follow the pattern
        raw["layer_types"] = kinds[:layers] if layers < len(kinds) else None
    return type(config)(**{**raw, **{config.attribute_map.get(key, key): value for key, value in keys.items()}})


def _refuse_unknown(location: str, local: bool, what: str, revision: str | None) -> None:
    """Refuse a model_type that transformers does not know either, with our list instead of its ValueError."""
    raw, _ = _hub(PreTrainedConfig.get_config_dict, location, local, what, _BAD_FILES, revision=revision)
    if not isinstance(raw, dict):
        raise UserError(f"{what}={location!r} cannot be loaded (its config.json is no object); check the folder's files")
    if raw.get("model_type") and raw["model_type"] not in CONFIG_MAPPING:
        family_of(str(raw["model_type"]))


def check_weights(config: ModelConfig) -> None:
    """Raise UserError where the weight files of a local base are absent, broken or cut short: by their headers, in no time."""
    if config.init == "config" or not locate(config.path)[1]:
        return
    folder = Path(locate(config.path)[0])
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        for name in sorted(names):
            if index.is_file() or (folder / name).is_file():
                with safe_open(folder / name, "pt") as file:
                    file.keys()
            elif not any(folder.glob("*.bin")):
                raise FileNotFoundError(f"no {name}")
    except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.path={config.path!r} cannot be loaded ({reason}); check the folder's files") from error


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raise UserError where ``data.max_length`` is more than the positions the model was made for."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_length > limit:
        raise UserError(
            f"data.max_length={max_length} exceeds the model's max_position_embeddings={limit}; set data.max_length={limit} "
            "or less (longer rows: data.on_long), or choose a model with a longer context"
        )


def load_tokenizer(config: ModelConfig, what: str = "") -> Any:
    """The tokenizer, exactly as it is (no token added, no setting changed); ``what`` stands in messages for a recipe's key."""
    path, revision = config.tokenizer_source
    if not path:
        raise UserError("model.tokenizer is empty: give a folder or hub id with a tokenizer")
    key = what or ("model.tokenizer" if config.tokenizer else "model.path")
    if config.tokenizer and Path(path).expanduser().is_dir():
        location, local = str(Path(path).expanduser()), True
    else:
        location, local = locate(path, key)
    if local and not any(file for name in TOKENIZER_FILES for file in Path(location).glob(name)):
        remedy = "copy those of its base there" if what else "give a folder or hub id that has them: model.tokenizer=..."
        raise UserError(f"{key}={path!r} has no tokenizer files; {remedy}")
    return _hub(AutoTokenizer.from_pretrained, location, local, key, _BAD_FILES, revision=revision)


def meta_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """``{parameter name: shape}`` of the model a config describes, tied parameters once, no memory used."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def structure_of(config: PreTrainedConfig) -> Structure:
    """The prunable structure of the model a config describes. Raises UserError for refused and unknown families."""
    family_of(str(config.model_type))  # refuse before building anything
    return describe(config.to_dict(), meta_shapes(config))


def attention_of(config: ModelConfig, loaded: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments that choose the attention implementation, the same for the base and for what is written."""
    if config.attention == "auto" and getattr(loaded, "attn_logit_softcapping", None):
        return {"attn_implementation": "eager"}  # sdpa drops the soft cap without a word
    return {} if config.attention == "auto" else {"attn_implementation": config.attention}


def check_attention(config: ModelConfig, device: str) -> None:
    """Raise UserError where the attention asked for cannot run here, before anything is read."""
    if config.attention == "flash_attention_2" and not (device.startswith("cuda") and is_flash_attn_2_available()):
        raise UserError(
            f"model.attention=flash_attention_2 needs a CUDA device (this is {device}) and the package flash-attn: "
            "pip install flash-attn --no-build-isolation, or set model.attention=sdpa"
        )


def without_flash(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, able to run on CPU in fp32, which flash attention is not."""
    if model.config._attn_implementation == "flash_attention_2":
        model.set_attn_implementation("sdpa")
    return model


def straight_to(device: str) -> dict[str, Any]:
    """Keyword arguments that load each weight from its mapped file to ``device``, in the type asked for, none on the host.

    For a CPU there are none: a weight of the right type *is* the mapped file there.
    """
    return {} if device == "cpu" else {"device_map": {"": device}}


def load_model(config: ModelConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on ``device`` in ``dtype``, dropout-free eval mode, caches off."""
    kwargs = attention_of(config, load_config(config))
    if config.init == "config":
        with torch.device(device):  # drawn where it will live: on CPU an 8B model takes minutes
            model = AutoModelForCausalLM.from_config(load_config(config), dtype=dtype, **kwargs)
    else:
        model = pretrained(config, {"dtype": dtype, "revision": config.revision, **straight_to(device), **kwargs})
    if dtype is not torch.float32:
        exact_buffers(model, load_config(config))
    model.config.use_cache = False
    return model.to(device).eval()


def pretrained(config: ModelConfig, kwargs: Mapping[str, Any], what: str = "model.path") -> PreTrainedModel:
    """Weights from files. transformers would draw absent tensors at random with no more than a warning."""
    location, local = locate(config.path, what)
    # ignore_mismatched_sizes: so that such tensors are told by name below
    asked = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    bad = (*_BAD_FILES, SafetensorError)
    model, info = _hub(AutoModelForCausalLM.from_pretrained, location, local, what, bad, **asked)
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{item[0]} has another shape" for item in sorted(info["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{what}={config.path!r} cannot be loaded ({wrong[0]}{more}); check the folder's files")
    return model


def enable_checkpointing(model: PreTrainedModel | PeftModel, kind: str) -> None:
    """Activation checkpointing: ``none``, ``non_reentrant`` or ``reentrant``."""
    if kind == "none":
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    how = {"use_reentrant": kind == "reentrant"}
    if hasattr(base, "activation_checkpointing_enable"):  # transformers' new name; the earlier one goes with version 6
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if kind == "reentrant":
        # a reentrant segment is only differentiated when its input asks for a gradient; embeddings are frozen
        base.enable_input_require_grads()


def attach_lora(model: PreTrainedModel, structure: Structure, lora: LoraConfig, autocast: bool = False) -> PeftModel:
    """PEFT LoRA on every linear of the blocks (the table's rows); everything else frozen. Adapters in fp32.

    Args:
        autocast: the model will only run under autocast. PEFT then need not cast each input of a linear to the adapter's
            fp32, which autocast would undo at once: the same numbers, two copies of every activation fewer.
    """
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        lora_dropout=lora.dropout,
        target_modules=[row.path for row in structure.family.linears],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, peft_config)
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = not autocast
    return tuned

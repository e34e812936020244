"""Causal language models whose decoder layers differ in width: stock transformers classes, narrowed layer by layer.

The widths stand in ``config.per_layer_config``, the schema of transformers itself::

    {"0": {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 2048}, "1": {...}}

Every other key is that of the model before it was pruned. This file needs only torch and transformers (5.14 or newer);
it is also copied into model folders as ``modeling_slimtune.py`` for ``trust_remote_code=True``.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
from types import new_class
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin

CODE_FILE = "modeling_slimtune"
"""Name (without ``.py``) of the copy of this file in a model folder."""

_FAMILIES = {
    "llama": ("Llama", "LlamaModel"),
    "mistral": ("Mistral", "MistralModel"),
    "qwen2": ("Qwen2", "Qwen2Model"),
    "qwen3": ("Qwen3", "Qwen3Model"),
    "phi": ("Phi", "PhiModel"),
    "gemma": ("Gemma", "GemmaModel"),
    "gemma2": ("Gemma2", "Gemma2Model"),
    "gemma3_text": ("Gemma3Text", "Gemma3TextModel"),
    "granite": ("Granite", "GraniteModel"),
}
_CAUSAL = {"gemma3_text": "Gemma3ForCausalLM"}  # the one causal class that is not <prefix>ForCausalLM


class _PerLayerConfig:
    """Mixed into the stock config class of a family."""

    # The global widths are those of the model before the cut. Stock code reads them while it builds (and validates) the
    # full-width skeleton that ``_narrow`` then replaces, so reading them is not the mistake it would be elsewhere.
    allow_global_per_layer_attribute_access = True

    def __getattribute__(self, key: str) -> Any:
        # for the same reason without the warning that transformers would log
        return super(HeterogeneousConfigMixin, self).__getattribute__(key)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json with all three ``auto_map`` entries, and this file beside it: the folder loads alone."""
        self.auto_map = _auto_map(type(self))
        os.makedirs(save_directory, exist_ok=True)
        target = os.path.join(save_directory, f"{CODE_FILE}.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: ``save_pretrained`` writes the code and ``auto_map`` itself, and writes them whole."""


class _PerLayerModel:
    """Mixed into the stock base and causal classes of a family."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _narrow(self.base_model, config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do, see the config."""


def _narrow(model: nn.Module, config: PreTrainedConfig) -> None:
    """Replace attention and MLP of every layer by ones built from that layer's own config."""
    for index, layer in enumerate(model.layers):  # type: ignore[arg-type]
        own = config.per_layer_config[index]
        if getattr(own, "skip", None):
            raise ValueError(f"layer {index}: per_layer_config 'skip' is not supported by {type(model).__name__}")
        attention = type(layer.self_attn)(own, index)
        for name, child in layer.self_attn.named_children():
            if not isinstance(child, nn.Linear):
                # norms of one head: some families size them as hidden_size / heads, which holds for the full width only
                setattr(attention, name, child)
        mlp = type(layer.mlp)(own)
        # One shared config object, so that a later model.set_attn_implementation() reaches every layer.
        attention.config = mlp.config = config
        layer.self_attn, layer.mlp = attention, mlp


def _auto_map(config_class: type) -> dict[str, str]:
    stem = config_class.__name__.removesuffix("Config")
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto: f"{CODE_FILE}.{stem}{suffix}" for auto, suffix in names.items()}


def _subclass(name: str, bases: tuple[type, ...], **attributes: Any) -> type:
    # __module__ must be right while the class is being made: transformers resolves its annotations there.
    doc = f"{bases[1].__name__} with widths by layer."
    body = {"__module__": __name__, "__qualname__": name, "__doc__": doc, **attributes}
    made = new_class(name, bases, exec_body=lambda namespace: namespace.update(body))
    globals()[name] = made
    return made


CONFIGS: dict[str, type[PreTrainedConfig]] = {}
"""``model_type`` of the base -> config class with widths by layer."""
_MODELS: dict[str, tuple[type, type]] = {}

for _family, (_prefix, _base) in _FAMILIES.items():
    _stem = f"Slimtune{_prefix}"
    _config: Any = _subclass(
        f"{_stem}Config",
        (_PerLayerConfig, getattr(transformers, f"{_prefix}Config")),
        model_type=f"slimtune_{_family}",
    )
    _stock_causal = getattr(transformers, _CAUSAL.get(_family, f"{_prefix}ForCausalLM"))
    CONFIGS[_family] = _config
    _MODELS[_family] = (
        _subclass(f"{_stem}Model", (_PerLayerModel, getattr(transformers, _base)), config_class=_config),
        _subclass(f"{_stem}ForCausalLM", (_PerLayerModel, _stock_causal), config_class=_config),
    )


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know these classes. May be called again."""
    for family, config in CONFIGS.items():
        base, causal = _MODELS[family]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)

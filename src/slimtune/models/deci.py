"""A Llama block whose KV heads and MLP width differ by layer, in the config format of vLLM's ``DeciLMForCausalLM``.

All layers have ``num_attention_heads`` query heads; what differs stands in ``block_configs``, one entry for each layer::

    {"attention": {"no_op": false, "n_heads_in_group": 4}, "ffn": {"no_op": false, "intermediate_size": 2048}}

A layer has ``num_attention_heads // n_heads_in_group`` KV heads. vLLM reads the config class alone and computes with a class
of its own; the model classes are for transformers (5.14 or newer). This file needs only torch and transformers; it is copied
into model folders as ``modeling_slimtune_deci.py`` for ``trust_remote_code=True``.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, MistralConfig

CODE_FILE = "modeling_slimtune_deci"
"""Name (without ``.py``) of the copy of this file in a model folder."""


class Block(dict[str, Any]):
    """A dictionary whose keys are attributes too: code reads them so, and JSON and copies work as they do of any other."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciConfig(MistralConfig):
    """Mistral's keys, which allow any number of heads, and ``block_configs`` and who has biases."""

    model_type = "nemotron-nas"

    def __init__(
        self,
        block_configs: Iterable[Mapping[str, Any]] = (),
        attention_bias: bool = False,
        qkv_bias: bool = False,
        mlp_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.attention_bias, self.qkv_bias, self.mlp_bias = attention_bias, qkv_bias, mlp_bias
        self.block_configs = [Block({part: Block(keys) for part, keys in block.items()}) for block in block_configs]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json with all three ``auto_map`` entries, and this file beside it: the folder loads alone."""
        names = {"AutoConfig": DeciConfig, "AutoModel": DeciModel, "AutoModelForCausalLM": DeciLMForCausalLM}
        self.auto_map = {auto: f"{CODE_FILE}.{named.__name__}" for auto, named in names.items()}
        os.makedirs(save_directory, exist_ok=True)
        target = os.path.join(save_directory, f"{CODE_FILE}.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: ``save_pretrained`` writes the code and ``auto_map`` itself, and writes them whole."""


def _narrow(model: nn.Module, config: DeciConfig) -> None:
    """Replace attention and MLP of every layer by ones of that layer's widths."""
    for index, (layer, block) in enumerate(zip(model.layers, config.block_configs, strict=True)):  # type: ignore[arg-type]
        if block.attention.no_op or block.ffn.no_op:
            raise ValueError(f"layer {index}: no_op is not supported by {type(model).__name__}")
        own = copy.copy(config)
        own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        own.intermediate_size = block.ffn.intermediate_size
        own.attention_bias = config.qkv_bias
        attention, mlp = type(layer.self_attn)(own, index), type(layer.mlp)(own)
        if config.attention_bias != config.qkv_bias:
            shape = attention.o_proj.in_features, attention.o_proj.out_features
            attention.o_proj = nn.Linear(*shape, bias=config.attention_bias)
        # one shared config object, so that a later model.set_attn_implementation() reaches every layer
        attention.config = mlp.config = config
        layer.self_attn, layer.mlp = attention, mlp


class DeciModel(LlamaModel):
    """Llama's, with widths by layer."""

    config_class = DeciConfig

    def __init__(self, config: DeciConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _narrow(self, config)
        self.post_init()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do, see the config."""


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama's, with widths by layer. Has vLLM's name for it, for ``architectures`` is written from it."""

    config_class = DeciConfig

    def __init__(self, config: DeciConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _narrow(self.model, config)
        self.post_init()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing to do, see the config."""

"""Stock classes of sparse experts whose attention gives every token its own value dimensions (ToMoE, arXiv 2501.15316, 3.3).

A small module in each layer makes logits of what q, k and v read; the ``value_dims`` largest of a token's are on. They multiply
its values in all KV heads, which a cache then holds so, and what it gives to o_proj in all query heads. This file needs only
torch and transformers (5.14 or newer); it is also copied into model folders as ``modeling_slimtune_values.py`` for
``trust_remote_code=True``. SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
from types import new_class
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

CODE_FILE = "modeling_slimtune_values"
"""Name (without ``.py``) of the copy of this file in a model folder."""

_HOSTS = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "glm4_moe": "Glm4Moe"}


class ValueMask(nn.Module):
    """The mask of a layer: ``b + W_a GELU(LN(W_x x + u))`` in fp32, of which the largest are on."""

    def __init__(self, config: Any):
        super().__init__()
        self.dims, self.size = config.value_dims, config.head_dim
        self.state = nn.Parameter(torch.zeros(config.value_mask_size))
        self.read = nn.Linear(config.hidden_size, config.value_mask_size, bias=False)
        self.norm = nn.LayerNorm(config.value_mask_size)
        self.make = nn.Linear(config.value_mask_size, self.size)
        self.now: Tensor | None = None
        self.around: list[Any] = []
        """The attention, in a list: it is no part of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """0/1 [B, T, head_dim] for ``x`` [B, T, hidden]."""
        logits = self.logits(x)
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., : self.dims]
        return torch.zeros_like(logits).scatter_(-1, order, 1.0)

    def logits(self, x: Tensor) -> Tensor:
        """[B, T, head_dim] fp32."""
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.linear(x.float(), self.read.weight.float()) + self.state.float()
            norm = F.layer_norm(mixed, mixed.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)
            return F.linear(F.gelu(norm), self.make.weight.float(), self.make.bias.float())

    def hang(self, attention: Any) -> None:
        """Into a layer's attention; bound methods, which a deep copy of the model binds to the copy.

        Again where a quantiser or LoRA has put something in the place of a projection: what is there by now is gated alone.
        """
        self.around = [attention]
        if not getattr(attention.v_proj, _GATED, False):
            attention.v_proj.register_forward_hook(self.gate_values)
            setattr(attention.v_proj, _GATED, True)
        if not getattr(attention.o_proj, _GATED, False):
            attention.o_proj.register_forward_pre_hook(self.gate_queries)
            setattr(attention.o_proj, _GATED, True)

    def gate_values(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Of what v_proj read and gives."""
        if module is not self.around[0].v_proj:
            return output
        self.now = self(args[0])
        return self._times(output, self.now)

    def gate_queries(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What o_proj is about to read, of the same tokens."""
        if module is not self.around[0].o_proj:
            return args
        mask, self.now = self.now, None
        assert mask is not None
        return (self._times(args[0], mask), *args[1:])

    def _times(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, self.size)) * mask.unsqueeze(-2).to(x.dtype)).flatten(-2)


_GATED = "_slimtune_gated"
"""On a projection that has its hook."""


def _hang(model: Any, args: Any) -> None:
    """Before a forward pass."""
    for layer in model.layers:
        layer.self_attn.value_mask.hang(layer.self_attn)


class _MaskedConfig:
    """Mixed into the stock config class. What ``per_layer`` has alike stands here again: either file is copied alone."""

    value_dims = 0
    value_mask_size = 128

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json with all three ``auto_map`` entries, and this file beside it: the folder loads alone."""
        stem = type(self).__name__.removesuffix("Config")
        names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        self.auto_map = {auto: f"{CODE_FILE}.{stem}{suffix}" for auto, suffix in names.items()}
        os.makedirs(save_directory, exist_ok=True)
        target = os.path.join(save_directory, f"{CODE_FILE}.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: ``save_pretrained`` writes the code and ``auto_map`` itself, and writes them whole."""


class _MaskedModel:
    """Mixed into the stock base class."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in self.layers:  # type: ignore[attr-defined]
            layer.self_attn.value_mask = ValueMask(config)
        _hang(self, ())
        self.register_forward_pre_hook(_hang)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do, see the config."""


class _MaskedCausal:
    """Mixed into the stock causal class, whose body becomes one with masks."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.model = _MODELS[config.model_type.removeprefix(PREFIX)][0](config)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing to do, see the config."""


def _subclass(name: str, bases: tuple[type, ...], **attributes: Any) -> type:
    # __module__ must be right while the class is being made: transformers resolves its annotations there.
    doc = f"{bases[1].__name__} with a mask of every token on values."
    body = {"__module__": __name__, "__qualname__": name, "__doc__": doc, **attributes}
    made = new_class(name, bases, exec_body=lambda namespace: namespace.update(body))
    globals()[name] = made
    return made


PREFIX = "slimtune_"
CONFIGS: dict[str, type[PreTrainedConfig]] = {}
"""``model_type`` of the stock class -> config class with masks on values."""
_MODELS: dict[str, tuple[type, type]] = {}

for _host, _prefix in _HOSTS.items():
    _stem = f"Slimtune{_prefix}"
    _bases = (_MaskedConfig, getattr(transformers, f"{_prefix}Config"))
    _config: Any = _subclass(f"{_stem}Config", _bases, model_type=f"{PREFIX}{_host}")
    CONFIGS[_host] = _config
    _MODELS[_host] = (
        _subclass(f"{_stem}Model", (_MaskedModel, getattr(transformers, f"{_prefix}Model")), config_class=_config),
        _subclass(f"{_stem}ForCausalLM", (_MaskedCausal, getattr(transformers, f"{_prefix}ForCausalLM")), config_class=_config),
    )
    # files name single experts, as the stock class's do; code of a folder has no share in what is known of that
    register_checkpoint_conversion_mapping(_config.model_type, get_checkpoint_conversion_mapping(_host) or [], overwrite=True)


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know these classes. May be called again."""
    for host, config in CONFIGS.items():
        base, causal = _MODELS[host]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)

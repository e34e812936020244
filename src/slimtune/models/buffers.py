"""Constants that live in buffers, in the precision that loading in 16 bits took from them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig


@torch.no_grad()
def exact_buffers(model: nn.Module, config: PreTrainedConfig) -> None:
    """Give constants that live in buffers (Gemma's embedding scale) back the precision that loading in bf16 took.

    They depend on the hidden size and on RoPE alone, so a clone of one narrow layer knows them. What is computed in bf16
    rounds them again; what is exported and compared in fp32 does not.
    """
    clone = copy.deepcopy(config)
    clone.num_hidden_layers, clone.vocab_size, clone.intermediate_size = 1, 8, 8
    clone.pad_token_id = clone.bos_token_id = clone.eos_token_id = None
    if getattr(clone, "layer_types", None):
        clone.layer_types = clone.layer_types[:1]
    exact = dict(AutoModelForCausalLM.from_config(clone, dtype=torch.float32).named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_floating_point() and buffer.dtype is not torch.float32 and name in exact:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = exact[name].to(buffer.device)

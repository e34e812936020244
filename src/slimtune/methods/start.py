"""What every method starts from: the base, with LoRA and gates where they are wanted, drawn from the same seeds."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from slimtune.models.head_hooks import place_head_masks
from slimtune.models.hooks import place_gates
from slimtune.models.load import attach_lora, attention_of, enable_checkpointing, load_config, load_model
from slimtune.models.quantized import load_as_trained, load_on_host, to_measure, unquantized
from slimtune.models.sharded import cut_model, sharded, template_of
from slimtune.models.surgery import Replaced
from slimtune.prune.gates import MaskBank
from slimtune.runtime import pick_dtype, rank
from slimtune.structure.plan import Plan
from slimtune.train.loop import hash_seed
from slimtune.train.session import Session


def gated_model(session: Session) -> tuple[nn.Module, MaskBank, list[Any]]:
    """The model with LoRA attached, the bank that its gates read (open), and the handles that take the gates out."""
    model, bank = base_model(session, pick_dtype(session.recipe.model.dtype, str(session.device))), MaskBank()
    handles = place_gates(model, session.structure, bank.consumer, bank.base, bank.innovation, bank.follow)
    if session.recipe.method == "tomoe" and session.recipe.moe.attention != "groups":
        handles += place_head_masks(model, session.structure, bank.head)
    return model, bank, handles


def base_model(session: Session, dtype: torch.dtype, lora: bool = True) -> nn.Module:
    """The recipe's model in ``dtype``, with LoRA unless told otherwise; spread over the processes where the recipe says so."""
    config, structure, device = session.recipe.model, session.structure, session.device
    if not session.sharded:
        model = _whole(session, str(device), dtype, lora)
        enable_checkpointing(model, config.checkpointing)
        return model
    described = load_config(config)
    template: Any = template_of(described, dtype, **attention_of(config, described))
    if lora:
        with init_empty_weights(include_buffers=False):
            template = attach_lora(template, structure, session.recipe.lora, session.autocast_only)
    enable_checkpointing(template, config.checkpointing)
    # files are read into host memory; what is drawn is drawn where one process would, for the same numbers
    place = str(device) if config.init == "config" else "cpu"
    source = _whole(session, place, dtype, lora) if rank() == 0 else None
    return sharded(template, structure, device, source)


def untuned_model(session: Session, dtype: torch.dtype) -> nn.Module:
    """The base to take figures of: never in 4 bits, whatever it is trained in."""
    if session.recipe.model.quantize == "none":
        return base_model(session, dtype, lora=False)
    torch.manual_seed(hash_seed(session.recipe.seed, "weights"))
    whole = load_on_host(session.recipe.model, str(session.device), dtype)
    model: nn.Module = to_measure(whole, session.structure, session.device)
    return model


def cut_to_recover(session: Session, model: nn.Module, plan: Plan) -> tuple[nn.Module, list[Replaced]]:
    """``sharded.cut_model``; of a base in 4 bits quantised anew or with whole weights, as the session says."""
    if session.recipe.model.quantize == "none" or session.recover_in_4_bits:
        return cut_model(model, session.structure, plan)
    small, replaced = cut_model(unquantized(model), session.structure, plan)  # what is cut comes to the device, no more
    return small.to(session.device), replaced  # and weights that no cut touched


def _whole(session: Session, device: str, dtype: torch.dtype, lora: bool) -> Any:
    recipe = session.recipe
    torch.manual_seed(hash_seed(recipe.seed, "weights"))  # of init: config; the same ones in a resumed run
    if not lora:
        return load_model(recipe.model, device, dtype)
    base = load_as_trained(recipe.model, session.structure, device, dtype)
    torch.manual_seed(hash_seed(recipe.seed, "lora"))
    return attach_lora(base, session.structure, recipe.lora, session.autocast_only)

"""What every pruning method starts from: the base with LoRA and gates, drawn from the same seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimtune.models.hooks import place_gates
from slimtune.models.load import attach_lora, enable_checkpointing, load_model
from slimtune.prune.gates import MaskBank
from slimtune.runtime import pick_dtype
from slimtune.train.loop import hash_seed
from slimtune.train.session import Session


def gated_model(session: Session) -> tuple[nn.Module, MaskBank, list[Any]]:
    """The model with LoRA attached, the bank that its gates read (open), and the handles that take the gates out."""
    recipe, structure, device = session.recipe, session.structure, str(session.device)
    torch.manual_seed(hash_seed(recipe.seed, "weights"))  # of init: config; the same ones in a resumed run
    base = load_model(recipe.model, device, pick_dtype(recipe.model.dtype, device))
    torch.manual_seed(hash_seed(recipe.seed, "lora"))
    model = attach_lora(base, structure, recipe.lora, session.autocast_only)
    enable_checkpointing(model, recipe.model.checkpointing)
    bank = MaskBank()
    return model, bank, place_gates(model, structure, bank.consumer, bank.base, bank.innovation)

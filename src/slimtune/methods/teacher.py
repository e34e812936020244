"""Who gives the soft targets of ``distill``: the student with its gates open, the student before its cut, or another model."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import Tensor, nn

from slimtune.models.load import load_config, load_model, structure_of
from slimtune.models.modes import without_lora
from slimtune.models.quantized import load_as_trained
from slimtune.prune.gates import MaskBank
from slimtune.runtime import pick_dtype
from slimtune.train.checkpoint import restore_trainable, trainable_state
from slimtune.train.objective import Batch, forward
from slimtune.train.session import Session


class Teacher:
    """The teacher of a run.

    Args:
        session: the run.
        student: the gated model, LoRA attached.
        bank: what its gates read.
        untuned: the student teaches without LoRA. One that learns under its gates would else draw its teacher along, to where
            gates make no difference.

    Attributes:
        model: another model than the student, where there is one; None: the student itself, gates open.
    """

    def __init__(self, session: Session, student: nn.Module, bank: MaskBank, untuned: bool = False):
        self.session, self.student, self.bank, self.untuned = session, student, bank, untuned
        self.config = session.recipe.distill
        self.outside = bool(self.config.teacher)
        self.model: nn.Module | None = self._load() if self.outside else None

    def stay(self, state: dict[str, Tensor] | None = None) -> None:
        """The student as it is now, or with ``state``; it shares the frozen weights, until a cut gives the student others."""
        shared = {id(weight): weight for weight in self.student.parameters() if not weight.requires_grad}
        teacher = copy.deepcopy(self.student, shared)
        if state:
            restore_trainable(teacher, state)
        self.model = teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V]; opens the gates."""
        self.bank.open()
        model = self.model or self.student
        if self.untuned and not self.outside and isinstance(model, PeftModel):
            with without_lora(model):
                return forward(model, batch)
        return forward(model, batch)

    def capture(self) -> dict[str, Tensor] | None:
        """The trained weights of an earlier state of the student, where that is the teacher."""
        if self.model is None or self.outside:
            return None
        names = set(trainable_state(self.student))
        return {name: value.detach() for name, value in self.model.named_parameters() if name in names}

    def restore(self, saved: dict[str, Tensor] | None) -> None:
        """Before a restored Plan is cut."""
        if saved is not None:
            self.stay(saved)

    def _load(self) -> nn.Module:
        assert self.config.teacher
        device, config = str(self.session.device), self.session.recipe.model.at(self.config.teacher)
        dtype = pick_dtype(config.dtype, device)
        model: nn.Module
        if config.quantize == "none":  # of any family: nothing of it is cut
            model = load_model(config, device, dtype)
        else:
            model = load_as_trained(config, structure_of(load_config(config)), device, dtype)
        return model.eval().requires_grad_(False)

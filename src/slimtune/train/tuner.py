"""The ``adapt`` turn: update the model's trainable weights on training data. Shared by every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimtune.models.head import MOST_COMPILED
from slimtune.models.sharded import share_gradients, whole
from slimtune.train import checkpoint, shards
from slimtune.train.loop import checkpoint_path
from slimtune.train.objective import Batch, accumulate, compiled_cross_entropy, cross_entropy_sum, loss_sum
from slimtune.train.optimizers import ReplacedParameter, carry_over, load_optimizer, model_optimizers
from slimtune.train.schedule import lr_factor, set_lr
from slimtune.train.session import Session


class Tuner:
    """Model, its optimisers and the stream of training batches.

    ``step`` is counted over all phases, so learning rate and data order do not depend on where a phase ends.
    """

    def __init__(self, session: Session, model: nn.Module, total_steps: int):
        self.session, self.model, self.total_steps = session, model, total_steps
        self.optimizers = model_optimizers(model, session.recipe.train)
        self.batches = session.batches(session.splits.train, "train", session.recipe.train.batch)
        self.tokens = 0
        self.wrapped = self._wrap()
        compiled = session.recipe.train.compile is True
        self.cross_entropy = compiled_cross_entropy() if compiled else cross_entropy_sum
        self.most = MOST_COMPILED if compiled else None

    def _wrap(self) -> nn.Module:
        accelerator = self.session.accelerator
        alone = accelerator.num_processes == 1 or self.session.sharded  # or it sees to its gradients itself
        if not alone:  # DDP would send the frozen weights round, which all have read
            frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        wrapped: nn.Module = self.model if alone else accelerator.prepare_model(self.model)
        return wrapped.train()  # all of it: LoRA came to a loaded model, which is in eval mode

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [each for optimizer in self.optimizers for group in optimizer.param_groups for each in group["params"]]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of a micro-batch, summed over its targets."""
        return loss_sum(self.wrapped, batch, self.cross_entropy, self.most)

    def update(self, step: int, loss: Callable[[Batch], Tensor], penalty: Callable[[], Tensor] | None = None) -> dict[str, Any]:
        """One optimiser step on batch ``step``; ``loss`` sums over a micro-batch's targets, ``penalty`` comes once."""
        session, train = self.session, self.session.recipe.train
        factor = lr_factor(step, self.total_steps, train)
        rates = [set_lr(optimizer, factor) for optimizer in self.optimizers]
        value = accumulate(self.wrapped, self.batches.at(step), session.accelerator, loss)
        if session.sharded:
            share_gradients(self.parameters())
        figures: dict[str, Any] = {"loss": value, "lr": rates[0]}
        if penalty is not None:
            extra = penalty()
            extra.backward()
            figures["penalty"] = extra.detach()
        figures["grad_norm"] = whole(torch.nn.utils.clip_grad_norm_(self.parameters(), train.clip))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += self.batches.tokens(step)
        return figures

    def carry_over(self, model: nn.Module, replaced: Sequence[ReplacedParameter]) -> None:
        """After a physical cut: the cut model, sliced parameters, sliced moments, a new wrapper."""
        self.model = model
        for optimizer in self.optimizers:
            carry_over(optimizer, replaced)
        left = set(map(id, self.model.parameters()))  # whole layers may have gone
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in left]
        self.wrapped = self._wrap()

    def set_peak(self, lr: float) -> None:
        """Another peak learning rate from here on."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = lr

    def capture(self) -> dict[str, Any]:
        return {
            "model": checkpoint.trainable_state(self.model),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "tokens": self.tokens,
        }

    def restore(self, state: dict[str, Any], version: str | None = None) -> None:
        """Continue from a ``capture``; ``version`` names the folder of what was written in parts (``shards``)."""
        if version:
            folder = shards.folder_of(checkpoint_path(self.session)) / version
            state = shards.filled(state, self.model, self.optimizers, folder)
        checkpoint.restore_trainable(self.model, state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.tokens = state["tokens"]

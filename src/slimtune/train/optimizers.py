"""Optimisers with ``initial_lr`` in every group, and their state carried over a physical cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.models.sharded import spread, whole
from slimtune.sections import TrainConfig


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.95) as is usual for language models; fused on a GPU."""
    found = [parameter for parameter in parameters if parameter.requires_grad]
    fused = bool(found) and found[0].is_cuda
    return torch.optim.AdamW(
        [{"params": found, "lr": lr, "initial_lr": lr}],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        fused=fused,
    )


def model_optimizers(model: nn.Module, train: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, or two for ``muon``: Muon on the blocks' matrices, AdamW on embeddings, norms and biases."""
    lr = train.lr
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if train.optimizer == "adamw":
        return [adamw((parameter for _, parameter in named), lr, train.weight_decay)]
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise UserError(f"train.optimizer=muon needs torch >= 2.9, this is {torch.__version__}; use adamw")
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(parameter) for parameter in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    # match_rms_adamw rescales the orthogonal update so that AdamW's learning rates carry over (Liu et al. 2025)
    first = muon(
        [{"params": matrices, "lr": lr, "initial_lr": lr}],
        lr=lr,
        weight_decay=train.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [first, adamw(rest, lr, 0.0)]


class ReplacedParameter(Protocol):
    """``old`` became ``new`` by taking ``index`` along ``dim``."""

    @property
    def old(self) -> nn.Parameter: ...
    @property
    def new(self) -> nn.Parameter: ...
    @property
    def dim(self) -> int: ...
    @property
    def index(self) -> Tensor: ...


def carry_over(optimizer: torch.optim.Optimizer, replaced: Sequence[ReplacedParameter]) -> None:
    """After a cut: the sliced parameters take the place of the old ones, with sliced moments."""
    for item in replaced:
        for group in optimizer.param_groups:
            group["params"] = [item.new if parameter is item.old else parameter for parameter in group["params"]]
        state: dict[str, Any] = optimizer.state.pop(item.old, {})
        if state:
            optimizer.state[item.new] = {key: _sliced(value, item) for key, value in state.items()}


def _sliced(value: Any, item: ReplacedParameter) -> Any:
    if isinstance(value, Tensor) and value.shape == item.old.shape and value.ndim:
        return spread(whole(value).index_select(item.dim, item.index.to(value.device)).contiguous(), item.new)
    return value


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Continue from a state whose tensors are whole, whatever lies where here."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    state = {
        number: {key: _as(value, parameters[number]) for key, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _as(value: Any, parameter: nn.Parameter) -> Any:
    return spread(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

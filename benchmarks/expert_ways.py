"""A model whose experts are computed in one of transformers' ways, as ``slimtune.bench`` times it.

``grouped_mm`` (the default): one product in groups for all experts. ``batched_mm``: a product for each token and expert, of
weights that are copied for it. ``eager``: one expert after another, which waits for the GPU to say which they are.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from slimtune.bench.torch_runs import Runs, Step, Timed
from slimtune.bench.work import cache_of

WAYS = ("grouped_mm", "batched_mm", "eager")
FEW = 8
"""Rows that ``batched_mm`` is timed with at most: it copies as many times the weights of a token's experts."""


class Way:
    """A model whose experts are computed in one way, where ``Runs`` would stand; None for what is not measured of it."""

    def __init__(self, model: Any, name: str):
        self.runs, self.model, self.name = Runs(model), model, name
        self.device = self.runs.device

    def prefill(self, batch: int, tokens: int) -> Timed | None:
        return None if self.name == "batched_mm" else self.after(self.runs.prefill(batch, tokens))

    def first_token(self, tokens: int) -> Timed | None:
        return None

    def decode(self, batch: int, context: int, steps: int) -> Timed | None:
        """As ``Runs.decode``, but no context is read: of many rows that takes longer than all that is measured."""
        if self.name == "batched_mm" and batch > FEW:
            return None

        def timed() -> float:
            step = Step(self.runs, batch, self.filled(batch, context))
            return self.runs.seconds(lambda: [step() for _ in range(steps)]) / steps

        return self.after(timed)

    def captured(self, batch: int, context: int, steps: int, options: Any = None) -> Timed | None:
        if (self.name == "batched_mm" and batch > FEW) or not self.capturable(batch):
            return None
        self.choose()
        call = self.runs.captured(batch, context, steps, options)
        return call and self.after(call)

    def after(self, call: Timed) -> Timed:
        """``call`` once this way is taken, for others measure the same model."""

        def chosen() -> float:
            self.choose()
            return call()

        return chosen

    def choose(self) -> None:
        if self.name:
            self.model.set_experts_implementation(self.name)

    @torch.no_grad()
    def capturable(self, batch: int) -> bool:
        """Whether an MLP block never waits for the GPU, as in a graph it must not: a capture that fails spoils the process."""
        if self.device.type != "cuda":
            return False
        self.choose()
        block, config = self.model.model.layers[0].mlp, self.model.config
        hidden = torch.randn(batch, 1, config.hidden_size, dtype=self.model.dtype, device=self.device)
        block(hidden)
        try:
            torch.cuda.set_sync_debug_mode("error")
            block(hidden)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def filled(self, batch: int, context: int) -> Any:
        """A cache that grows, with drawn keys and values of ``context`` tokens."""
        cache = cache_of(self.model(self.runs.drawn(batch, 1), use_cache=True, logits_to_keep=1))
        for layer in cache.layers:
            like = layer.keys.new_empty(*layer.keys.shape[:2], context, layer.keys.shape[3])
            layer.keys, layer.values = torch.randn_like(like), torch.randn_like(like)
        return cache

    @torch.no_grad()
    def read(self, batch: int, context: int) -> float:
        """Experts of a layer that one decode step uses, in the mean of the layers."""
        step, seen = Step(self.runs, batch, self.filled(batch, context)), list[int]()
        experts = [each for each in self.model.modules() if hasattr(each, "gate_up_proj")]
        hooks = [each.register_forward_pre_hook(lambda _, given: seen.append(given[1].unique().numel())) for each in experts]
        step()
        for hook in hooks:
            hook.remove()
        return mean(seen)

"""What is timed of a model in torch: prompts, a first token, decode steps as ``generate`` makes them or as a CUDA graph.

B rows, T tokens of a prompt, C tokens of context, V words. Token ids are drawn: only shapes decide how long they take.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from slimtune.bench.work import cache_of

Timed = Callable[[], float]
"""One measurement, in seconds."""
WARM = 2
"""Calls that are not measured: they load kernels and fill caches."""


class Runs:
    """Everything that is timed of one model, on one device."""

    def __init__(self, model: Any):
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.words = int(model.config.vocab_size)
        # transformers renames the argument; only the new name is without a warning
        self.key = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"

    def drawn(self, batch: int, tokens: int) -> Tensor:
        """Token ids [B, T]."""
        ids = torch.randint(self.words, (batch, tokens), generator=torch.Generator().manual_seed(0))
        return ids.to(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long ``call`` takes, the device's work included."""
        return _best(call, self.device, 1)

    def prefill(self, batch: int, tokens: int) -> Timed:
        """Prompts [B, T] to the logits of their last tokens, with a cache, as ``generate`` begins."""
        ids = self.drawn(batch, tokens)
        return lambda: self.seconds(lambda: self.model(ids, use_cache=True, logits_to_keep=1))

    def first_token(self, tokens: int) -> Timed:
        """``generate`` of one token after a prompt [1, T]: what a user waits for it."""
        ids = self.drawn(1, tokens)
        ends = {"pad_token_id": 0, "eos_token_id": None}
        one = GenerationConfig(do_sample=False, max_new_tokens=1, **ends)
        mask = torch.ones_like(ids)
        return lambda: self.seconds(lambda: self.model.generate(ids, attention_mask=mask, generation_config=one))

    def decode(self, batch: int, context: int, steps: int) -> Timed:
        """One step after C tokens, the mean of ``steps``, with a cache that grows: what ``generate`` does, launch by launch."""
        begun = cache_of(self.model(self.drawn(batch, context), use_cache=True, logits_to_keep=1))

        def timed() -> float:
            step = Step(self, batch, copy.deepcopy(begun))
            return self.seconds(lambda: _repeated(step, steps)) / steps

        return timed

    def captured(self, batch: int, context: int, steps: int, options: Mapping[str, bool] | None = None) -> Timed | None:
        """The same with a cache of fixed size, captured once as a CUDA graph and replayed: no launches from Python.

        Args:
            batch, context, steps: as for ``decode``.
            options: of inductor: through ``torch.compile`` first, which fuses what stands between the matmuls; None: not.

        Returns:
            None where the cache of this model counts in Python (sliding windows), which a graph cannot.
        """
        step = Step(self, batch, StaticCache(config=self.model.config, max_cache_len=context + steps))
        step()  # it makes its tensors in the first step
        if any(layer.is_sliding for layer in step.cache.layers):
            return None
        step.fill()
        replay = step.capture(lambda: step.rewind(context), options)

        def timed() -> float:
            step.rewind(context)
            return self.seconds(lambda: _repeated(replay, steps)) / steps

        return timed


class Step:
    """Greedy decode steps of ``batch`` rows over one cache, each from the tokens of the one before.

    Attributes:
        ids: [B, 1], the tokens to go on from; overwritten in place.
        cache: keys and values.
    """

    def __init__(self, runs: Runs, batch: int, cache: Any):
        self.model, self.key, self.cache, self.ids = runs.model, runs.key, cache, runs.drawn(batch, 1)

    def __call__(self) -> None:
        """One token for every row."""
        logits = self.model(self.ids, **{self.key: self.cache}, use_cache=True).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))

    def fill(self) -> None:
        """Draw keys and values of a cache of fixed size: on zeros a device may be faster."""
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

    def rewind(self, length: int) -> None:
        """Take the cache, of fixed size, to hold ``length`` tokens."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def capture(self, rewind: Callable[[], None], options: Mapping[str, bool] | None) -> Callable[[], None]:
        """A replay of one step, whose cache ``rewind`` takes back first. Without CUDA the step itself."""
        step: Callable[[], None] = self
        if options is not None:
            import torch._dynamo.config as dynamo_config  # costs a second

            # one graph a model and batch, all of them calls of one function
            dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 64)
            step = torch.compile(self.__call__, fullgraph=True, dynamic=False, options=dict(options))
        if self.ids.device.type != "cuda":
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM + 1):
                rewind()
                step()
        torch.cuda.current_stream().wait_stream(side)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _repeated(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a device reads and writes when it copies: what its memory gives at best."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right, device)


def _best(call: Callable[[], Any], device: torch.device, repeats: int = 8) -> float:
    """The shortest of some calls, in seconds."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)

"""Experts in a GGUF file: how many there are, and how llama.cpp chooses and weighs them.

Its architectures choose the likeliest experts of a token and divide their weights by their sum, as the stock classes do that
``structure.experts.HOSTS`` lists, but for ``qwen2moe``, which leaves the weights of all experts as they are. By ``llama`` and
``qwen3moe`` weights are a softmax, by ``glm4moe`` a sigmoid of each, with a bias in the choice alone, a factor of all weights
and a shared expert, whose width is a multiple of the others'.

Shape legend: D hidden size, F width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.structure.experts import HOSTS, Host

ROUTER = "ffn_gate_inp.weight"
_LINEARS = ("gate", "up", "down")


@dataclass(frozen=True)
class Sparse:
    """Of every layer: ``number`` experts of ``width``, ``used`` by a token, and a shared one of ``shared`` times that width."""

    host: Host
    number: int
    used: int
    width: int
    shared: int = 0


def sparse_of(config: Any, family: str) -> Sparse | None:
    """What ``config`` says of experts; None: there are none.

    Raises:
        UserError: no model runs so, or llama.cpp would compute something else and say nothing.
    """
    if not (host := HOSTS.get(family)):
        return None
    keys = {**{name: key for key, name in host.counted.items()}, "used": "num_experts_per_tok"}
    values: dict[str, Any] = {name: getattr(config, key, None) for name, key in keys.items()}
    if absent := next((keys[name] for name, value in values.items() if not isinstance(value, int)), None):
        raise UserError(f"config.json has no {absent}, a number that models of type {family!r} have; fetch it again")
    found = Sparse(host, **values)
    if not 1 <= found.used <= found.number:
        raise UserError(
            f"num_experts_per_tok={found.used} of {keys['number']}={found.number}: no model runs so; correct config.json"
        )
    for key, value in host.keys.items():
        if (own := getattr(config, key, value)) != value:
            raise UserError(
                f"{key}={own!r}: GGUF of {family} is written for {key}={value!r} alone; use the model's folder as it is"
            )
    return found


def describe(writer: Any, config: Any, sparse: Sparse) -> None:
    """Write what llama.cpp reads of experts."""
    writer.add_expert_count(sparse.number)
    writer.add_expert_used_count(sparse.used)
    if sparse.host.model_type == "mixtral":
        return  # its architecture is that of dense models, and reads no more
    writer.add_expert_feed_forward_length(sparse.width)
    if sparse.host.score == "softmax":
        return
    from gguf import ExpertGatingFuncType

    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_shared_count(sparse.shared)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))
    writer.add_leading_dense_block_count(0)


def tensors(get: Callable[[str], Tensor], sparse: Sparse) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one layer: the router, [E, D], the experts' matrices, [E, F, D] and [E, D, F], and what is beside them.

    One matrix of all experts is in memory at a time.

    Args:
        get: a tensor of the layer by its name in the folder.
    """
    host = sparse.host
    yield ROUTER, get(f"{host.block}.gate.weight")
    if host.score == "sigmoid":
        yield "exp_probs_b.bias", get(f"{host.block}.gate.e_score_correction_bias")
    for name, source in zip(_LINEARS, host.linears, strict=True):
        own = (f"{host.block}.experts.{expert}.{source}.weight" for expert in range(sparse.number))
        yield f"ffn_{name}_exps.weight", torch.stack([get(each) for each in own])
    if sparse.shared:
        for name, source in zip(_LINEARS, host.linears, strict=True):
            yield f"ffn_{name}_shexp.weight", get(f"{host.shared}.{source}.weight")

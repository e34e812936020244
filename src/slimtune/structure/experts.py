"""MLP channels divided among experts: what a token uses of them, and the stock classes that hold such a layer.

Formulas: ToMoE (arXiv 2501.15316). A layer's channels are in the shared expert, which every token uses, in one or more of the
routed experts, of which a router picks ``top_k`` for each token, or in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slimtune.errors import UserError
from slimtune.structure.axes import Family


@dataclass(frozen=True)
class Division:
    """The channels of one layer: sorted indices of the shared expert, and of every routed one."""

    shared: tuple[int, ...]
    routed: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shared: Sequence[int], routed: Sequence[Sequence[int]]) -> Division:
        """Of channels in any order."""
        return cls(tuple(sorted(map(int, shared))), tuple(tuple(sorted(map(int, each))) for each in routed))

    @property
    def union(self) -> tuple[int, ...]:
        """Channels that any expert has."""
        return tuple(sorted({*self.shared, *(index for each in self.routed for index in each)}))

    @property
    def width(self) -> int:
        """Channels of the widest routed expert: what stock classes give every one."""
        return max(map(len, self.routed))

    def used(self, number: int) -> int:
        """Channels of the shared expert and ``number`` routed ones, all as wide as the widest: as stock classes have them."""
        return len(self.shared) + number * self.width


@dataclass(frozen=True)
class Host:
    """A stock class of sparse experts, as data.

    Attributes:
        score: what makes weights of the router's logits: ``softmax`` over all experts, or ``sigmoid`` of each; those of the
            chosen ones are divided by their sum.
        wide_router: the router's logits are computed in fp32 whatever the model's type is.
        block: path of the experts in a layer of a file; ``module``: in a model.
        linears: names of an expert's gate, up and down.
        shared: path of the shared expert in a layer; empty: there is none.
        windows: has a sliding window.
        keys: config keys of every such model; those of ``aside`` no forward pass reads; those of ``counted`` are numbers of the
            layer.
        idle: channels of a shared expert of zeros, where the class has no way to be without one that all its readers know;
            ``idle_gate``: path of the linear that weighs it.
    """

    model_type: str
    score: Literal["softmax", "sigmoid"]
    wide_router: bool
    windows: bool
    keys: Mapping[str, Any]
    counted: Mapping[str, str]
    aside: Mapping[str, Any] = field(default_factory=dict)
    shared: str = ""
    block: str = "mlp"
    module: str = "mlp"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    idle: int = 0
    idle_gate: str = ""

    def extra(self, hidden: int, number: int) -> int:
        """Parameters of a layer that no channel owns: router, and what the class has beside experts whether used or not."""
        return hidden * (number + (1 + 3 * self.idle if self.idle else 0))


_IDLE = 64
_GROUPLESS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 0}
_SPARSE: Mapping[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_ROUTED = {"n_routed_experts": "number", "n_shared_experts": "shared", "moe_intermediate_size": "width"}
_NUMBERED = {"num_experts": "number", "moe_intermediate_size": "width"}

HOSTS: Mapping[str, Host] = {
    host.model_type: host
    for host in (
        Host(
            "mixtral",
            "softmax",
            wide_router=False,
            block="block_sparse_moe",
            linears=("w1", "w3", "w2"),
            windows=True,
            keys={},
            aside={"router_jitter_noise": 0.0},
            counted={"num_local_experts": "number", "intermediate_size": "width"},
        ),
        Host(
            "qwen2_moe",
            "softmax",
            wide_router=False,
            shared="mlp.shared_expert",
            windows=True,
            keys={**_SPARSE, "qkv_bias": True, "shared_expert_intermediate_size": _IDLE},
            counted=_NUMBERED,
            idle=_IDLE,
            idle_gate="mlp.shared_expert_gate",
        ),
        Host(
            "qwen3_moe",
            "softmax",
            wide_router=False,
            windows=True,
            keys=_SPARSE,
            counted=_NUMBERED,
        ),
        Host(
            "glm4_moe",
            "sigmoid",
            wide_router=True,
            shared="mlp.shared_experts",
            windows=False,
            keys={**_GROUPLESS, "use_qk_norm": False},
            aside={"num_nextn_predict_layers": 0},  # 1 by default, and then readers look for that layer
            counted=_ROUTED,
        ),
        Host(
            "dots1",
            "sigmoid",
            wide_router=True,
            shared="mlp.shared_experts",
            windows=True,
            keys=_GROUPLESS,
            counted=_ROUTED,
        ),
    )
}


def host_of(family: Family, shared: bool) -> Host:
    """The stock class that holds experts of ``family``, with or without a shared one.

    Raises:
        UserError: there is none.
    """
    if not family.experts:
        raise UserError(
            f"no stock class holds experts of a {family.model_type!r} model: experts are gated linears without biases between "
            "two RMS norms; use method=atp, which cuts this family"
        )
    return HOSTS[family.experts[int(shared)]]

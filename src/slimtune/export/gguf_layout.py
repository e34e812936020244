"""Which architecture of llama.cpp holds a model, and how its tensors are laid out there.

Most architectures of llama.cpp read one width for all layers. Two read every layer's own: ``deci`` (a Llama block with optional
biases, rotary pairs side by side) and ``openelm`` (norms on queries and keys, rotary halves, q/k/v in one matrix, tied output).

A Mixtral is a ``llama`` whose layers have experts; other classes of experts have architectures of their own (``gguf_experts``).
A Dots1 is a ``glm4moe`` with norms on queries and keys, for ``dots1`` there has as many KV heads as query heads.

Shape legend: D hidden size, H query heads, K KV heads, d head size, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.export import gguf_experts
from slimtune.export.gguf_experts import Sparse
from slimtune.structure.experts import HOSTS

ELSEWHERE = "use the model's folder as it is"
Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Widths:
    """Of one layer; ``mlp``: of each expert where there are such."""

    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Layout:
    """How a family lies in an architecture.

    Attributes:
        arch: the architecture's name.
        paired: rows of q and k are reordered, for rotary pairs stand side by side there.
        fused: q, k and v are one matrix.
        by_layer: widths are lists.
        any_heads: heads times their size need not be the hidden size.
        no_bias: linears whose names end so have none; empty: all may have some.
        second_norm: what the norm before the MLP is called.
        long_context: frequencies that are divided each by its own number (rotary scaling "llama3") have a place.
    """

    arch: str
    paired: bool = False
    fused: bool = False
    by_layer: bool = False
    any_heads: bool = True
    no_bias: str = ""
    second_norm: str = "ffn_norm"
    long_context: bool = True


_UNIFORM = {
    "llama": Layout("llama", paired=True),
    "mistral": Layout("llama", paired=True),
    "mixtral": Layout("llama", paired=True),
    "qwen2": Layout("qwen2", any_heads=False, long_context=False),
    "qwen3": Layout("qwen3", no_bias="_proj"),
    "qwen3_moe": Layout("qwen3moe", no_bias="_proj", long_context=False),
    "glm4_moe": Layout("glm4moe", second_norm="post_attention_norm", long_context=False, no_bias="o_proj"),
    "dots1": Layout("glm4moe", second_norm="post_attention_norm", long_context=False, no_bias="o_proj"),
}
_BY_LAYER = {
    "llama": Layout("deci", paired=True, by_layer=True),
    "mistral": Layout("deci", paired=True, by_layer=True),
    "qwen2": Layout("deci", paired=True, by_layer=True),
    "qwen3": Layout("openelm", fused=True, by_layer=True, no_bias="_proj"),
}


def layout_of(family: str, widths: Sequence[Widths], hidden: int, head: int, names: Mapping[str, Any]) -> Layout:
    """The architecture for a family with these widths.

    Args:
        hidden: D; head: d.
        names: tensors of the model.

    Raises:
        UserError: llama.cpp has none that holds it; names the reason and what does.
    """
    found = _UNIFORM[family]
    if family not in HOSTS and (len(set(widths)) > 1 or not (found.any_heads or widths[0].heads * head == hidden)):
        found = _BY_LAYER[family]
    biased = next((name for name in names if name.endswith(f"{found.no_bias}.bias")), None)
    if found.no_bias and biased:
        raise UserError(f"llama.cpp has no biases in {found.arch!r}, and this model has {biased!r}; {ELSEWHERE}")
    if found.fused and "lm_head.weight" in names:
        raise UserError(
            f"llama.cpp has no architecture for {family!r} with widths by layer and an output of its own (untied embeddings): "
            f"tune with budget.layout=uniform, or use the model's folder as it is"
        )
    return found


def check_family(family: str) -> None:
    """Raise UserError for one that llama.cpp does not hold, or that is not written yet."""
    if family not in _UNIFORM:
        other = "; convert makes a glm4_moe of Qwen2 with moe.shared=true" * (family in HOSTS)
        raise UserError(
            f"GGUF is not written for model_type {family!r} yet (for {', '.join(_UNIFORM)} it is{other}); {ELSEWHERE}"
        )


def padded(widths: Sequence[Widths], layout: Layout) -> list[Widths]:
    """The widths as llama.cpp can have them: the head size is that of layer 0, and a layer without an MLP loses its attention.

    Zero weights of the smallest width take the place of what is absent; they add nothing.
    """
    if not layout.by_layer:
        return list(widths)
    found = []
    for index, each in enumerate(widths):
        if each.heads or not each.mlp or index == 0 or layout.fused:
            each = Widths(max(each.heads, 1), max(each.kv_heads, 1), max(each.mlp, 1))
        found.append(each)
    return found


def tensors(
    get: Get, names: Mapping[str, Any], widths: Sequence[Widths], layout: Layout, head: int, sparse: Sparse | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name there, tensor) of the whole model, one layer at a time.

    Args:
        get: a tensor of the model folder by its name.
        names: those that the folder has.
        head: d, size of a head.
        sparse: what is said of experts, where layers have such.
    """
    yield "token_embd.weight", get("model.embed_tokens.weight")
    yield "output_norm.weight", get("model.norm.weight")
    if "lm_head.weight" in names:
        yield "output.weight", get("lm_head.weight")
    for index, (own, width) in enumerate(zip(widths, padded(widths, layout), strict=True)):
        layer = _Layer(get, names, f"model.layers.{index}.", own, width, head, layout.paired)
        for name, tensor in _block(layer, layout, sparse):
            yield f"blk.{index}.{name}", tensor


_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


@dataclass(frozen=True)
class _Layer:
    get: Get
    names: Mapping[str, Any]
    prefix: str
    given: Widths
    width: Widths
    head: int
    paired: bool

    def there(self, name: str) -> bool:
        return self.prefix + name in self.names

    def tensor(self, name: str) -> Tensor:
        return self.get(self.prefix + name)

    def turned(self, name: str, heads: int) -> Tensor:
        """Rows of q or k, [heads d, ...]: the halves of each head woven into pairs where the architecture has it so."""
        tensor = self.tensor(name)
        if not self.paired:
            return tensor
        return tensor.reshape(heads, 2, self.head // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _block(layer: _Layer, layout: Layout, sparse: Sparse | None) -> Iterator[tuple[str, Tensor]]:
    norms = {**_NORMS, f"{layout.second_norm}.weight": "post_attention_layernorm.weight"}
    for name, source in norms.items():
        if layer.there(source):
            norm = layer.tensor(source)
            if layer.width.heads or name != "attn_norm.weight":  # without heads llama.cpp has no place for their norm
                yield name, norm
    yield from _attention(layer, layout)
    yield from gguf_experts.tensors(layer.tensor, sparse) if sparse else _mlp(layer)


def _mlp(layer: _Layer) -> Iterator[tuple[str, Tensor]]:
    hidden = layer.tensor("input_layernorm.weight").shape[0]
    for name, source in _MLP.items():
        if layer.given.mlp:
            yield f"{name}.weight", layer.tensor(f"{source}.weight")
        elif layer.width.mlp:
            yield (
                f"{name}.weight",
                torch.zeros(*((hidden, layer.width.mlp) if name == "ffn_down" else (layer.width.mlp, hidden))),
            )


def _attention(layer: _Layer, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    if not layer.width.heads:
        return
    if not layer.given.heads:
        yield from _no_attention(layer, layout)
        return
    heads = {"q": layer.width.heads, "k": layer.width.kv_heads}
    for kind in ("weight", "bias"):
        if not layer.there(f"self_attn.q_proj.{kind}"):
            continue
        parts = [layer.turned(f"self_attn.{part}_proj.{kind}", heads[part]) for part in "qk"]
        parts.append(layer.tensor(f"self_attn.v_proj.{kind}"))
        if layout.fused:
            yield f"attn_qkv.{kind}", torch.cat(parts)
        else:
            yield from ((f"attn_{part}.{kind}", tensor) for part, tensor in zip("qkv", parts, strict=True))
    for kind in ("weight", "bias"):
        if layer.there(f"self_attn.o_proj.{kind}"):
            yield f"attn_output.{kind}", layer.tensor(f"self_attn.o_proj.{kind}")


def _no_attention(layer: _Layer, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Zero heads in the place of an attention that is not there."""
    hidden, width = layer.tensor("input_layernorm.weight").shape[0], layer.width
    rows = {"attn_q": width.heads, "attn_k": width.kv_heads, "attn_v": width.kv_heads}
    if layout.fused:
        rows = {"attn_qkv": sum(rows.values())}
    for name, count in rows.items():
        yield f"{name}.weight", torch.zeros(count * layer.head, hidden)
    yield "attn_output.weight", torch.zeros(hidden, width.heads * layer.head)

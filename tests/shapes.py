"""Structures of whole models by hand, without a model: the shipped 44M shape and an 8B one (Llama 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.structure.axes import AXES, Structure, measure
from slimtune.structure.families import FAMILIES


def llama_structure(layers: int, hidden: int, heads: int, groups: int, head_dim: int, ffn: int, vocab: int) -> Structure:
    """A bias-free llama with tied embeddings."""
    attention = {"q_proj": (heads * head_dim, hidden), "k_proj": (groups * head_dim, hidden)}
    attention |= {"v_proj": (groups * head_dim, hidden), "o_proj": (hidden, heads * head_dim)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return measure(FAMILIES["llama"], shapes, head_dim)


def small_structure() -> Structure:
    """43.8M parameters: 12 layers of 8 heads in 4 groups and 1408 channels."""
    return llama_structure(12, 512, 8, 4, 64, 1408, 16384)


def large_structure() -> Structure:
    """7.5B parameters: 32 layers of 32 heads in 8 groups and 14336 channels."""
    return llama_structure(32, 4096, 32, 8, 128, 14336, 128256)


def tiny_structure(layers: int = 3, groups: int = 4, ffn: int = 48) -> Structure:
    """A KV group costs 6 x 16 x 16 = 1536 parameters, a channel 48."""
    return llama_structure(layers, 16, 2 * groups, groups, 16, ffn, 10)


def sizes(structure: Structure) -> dict[tuple[int, str], int]:
    """Units of every site."""
    return {(layer, axis): structure.layers[layer].units[axis] for layer in range(len(structure.layers)) for axis in AXES}


def random_scores(
    structure: Structure, seed: int, spread: float = 1.0, by_axis: float = 0.0, by_site: float = 0.0
) -> dict[tuple[int, str], Tensor]:
    """Normal scores whose level may differ by axis and by site; ``spread`` 0 makes all units of a site equal."""
    generator = torch.Generator().manual_seed(seed)
    level = {axis: by_axis * torch.randn((), generator=generator) for axis in ("kv_group", "ffn")}
    return {
        site: spread * torch.randn(n, generator=generator) + level[site[1]] + by_site * torch.randn((), generator=generator)
        for site, n in sizes(structure).items()
    }

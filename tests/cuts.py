"""Tiny models cut by a Plan, and the sample they are compared on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tiny_config
from slimtune.export.huggingface import save
from slimtune.models.surgery import cut
from slimtune.structure.families import describe
from slimtune.structure.plan import Plan

Kept = Sequence[Mapping[str, Sequence[int]]]

UNEVEN: Kept = (
    {"kv_group": [1], "ffn": range(0, 80, 2)},
    {"kv_group": [0, 1], "ffn": range(33)},
    {"kv_group": [0], "ffn": range(96)},
)
"""Other widths in every layer; the first and last lose a KV group, the second and third an axis stays whole."""


def even(groups: Sequence[int], ffn: int, layers: int = 3) -> Kept:
    """The same units in every layer."""
    return [{"kv_group": groups, "ffn": range(96 - ffn, 96)}] * layers


def cut_model(name: str, kept: Kept | None, **overrides: Any) -> tuple[PreTrainedModel, Plan]:
    """A random fp32 model of ``name`` cut to ``kept`` (None: uncut), and its Plan. Its config is that of the base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides)).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a wrong slice
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    structure = describe(model.config.to_dict(), shapes)
    plan = Plan.uncut(structure) if kept is None else Plan.of(structure, kept)
    cut(model, structure, plan)
    return model, plan


def sample_ids(rows: int = 2, tokens: int = 20) -> torch.Tensor:
    """[rows, tokens] words, longer than the sliding windows of the tiny models."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V], no gradient."""
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def generate(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    """Twelve greedy tokens after ``input_ids``."""
    mask = torch.ones_like(input_ids)
    tokens = model.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=12, min_new_tokens=12, **kwargs)
    return tokens[:, input_ids.shape[1] :].tolist()


@torch.no_grad()
def reference_logits(model: PreTrainedModel, input_ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Logits [B, T, V] (fp32, CPU) of ``model`` with its weights rounded to ``dtype`` as ``save`` rounds them.

    Computed in fp32 whatever the model's dtype; the model is not changed. Not the same as ``model.to(dtype).float()``,
    which also rounds buffers (the frequencies of the rotary embedding) that no checkpoint stores.
    """
    weights = {name: (p.to(dtype) if dtype else p).float() for name, p in model.named_parameters()}
    rows = [
        functional_call(model, weights, kwargs={"input_ids": row[None].to(model.device), "use_cache": False}).logits
        for row in input_ids
    ]
    return torch.cat(rows).float().cpu()


def write_folder(folder: Path, name: str, kept: Kept | None, **overrides: Any) -> PreTrainedModel:
    """A tiny model cut to ``kept`` in ``folder``, with the embedded base's tokenizer, which is one that others have too."""
    model, plan = cut_model(name, kept, vocab_size=6144, **overrides)
    save(model, None, plan, folder, torch.float32, {})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(str(files("slimtune"))) / "assets" / "base-10m" / file, folder / file)
    return model

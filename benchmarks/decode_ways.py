"""Ways to decode faster than ``torch.compile`` and a CUDA graph alone do, on a few layers of a true shape, dense and cut.

    python benchmarks/decode_ways.py llama-3-8b --rows docs/results/decode-ways.json   # on a GPU, 5 minutes
    python benchmarks/decode_ways.py --rows docs/results/decode-ways.json              # only the table

``grouped``: attention that reads each KV head once for its query heads, where transformers repeats it. ``fused``: q, k and v in
one product, gate and up in another. ``triton``: products of one row as inductor's own kernels, tuned by coordinate descent.
``pdl``: kernels that begin while the one before them ends. Times are those of a layer; the output head is left out.
"""

from __future__ import annotations

import argparse
import json
import types
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speed import HERE, cut_config
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from slimtune.bench.torch_runs import Runs
from slimtune.bench.work import Work
from slimtune.runtime import machine
from slimtune.version import versions

TRITON, PDL = {"coordinate_descent_tuning": True}, {"triton.enable_pdl": True}
WAYS: dict[str, tuple[str, bool, dict[str, bool] | None]] = {
    "graph": ("sdpa", False, None),
    "compiled": ("sdpa", False, {}),
    "grouped": ("grouped", False, {}),
    "grouped, triton": ("grouped", False, TRITON),
    "grouped, fused": ("grouped", True, {}),
    "grouped, fused, pdl": ("grouped", True, PDL),
    "grouped, fused, triton": ("grouped", True, TRITON),
    "grouped, fused, triton, pdl": ("grouped", True, {**TRITON, **PDL}),
}
"""Attention, whether projections are fused, and inductor's options (None: not compiled)."""
BATCHED = ("graph", "compiled", "grouped", "grouped, fused")
"""Those that are timed with 32 rows as well; the others are for products of one row."""


def grouped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> tuple[Tensor, None]:
    """Attention of one new token [B, H, 1, d] over keys and values [B, K, T, d], the query heads of a KV head as rows."""
    batch, heads, _, size = query.shape
    scores = (query.reshape(batch, key.shape[1], -1, size) @ key.transpose(2, 3)).float() * rest["scaling"]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.reshape(batch, heads, 1, size).transpose(1, 2).contiguous(), None


def attend(self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **rest: Any) -> Any:
    """Llama's attention with one product for q, k and v."""
    batch, tokens, _ = hidden_states.shape
    parts = functional.linear(hidden_states, self.qkv).split(self.sizes, -1)
    query, key, value = (part.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for part in parts)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    cache = rest.get("cache", rest.get("past_key_values"))
    key, value = cache.update(key, value, self.layer_idx)
    mixed, _ = grouped(self, query, key, value, attention_mask, scaling=self.scaling)
    return self.o_proj(mixed.reshape(batch, tokens, -1)), None


def feed(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama's MLP with one product for gate and up."""
    gate, up = functional.linear(hidden_states, self.gate_up).chunk(2, -1)
    mixed: Tensor = self.down_proj(functional.silu(gate) * up)
    return mixed


def fuse(model: Any) -> None:
    """Both, in every layer."""
    for layer in model.model.layers:
        own, mlp = layer.self_attn, layer.mlp
        rows = [each.weight for each in (own.q_proj, own.k_proj, own.v_proj)]
        own.sizes = [len(each) for each in rows]
        own.register_buffer("qkv", torch.cat(rows).detach())
        mlp.register_buffer("gate_up", torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach())
        own.forward, mlp.forward = types.MethodType(attend, own), types.MethodType(feed, mlp)


def models(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """``dense`` and ``aligned``, with few layers and words."""
    keys = dict(json.loads((HERE / "shapes.json").read_text())[args.shape])
    keys |= {"num_hidden_layers": args.layers, "vocab_size": 1024}
    base, found = AutoConfig.for_model(keys.pop("model_type"), **keys), {}
    for name in ("dense", "aligned"):
        config = base if name == "dense" else cut_config(base, args.keep, 0, ffn_multiple=128, tolerance=0.02)
        with torch.device(device):
            found[name] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return found


def timed(model: Any, way: str, batch: int, args: argparse.Namespace) -> float:
    """Seconds of a decode step."""
    attention, _, options = WAYS[way]
    torch._dynamo.reset()
    model.set_attn_implementation(attention)
    call = Runs(model).captured(batch, args.context, 32, None if options is None else options)
    assert call is not None
    return median([call() for _ in range(2 + args.repeats)][2:])


@torch.no_grad()
def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and number of rows."""
    AttentionInterface.register("grouped", grouped)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    taken = models(args, torch.device("cuda"))
    work, rows, fused = {name: Work.of(model) for name, model in taken.items()}, [], False
    head = {
        "shape": args.shape,
        "layers": args.layers,
        "context": args.context,
        "machine": machine(torch.device("cuda")),
        **versions(),
    }
    for way, (_, fusing, _) in WAYS.items():
        if fusing and not fused:
            fused = True
            for model in taken.values():
                fuse(model)
        for batch in (1, 32) if way in BATCHED else (1,):
            seconds = {name: timed(model, way, batch, args) for name, model in taken.items()}
            sizes = {name: each.decode_bytes(batch, args.context + 16) for name, each in work.items()}
            row = {"way": way, "batch": batch} | {f"{name}_us": 1e6 * each / args.layers for name, each in seconds.items()}
            rows.append({**head, **row, "by_size": sizes["dense"] / sizes["aligned"]})
            print(rows[-1], flush=True)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown."""
    first = rows[0]
    print(f"{first['shape']} shape, {first['layers']} layers, {first['machine']}, microseconds a layer and step\n")
    print("| way | batch | dense | cut | faster | by size |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        faster = row["dense_us"] / row["aligned_us"]
        size = f"{row['by_size']:.2f} ({faster / row['by_size']:.2f} of it)"
        print(f"| {row['way']} | {row['batch']} | {row['dense_us']:.0f} | {row['aligned_us']:.0f} | {faster:.2f}x | {size} |")


def main() -> None:
    """Measure, or only print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=["llama-3-8b", "llama-2-7b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.56, help="of these layers; 0.6 of the whole 8 B model")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    if args.shape:
        args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows_of(args)) + "\n]\n")
    print_table(json.loads(args.rows.read_text()))


if __name__ == "__main__":
    main()

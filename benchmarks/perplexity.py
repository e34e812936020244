"""Perplexity and bits per byte of models on text files.

    python benchmarks/perplexity.py --text FILE.jsonl.xz [--windows 256] [--length 512] MODEL ...

MODEL is a folder, a hub id or ``builtin:base-10m``. Bits per byte compare models whose tokenizers differ; bytes are those of
the decoded windows.
"""

from __future__ import annotations

import argparse
import math

import torch

import slimtune  # noqa: F401  (registers the per-layer classes)
from slimtune.data.batches import load_splits
from slimtune.evaluate.perplexity import perplexity
from slimtune.models.load import load_model, load_tokenizer
from slimtune.runtime import pick_device, quiet_libraries
from slimtune.sections import DataConfig, ModelConfig


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    quiet_libraries()
    device = torch.device(pick_device("auto"))
    for path in args.models:
        config = ModelConfig(path=path)
        tokenizer = load_tokenizer(config)
        windows = load_splits(DataConfig(test=(args.text,), max_length=args.length), tokenizer, frozenset({"test"})).test
        chosen = windows.spread(args.windows)
        size = sum(len(tokenizer.decode(windows.collate([index])["input_ids"][0]).encode()) for index in chosen)
        figures = perplexity(load_model(config, str(device), torch.float32), windows, args.windows, 8, device)
        bits = figures["loss"] * figures["tokens"] / size / math.log(2)
        ppl = f"perplexity {figures['ppl']:.2f} ± {figures['ppl_se']:.2f}"
        print(f"{path}: {ppl}, {bits:.3f} bits per byte, {figures['tokens']:,.0f} tokens")


if __name__ == "__main__":
    main()

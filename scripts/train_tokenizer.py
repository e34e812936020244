"""Train the embedded base's tokenizer: byte-level BPE on general text.

    python scripts/train_tokenizer.py --out DIR [--vocab 6144] FILE.txt.xz ...

Files hold documents divided by a line ``<|doc|>``. Deterministic for the same files and arguments.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"


def documents(paths: list[Path], every: int) -> Iterator[str]:
    """Every n-th document of the files."""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for number, document in enumerate(file.read().split("\n<|doc|>\n")):
                if number % every == 0:
                    yield document


def main() -> None:
    """Parse arguments, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--every", type=int, default=3, help="use every n-th document")
    args = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(args.files, args.every), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.save_pretrained(args.out)
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.out}")


if __name__ == "__main__":
    main()

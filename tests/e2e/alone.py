"""Run as a script in a process that has no slimtune: what the folders give a user of transformers who has none either."""

from __future__ import annotations

import json
import sys
from typing import Any


def told(folder: str, texts: list[str], tokens: int, trust: bool = True) -> dict[str, Any]:
    """Class, token ids of ``texts``, and greedy ``tokens`` after each: with either cache, and by a pipeline.

    Args:
        trust: allow the folder's own code, as a user has to of a class that is not stock.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust).eval()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    how = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    found = [model.generate(torch.tensor([row]), **how)[0, len(row) :].tolist() for row in ids]
    static = model.generate(torch.tensor([ids[0]]), cache_implementation="static", **how)[0, len(ids[0]) :].tolist()
    writes = pipeline("text-generation", model=folder, trust_remote_code=trust, device="cpu")
    written = writes(texts[0], return_full_text=False, **how)[0]["generated_text"]
    same = written == tokenizer.decode(found[0], skip_special_tokens=True)
    origin = {"class": type(model).__name__, "module": type(model).__module__}
    return {**origin, "ids": ids, "tokens": found, "static": static, "same_text": same}


def main(asked: str) -> None:
    """Print the above of every folder, as JSON."""
    folders, *words = json.loads(asked)
    found = {folder: told(folder, *words) for folder in folders}
    if "slimtune" in sys.modules:
        raise RuntimeError("slimtune was imported, so this shows nothing about the folders alone")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

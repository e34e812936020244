"""Run as a script in a fresh process by ``verify``: load a model folder and compare its logits. Never import this.

Imports nothing of slimtune: a per-layer folder must load with the code it carries.
"""

from __future__ import annotations

import json
import sys


def main(folder: str, sample: str) -> None:
    """Print ``{"difference": x}``: the largest |logits - expected| (fp32, CPU) over the ``input_ids`` in ``sample``."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(sample)
    # eager: the one implementation that applies every family's soft caps in every version of transformers
    how = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    if "slimtune" in sys.modules:
        raise RuntimeError("slimtune was imported, so this shows nothing about the folder alone")
    worst = torch.zeros(())
    with torch.no_grad():
        for row, expected in zip(tensors["input_ids"], tensors["expected"], strict=True):  # one by one to save memory
            difference = (model(row[None]).logits[0] - expected.float()).abs().max()
            worst = torch.maximum(worst, difference)  # keeps NaN
    print(json.dumps({"difference": worst.item()}))


if __name__ == "__main__":
    main(*sys.argv[1:])

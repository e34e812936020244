"""Run as a script in a fresh process by ``verify``: load a model folder and compare what it computes. Never import this.

Imports nothing of slimtune: a per-layer folder must load with the code it carries.
"""

from __future__ import annotations

import json
import sys
import time


def main(folder: str, sample: str) -> None:
    """Print what ``folder`` computes (fp32, CPU) on ``input_ids`` [B, T] of ``sample``, held to what else is there.

    ``difference``: the largest |logits - expected|, with ``expected`` [B, T, V]; or of log-probabilities at ``tokens``
    [B, T] to ``logprobs`` [B, T]. ``same``: at how many places the likeliest token is the same one, of ``places``. ``load_s``,
    ``class``, ``parameters``: of the model.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(sample)
    # eager: the one implementation that applies every family's soft caps in every version of transformers
    how = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": True}
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    load_s = time.perf_counter() - started
    if "slimtune" in sys.modules:
        raise RuntimeError("slimtune was imported, so this shows nothing about the folder alone")
    worst, same = torch.zeros(()), 0
    with torch.no_grad():
        for index, row in enumerate(tensors["input_ids"]):  # one by one to save memory
            logits = model(row[None]).logits[0]
            if "expected" in tensors:
                expected = tensors["expected"][index].float()
                tokens, difference = expected.argmax(-1), (logits - expected).abs().max()
            else:
                tokens = tensors["tokens"][index]
                found = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
                difference = (found - tensors["logprobs"][index]).abs().max()
            worst = torch.maximum(worst, difference)  # keeps NaN
            same += int((logits.argmax(-1) == tokens).sum())
    told = {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters()), "load_s": load_s}
    print(json.dumps({"difference": worst.item(), "same": same, "places": tensors["input_ids"].numel(), **told}))


if __name__ == "__main__":
    main(*sys.argv[1:])

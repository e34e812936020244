"""Run as a script in a fresh process by ``onnx``: what onnxruntime makes of a graph. Never import this.

Imports nothing of slimtune or torch: a graph must run where only onnxruntime is.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(file: str, asked: str) -> None:
    """Print ``{"load_s": x, "tokens": [...]}`` and save the logits of a batch (float32, [B, T, V]) as ``.npy``.

    ``asked`` is ``{"ids": [B, T], "mask": [B, T], "logits": file, "prompts": [...], "tokens": n, "threads": n}``; ``tokens``
    are greedy ones after each prompt, the whole row computed anew for each.
    """
    import numpy as np
    import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

    words = json.loads(asked)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = words["threads"]
    options.log_severity_level = 3
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - started

    def logits(ids: Any, mask: Any) -> Any:
        return session.run(["logits"], {"input_ids": np.array(ids, "int64"), "attention_mask": np.array(mask, "int64")})[0]

    np.save(words["logits"], logits(words["ids"], words["mask"]))
    tokens = []
    for prompt in words["prompts"]:
        row = list(prompt)
        for _ in range(words["tokens"]):
            row.append(int(logits([row], [[1] * len(row)])[0, -1].argmax()))
        tokens.append(row[len(prompt) :])
    print(json.dumps({"load_s": load_s, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run as a script in a fresh process by ``llama_runs``: llama.cpp's own clocks for one prompt and the tokens after it.

Never import this. It imports nothing of slimtune or torch: threads of another library would disturb the clocks.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path


def main(file: str, asked: str) -> None:
    """Print ``{"prompt_s": x, "step_s": x, "load_s": x, "memory_bytes": n}``; ``asked``: prompt, tokens, threads."""
    import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

    words = json.loads(asked)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = words["prompt"] + words["tokens"] + 8
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = words["threads"]
    params.cpuparams_batch.n_threads = words["threads"]
    params.fit_params = False
    # Read, not mapped: pages of a mapped file are as quick as the system's cache happens to hold them. Some files were a
    # quarter slower so or more, in every fresh process, and written anew they were not.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    started = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - started
    drawn = random.Random(0)
    prompt = [drawn.randrange(3, 250) for _ in range(words["prompt"])]
    request = {"prompt": prompt, "max_tokens": words["tokens"], "temperature": 0.0, "top_k": 1, "ignore_eos": True}
    answer = server.handle_completions({**request, "cache_prompt": False, "timings_per_token": True})
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answers {json.dumps(answer)[:400]}")
    timings = answer["timings"]
    found = {
        "prompt_s": timings["prompt_ms"] / 1e3 * words["prompt"] / timings["prompt_n"],
        "step_s": timings["predicted_per_token_ms"] / 1e3,
        "load_s": load_s,
        "memory_bytes": peak(),
    }
    print(json.dumps(found))


def peak() -> int | None:
    """Most bytes of this process in memory; None where the system does not tell (``ru_maxrss`` is also the parent's)."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    main(*sys.argv[1:])

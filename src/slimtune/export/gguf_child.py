"""Run as a script in a fresh process by ``gguf_run``: what llama.cpp makes of a GGUF file. Never import this.

Imports nothing of slimtune or torch: a file must run where only llama.cpp is.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(file: str, asked: str) -> None:
    """Print ``{"tokens": [...], "read": [...], "logprobs": [...], "load_s": x}``, lists by prompt.

    ``asked`` is ``{"prompts": [...], "tokens": n, "top": n, "threads": n}``; a prompt is a list of ids, or a text. ``tokens``
    are greedy; ``read`` tells how many tokens a prompt is; ``logprobs`` are, for the first token, ``[[id, log-probability],
    ...]`` of the ``top`` likeliest.
    """
    import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

    words = json.loads(asked)
    params = xllamacpp.CommonParams()
    params.model.path = file
    most = max(len(prompt.encode() if isinstance(prompt, str) else prompt) for prompt in words["prompts"])
    params.n_ctx = most + words["tokens"] + 8  # a text may be a token for each byte
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = words["threads"]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.fit_params = False
    params.verbosity = 10  # from here on it tells the tokens themselves; those that are half a letter stand nowhere else
    # keys and values as they are: the comparison is of the weights, not of a smaller cache
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    started = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - started
    tokens, read, logprobs = [], [], []
    for prompt in words["prompts"]:
        request = {"prompt": prompt, "temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        request |= {"ignore_eos": True, "max_tokens": 1}
        answer, told = _first(server, request, words["top"])
        if words["tokens"] > 1:  # asked apart: else it would tell the likeliest of every token, which takes long
            answer = _asked(server, {**request, "max_tokens": words["tokens"]})
        tokens.append(answer["__verbose"]["tokens"])
        read.append(answer["usage"]["prompt_tokens"])
        logprobs.append([[top["id"], top["logprob"]] for top in told])
    print(json.dumps({"tokens": tokens, "read": read, "logprobs": logprobs, "load_s": load_s}))


def _asked(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = server.handle_completions(request)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answers {json.dumps(answer)[:400]}")
    return answer


def _first(server: Any, request: dict[str, Any], top: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer of one token, and the likeliest ``top``. Of half a letter llama.cpp tells none: these are left out in turn."""
    found = answer = _asked(server, {**request, "logprobs": top})
    banned: list[list[Any]] = []
    while not (answer["choices"][0]["logprobs"] or {}).get("content"):
        if len(banned) > 256:
            raise RuntimeError("llama.cpp tells no log-probabilities of the first token")
        banned.append([answer["__verbose"]["tokens"][0], False])
        answer = _asked(server, {**request, "logprobs": top, "logit_bias": banned})
    return found, answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


if __name__ == "__main__":
    main(*sys.argv[1:])

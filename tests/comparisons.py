"""Comparison files, summaries and rows without any training; a program that stands in for ``slimtune tune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from slimtune.comparison.rows import Row

RECIPE = {
    "model": {"path": "builtin:base-10m"},
    "search": {"steps": 4, "batch": 2},
    "recover": {"steps": 6},
    "train": {"batch": 4},
    "generator": {"prior": "running", "prior_steps": 2},
    "compensate": {"weights": "none"},
}
"""``atp`` reads (4 + 6) x 4 + (4 + 2) x 2 = 52 windows: 13 steps of 4."""

FAKE = """
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
out = pathlib.Path(words["out"])
threads = [os.environ[name] for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")]
(out / "environment").write_text(" ".join([os.environ.get("CUDA_VISIBLE_DEVICES", ""), *threads]))
with (out.parent / "starts").open("a") as file:
    file.write(out.name + "\\n")
if words.get("lora.rank") == "13":
    sys.exit("error: rank 13 is unlucky")
short = out.parent / "short"  # names of the runs that found no memory, in a line each
if words.get("lora.rank") in ("71", "72", "75"):  # 71 and 72: so often; 75: always
    times = short.read_text().split().count(out.name) if short.is_file() else 0
    if times < int(words["lora.rank"]) - 70:
        with short.open("a") as file:
            file.write(out.name + "\\n")
        sys.exit("error: CUDA error: out of memory\\n" + 500 * "-")
if words.get("lora.rank") == "70":  # stays until another has found none
    until = time.time() + 20
    while time.time() < until and not short.is_file():
        time.sleep(0.01)
if words.get("lora.rank") == "99":
    (out / "pid").write_text(str(os.getpid()))
    time.sleep(60)
finetune = words.get("method") == "finetune"
seed, keep = int(words["seed"]), float(words.get("budget.keep", 1))
ppl = 10 + seed if finetune else 20 + seed - 5 * keep
result = {"ppl": ppl, "ppl_se": 0.5, "parameters": round(100 * keep), "seconds": 3.0, "block_ratio": keep}
result |= {"rqe.accuracy": 0.5, "rqe.accuracy_se": 0.1}
summary = {"keep": keep, "of": "total", "base": {"ppl": 40.0, "parameters": 100, "rqe.accuracy": 0.4}, "result": result}
summary |= {"tokens": {"adapt": 10, "decide": 5}, "leak": None, "reload_difference": None, "plan": "abc"}
summary |= {"version": "0", "torch": "2", "machine": "somewhere"}
(out / "plan.json").write_text(json.dumps({"plan": {"kept": [{"kv_group": [0, 2]}, {"kv_group": [1]}]}}))
size = 2 if words.get("method") == "twostage" else 1
numbers = [size * it for it in (0.5, -0.5 - seed / 10, seed / 10)]
(out / "windows.json").write_text(json.dumps({"windows": "abc", "numbers": numbers}))
(out / "summary.json").write_text(json.dumps(summary))
"""


def stand_in(folder: Path) -> tuple[str, ...]:
    """The words that start it, for ``launch.TUNE``."""
    file = folder / "fake_tune.py"
    file.write_text(FAKE)
    return sys.executable, "-S", "-E", str(file)


def write_comparison(folder: Path, **changes: Any) -> Path:
    """A comparison of atp with dense LoRA beside its recipe; ``changes`` replace its keys."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    raw: dict[str, Any] = {"recipe": "recipe.yaml", "base": "tiny", "domain": "somewhere", "seeds": [0, 1], "keep": [0.8, 0.6]}
    raw |= {"out": str(folder / "out"), "methods": {"atp": {}, "dense_lora": {"method": "finetune"}}, **changes}
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}, sort_keys=False))
    return file


def row(method: str, keep: float, seed: int, value: float, metric: str = "domain_ppl", domain: str = "somewhere") -> Row:
    """A raw row."""
    where = {"base": "tiny", "domain": domain, "method": method, "keep": keep, "seed": seed}
    cost = {"tokens": 2_000_000, "gpu_seconds": 30.0, "machine": "a GPU", "base_value": 40.0, "dense_value": None}
    return {**where, "metric": metric, "value": value, **cost}

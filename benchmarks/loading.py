"""The host's memory that each command takes, held to the bytes of the base: is a model anywhere held twice?

    python benchmarks/loading.py small --rows docs/results/loading.json              # 0.28 GB of weights, on the CPU
    python benchmarks/loading.py small --dtype float32 --only load tune apply --rows docs/results/loading.json
    python benchmarks/loading.py llama-3-8b --device cuda --rows docs/results/loading.json
    python benchmarks/loading.py --rows docs/results/loading.json                    # only print the table

Random weights in three files. Each command is a process of its own, watched with its children from outside, every few
milliseconds. ``own`` is memory that no file backs; ``with files`` adds the pages of mapped files, which the system takes back
where it needs them. Both are peaks beyond those of the same command on a tiny model, which are the libraries'. Linux (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files as package
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimtune.models.identity import weight_bytes
from slimtune.runtime import machine
from slimtune.version import versions

HERE = Path(__file__).parent
ASSETS = Path(str(package("slimtune"))) / "assets" / "base-10m"
SMALL = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 8}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2}
AS_LARGE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""The C library gives blocks from 32 MB on back at once, as the weights of an 8B model are, and smaller ones when it likes."""
LOAD = """
import sys, torch
from slimtune.models.load import load_model
from slimtune.sections import ModelConfig
model = load_model(ModelConfig(path=sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]))
if sys.argv[2] != "cpu":
    print("device", torch.cuda.max_memory_allocated())
print(sum(float(each.max()) for each in model.parameters()))
"""
"""Each weight is read: pages of a mapped file that nothing touches take no memory. A GPU's peak is of what is before."""


def write_base(folder: Path, keys: dict[str, Any], dtype: torch.dtype, device: str) -> int:
    """A random model, drawn on ``device``, in three files with the embedded tokenizer and its vocabulary; its bytes."""
    config = AutoConfig.for_model(**{**keys, "vocab_size": 6144, "bos_token_id": None, "eos_token_id": 0})
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    model.save_pretrained(folder, max_shard_size=size * 2 // 5)
    for file in (ASSETS / "tokenizer.json", ASSETS / "tokenizer_config.json"):
        copyfile(file, folder / file.name)
    del model
    torch.cuda.empty_cache()  # beside which others are to find room
    return size


def commands(base: Path, work: Path, args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """What is measured, in the order in which one needs the other's files."""
    python, run = [sys.executable], str(work / "run")
    slim = [*python, "-m", "slimtune"]
    tune = [
        str(HERE.parent / "recipes" / "demo.yaml"),
        f"model.path={base}",
        f"model.dtype={args.dtype}",
        f"device={args.device}",
    ]
    tune += [f"data.train={work / 'texts.jsonl'}", "data.max_length=16", "lora.rank=8", "evaluate={windows: 2, batch: 1}"]
    tune += ["search={steps: 1, batch: 1}", "recover.steps=1", "train={batch: 1}", "compensate.weights=none"]
    tune += [
        "generator={prior_steps: 1, width: 16, heads: 2, depth: 1}",
        "budget={keep: 0.6, of: block, ffn_multiple: 1, tolerance: 0.05}",
    ]
    yield "load", [*python, "-c", LOAD, str(base), args.device, args.dtype]
    yield "tune", [*slim, "tune", *tune, f"out={run}"]
    yield "tune, dense_lora", [*slim, "tune", *tune, f"out={run}-dense", "evaluate.dense_lora=true"]
    yield "apply", [*slim, "apply", run, str(base), "--out", str(work / "again")]
    yield "verify", [*slim, "verify", run]
    yield "verify --against", [*slim, "verify", run, "--against", str(work / "again")]
    yield "export --to hf", [*slim, "export", run, "--to", "hf", "--out", str(work / "hf")]
    yield "export --to hf-uniform", [*slim, "export", run, "--to", "hf-uniform", "--out", str(work / "uniform")]


def peaks(command: list[str]) -> dict[str, int]:
    """Most bytes, own and with files, that ``command`` and its children took together; what it says of a GPU's; seconds."""
    started, most = time.perf_counter(), {"own": 0, "with_files": 0}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **AS_LARGE})
        while process.poll() is None:
            for name, value in taken(process.pid).items():
                most[name] = max(most[name], value)
            time.sleep(0.004)
        told.seek(0)
        said = told.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {said[-3000:]}")
    device = {"device": int(found[1])} if (found := re.search(r"^device (\d+)$", said, re.MULTILINE)) else {}
    return {**most, **device, "seconds": round(time.perf_counter() - started)}


def taken(process: int) -> dict[str, int]:
    """Bytes of a process and its children now; nothing of one that has ended."""
    try:
        told = Path(f"/proc/{process}/status").read_text()
        children = [int(each) for file in Path(f"/proc/{process}/task").glob("*/children") for each in file.read_text().split()]
    except (OSError, ProcessLookupError):
        return {"own": 0, "with_files": 0}
    values = {
        line.split()[0]: int(line.split()[1]) << 10 for line in told.splitlines() if line.startswith(("VmRSS", "RssAnon"))
    }
    own, whole = values.get("RssAnon:", 0), values.get("VmRSS:", 0)
    others = [taken(each) for each in children]
    return {
        "own": own + sum(each["own"] for each in others),
        "with_files": whole + sum(each["with_files"] for each in others),
    }


def rows_of(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Measure each command on the tiny model and on the one asked for."""
    keys = SMALL if args.shape == "small" else json.loads((HERE / "shapes.json").read_text())[args.shape]
    words = [line.split()[0] for line in (ASSETS / "README.md").read_text().splitlines() if line.split()]
    rows = [{"text": " ".join(random.Random(number).choices(words, k=8))} for number in range(80)]
    sizes, found = {}, dict[str, list[list[str]]]()
    for name, each in (("tiny", TINY), ("base", keys)):
        (scratch / name).mkdir()
        (scratch / name / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes[name] = write_base(scratch / name / "base", each, getattr(torch, args.stored), args.device)
        for command, line in commands(scratch / name / "base", scratch / name, args):
            found.setdefault(command, []).append(line)
    head = {"shape": args.shape, "when": args.when, "stored": args.stored, "dtype": args.dtype, "base_bytes": sizes["base"]}
    head |= {"machine": machine(torch.device(args.device)), **versions()}
    for command, (small, large) in found.items():
        if args.only and command not in args.only:
            continue
        libraries, whole = peaks(small), peaks(large)
        beyond = {name: whole[name] - libraries[name] for name in ("own", "with_files")}
        ran = scratch / "base" / "run" / "model"
        made = {"result_bytes": weight_bytes(ran)} if ran.is_dir() else {}
        made |= {"device": whole["device"]} if "device" in whole else {}
        yield {**head, "command": command, **beyond, "libraries": libraries["own"], "seconds": whole["seconds"], **made}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: multiples of the base's bytes."""
    head = ("shape", "stored as", "loaded as", "command", "when", "base", "own", "with files", "a GPU's")
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        size = row["base_bytes"]
        cells = [row["shape"], row["stored"], row["dtype"], row["command"], row["when"], f"{size / 1e9:.2f} GB"]
        cells += [f"{row[name] / size:.2f}" if name in row else "" for name in ("own", "with_files", "device")]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["small", *json.loads((HERE / "shapes.json").read_text())]
    parser.add_argument("shape", nargs="?", choices=shapes, help="without it: only print the table of --rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stored", default="bfloat16", help="type of the base's weights in its files")
    parser.add_argument("--dtype", default="bfloat16", help="model.dtype")
    parser.add_argument("--when", default="now", help="a word for the rows")
    parser.add_argument("--only", nargs="+", help="commands by name; most need what tune writes")
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    if args.shape is None:
        print(table(json.loads(args.rows.read_text())))
        return
    rows = json.loads(args.rows.read_text()) if args.rows and args.rows.exists() else []
    new = []
    with tempfile.TemporaryDirectory(prefix="slimtune-loading-") as scratch:
        for row in rows_of(args, Path(scratch)):
            print(json.dumps(row), flush=True)
            new.append(row)
            if args.rows:
                args.rows.write_text("[\n" + ",\n".join(json.dumps(item) for item in [*rows, *new]) + "\n]\n")
    print(table(new))


if __name__ == "__main__":
    main()

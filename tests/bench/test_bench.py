"""slimtune bench: measured by turns, the same tokens whichever cache, JSON and table, one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache
from typer.testing import CliRunner

from cuts import UNEVEN, cut_model, write_folder
from mixtures import write_sparse
from slimtune.bench.measure import Rates, Settings, compared, figures, measures
from slimtune.bench.torch_runs import Runs, Step
from slimtune.bench.work import cache_of
from slimtune.cli import app
from slimtune.export import gguf

ASK = ["--batch", "1,2", "--prompt", "16", "--context", "16", "--steps", "4", "--repeats", "2", "--device", "cpu"]


def run(words: list[str]) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_folder(folder / "run" / "model", "llama", UNEVEN)
    write_folder(folder / "dense", "llama", None)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@torch.no_grad()
def test_a_step_over_either_cache_writes_the_same_tokens(name: str) -> None:
    model, _ = cut_model(name, UNEVEN)
    runs, steps = Runs(model), list[Step]()
    for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
        outputs = model(runs.drawn(2, 6), use_cache=True, **({runs.key: cache} if cache else {}))
        steps.append(Step(runs, 2, cache_of(outputs)))
    written: list[list[Any]] = [[], []]
    for _ in range(6):
        for step, tokens in zip(steps, written, strict=True):
            step()
            tokens.append(step.ids.flatten().tolist())
    assert written[0] == written[1]
    assert len({tuple(tokens) for tokens in written[0]}) > 1


@torch.no_grad()
def test_a_captured_step_goes_back_to_the_length_asked_for() -> None:
    model, _ = cut_model("llama", UNEVEN)
    step = Step(Runs(model), 1, StaticCache(config=model.config, max_cache_len=12))
    step()
    step.fill()
    step.rewind(8)
    assert [int(layer.cumulative_length) for layer in step.cache.layers] == [8, 8, 8]
    assert step.cache.layers[0].keys.abs().min() > 0
    step.capture(lambda: step.rewind(8), options=None)()
    assert int(step.cache.layers[2].cumulative_length) == 9
    sliding, _ = cut_model("gemma2", UNEVEN)
    assert Runs(sliding).captured(1, 8, 4) is None
    assert Runs(model).captured(1, 8, 4) is not None


def test_graphs_are_for_gpus() -> None:
    settings = Settings((1, 2), hows=("eager", "graph", "compiled graph"))
    assert [(each.what, each.how, each.batch) for each in measures(settings, cuda=False)] == [
        ("prefill", "eager", 1),
        ("prefill", "eager", 2),
        ("first token", "eager", 1),
        ("decode", "eager", 1),
        ("decode", "eager", 2),
    ]
    assert sum(each.how == "compiled graph" for each in measures(settings, cuda=True)) == 2


def test_what_sizes_allow() -> None:
    def row(model: str, seconds: list[float], flops: int, count_bytes: int) -> dict[str, Any]:
        head = {"model": model, "what": "decode", "how": "graph", "batch": 1}
        return {**head, **figures(seconds, 4, flops, count_bytes), "seconds": seconds}

    dense, small = row("dense", [4.0, 5.0, 4.0], 10, 300), row("small", [2.0, 2.5, 2.5], 5, 100)
    assert small["tokens_s"] == 1.6
    assert (small["ms"], small["ms_low"], small["ms_high"]) == (2500, 2000, 2500)
    (found,) = compared([dense, small], "small", "dense", Rates(copy_bytes_s=100.0, matmul_flops_s=1.0))
    assert (found["faster"], found["low"], found["high"]) == (2.0, 1.6, 2.0)
    assert found["by_size"] == 3.0
    assert found["by_saved"] == pytest.approx(4.0 / (4.0 - 2.0))  # 200 bytes fewer, at 100 a second
    assert found["of_saved"] == pytest.approx(1.0)
    (plain,) = compared([dense, small], "small", "dense")
    assert "by_saved" not in plain


def test_json_and_table(two: Path) -> None:
    done = run([str(two / "run"), "--against", str(two / "dense"), *ASK, "--json", str(two / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((two / "found.json").read_text())
    assert [each["name"] for each in found["models"]] == ["run", "dense"]
    assert [each["class"] for each in found["models"]] == ["SlimtuneLlamaForCausalLM", "LlamaForCausalLM"]
    assert len(found["rows"]) == 2 * len(found["ratios"]) == 10
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] and len(row["seconds"]) == 2 for row in found["rows"])
    sizes = {ratio["what"]: ratio["by_size"] for ratio in found["ratios"]}
    assert all(size > 1 for size in sizes.values())
    assert found["copy_gb_s"] > 0
    table = done.stdout
    assert "run: SlimtuneLlamaForCausalLM" in table
    assert "by saved" in table
    assert "a step of 2 reads " in table
    assert "prefill" in table


def test_weights_drawn_for_a_config_alone(two: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((two / "dense" / "config.json").read_bytes())
    done = run([str(tmp_path / "shape"), *ASK, "--random", "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["random"]
    assert found["ratios"] == []
    assert found["models"][0]["parameters"] == sum(
        each.numel() for each in cut_model("llama", None, vocab_size=6144)[0].parameters()
    )
    assert run([str(tmp_path / "shape"), *ASK]).exit_code == 2


def test_files_in_llama_cpp(two: Path) -> None:
    for name, folder in (("run", two / "run" / "model"), ("dense", two / "dense")):
        gguf.write(folder, two / f"{name}.gguf", "q8_0")
    words = [str(two / "run.gguf"), "--against", str(two / "dense.gguf"), "--repeats", "1", "--prompt", "16", "--steps", "4"]
    done = run([*words, "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["model"], row["what"]) for row in found["rows"]] == [
        (name, what) for name in ("run.gguf", "dense.gguf") for what in ("prefill", "decode")
    ]
    assert all(row["tokens_s"] > 0 for row in found["rows"])
    small, dense = found["models"]
    assert small["parameters"] == sum(each.numel() for each in cut_model("llama", UNEVEN, vocab_size=6144)[0].parameters())
    memory = [row["memory_bytes"] for row in found["rows"]]
    assert all(each is None or each < 200e6 for each in memory), "the parent, with torch in it, takes more"
    assert small["step_bytes"] < small["weight_bytes"] < dense["weight_bytes"]
    assert [ratio["by_size"] > 1 for ratio in found["ratios"]] == [True, True]


def test_of_experts_in_a_file_those_that_are_chosen(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    done = run([str(tmp_path / "model.gguf"), "--repeats", "1", "--prompt", "16", "--steps", "4", "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (model,), (prompt, step) = found["models"], found["rows"]
    one = 4 * 2 * 3 * 64 * 96  # bytes of one expert in both layers
    assert prompt["bytes"] == model["weight_bytes"] - 4 * 6144 * 64  # of all but the embedding
    assert prompt["bytes"] - step["bytes"] == 3 * one
    norms = 5 * 64
    assert step["flops"] == 2 * (step["bytes"] // 4 - norms)


BAD = {
    "batch": (["{two}/run", "--batch", "1,x"], "--batch 1,x is no list of numbers of rows; give e.g. --batch 1,8,32"),
    "none": (["{two}/run", "--batch", "0"], "--batch 0 is no list"),
    "absent": (["{two}/nowhere"], "does not exist"),
    "against": (["{two}/run", "--against", "{two}/nowhere"], "--against='{two}/nowhere' does not exist"),
    "kinds": (["{two}/run", "--against", "{two}/x.gguf"], "is no GGUF file and the other one is; give two of a kind"),
    "no file": (["{two}/x.gguf"], "is no file here; slimtune export RUN --to gguf writes one"),
    "junk": (["{two}/junk.gguf"], "junk.gguf' is no whole GGUF file ("),
    "torch's": (["{two}/junk.gguf", "--random"], "--random is for models in torch, and a GGUF file runs in llama.cpp"),
    "dtype": (["{two}/run", "--dtype", "int8"], "--dtype int8 is not known; choose auto, float32"),
    "device": (["{two}/run", "--device", "tpu"], "device='tpu' is not supported"),
    "compile": (["{two}/run", "--compile", "--device", "cpu"], "--compile is for CUDA graphs, and this is cpu; leave it out"),
    "long": (["{two}/run", "--prompt", "500"], "made for 128 positions, and --prompt 500"),
    "json": (["{two}/run", "--json", "{two}/no/x.json"], "/no'; make it, or name another file"),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_bad_words_are_told_in_one_line(two: Path, words: list[str], told: str) -> None:
    (two / "junk.gguf").write_bytes(b"GGUF\x03junk")
    done = run([word.replace("{two}", str(two)) for word in words])
    assert done.exit_code == 2, done.output
    assert told.replace("{two}", str(two)) in " ".join(done.stderr.split())

"""A whole run: what it leaves behind, what it refuses, and what it never breaks."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from bases import TINY, Bench, losses, metrics, sentences, write_base, write_rows
from slimtune import delivery, pipeline, preflight
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import huggingface
from slimtune.models.load import load_config, structure_of
from slimtune.pipeline import tune
from slimtune.recipe import Recipe
from slimtune.report.table import render
from slimtune.structure.plan import Plan
from slimtune.train import loop

run_cli = CliRunner().invoke


@pytest.fixture(scope="module")
def finished(bench: Bench, forked: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One complete run, verified, with the dense reference."""
    out = tmp_path_factory.mktemp("finished")
    return out, tune(bench.recipe(out, export__verify=True, evaluate__dense_lora=True))


@pytest.fixture(autouse=True)
def _no_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixth of such a short run, tested elsewhere and in ``finished``."""
    monkeypatch.setattr(pipeline, "self_check", lambda config, seed: 0.0)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rendered(summary: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(width=120, file=file).print(render(summary))
    return file.getvalue()


# --- what is left behind -------------------------------------------------------------------------------------------------


def test_the_folder_holds_everything_and_nothing_else(bench: Bench, finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "checkpoint-dense_lora.pt",
        "checkpoint-main.pt",
        "metrics.jsonl",
        "model",
        "plan.json",
        "recipe.yaml",
        "stages.json",
        "summary.json",
        "windows.json",
    ]
    recipe = Recipe.model_validate(yaml.safe_load((out / "recipe.yaml").read_text()))
    assert recipe == bench.recipe(out, export__verify=True, evaluate__dense_lora=True)
    rows = metrics(out)
    assert [row["checkpoint"] for row in rows if "checkpoint" in row] == [
        ["dense_lora", "tune", 8],
        ["main", "search", 4],
        ["main", "recover", 4],
    ]
    assert {row["stage"] for row in rows if "stage" in row} == {"dense_lora", "main"}


def test_what_test_windows_add_to_the_loss_explains_its_standard_error(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    windows, figures = json.loads((out / "windows.json").read_text()), summary["result"]
    found = windows["numbers"]
    assert len(windows["windows"]) == 12
    assert sum(found) == pytest.approx(0, abs=1e-6)
    assert statistics.stdev(found) / len(found) ** 0.5 * figures["ppl"] == pytest.approx(figures["ppl_se"], rel=1e-5)
    assert all(summary[library] for library in ("torch", "transformers", "peft", "accelerate"))


def test_the_summary_is_what_can_be_counted(bench: Bench, finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    base, result = summary["base"], summary["result"]
    written, before = tensors(out / "model"), tensors(Path(bench.base))
    assert result["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert base["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert abs(result["parameters"] / base["parameters"] - 0.7) <= 0.002
    assert result["bytes"] == (out / "model" / "model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert summary["reload_difference"] < 1e-4
    assert summary["plan"] == Plan.from_json((out / "model" / "plan.json").read_text()).digest
    assert summary["tokens"] == {"prior": 256, "decide": 512, "adapt": 1024}
    for figures in (base, summary["dense_lora"], result):
        assert figures["ppl"] == pytest.approx(math.exp(figures["loss"]))
        assert 0 < figures["ppl_se"] < figures["ppl"]
    assert summary["dense_lora"]["ppl"] < base["ppl"]
    assert summary["dense_lora"]["tuning_tokens"] == summary["tokens"]["adapt"]  # the same rows, by number of turns
    assert 0 < result["seconds"] <= summary["seconds"]
    assert {key: summary[key] for key in ("method", "seed", "keep", "of", "leak")} == {
        "method": "atp",
        "seed": 0,
        "keep": 0.7,
        "of": "total",
        "leak": None,
    }


def test_the_tokenizer_is_the_bases_byte_for_byte(bench: Bench, finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    names = sorted(path.name for path in Path(bench.base).glob("tokenizer*"))
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (out / "model" / name).read_bytes() == (Path(bench.base) / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"evaluate__dense_lora": True, "lora__semantics": "lora_aware", "lora__settle": 0.5}, 4),
        ({"method": "finetune"}, 1),
    ],
)
def test_the_time_left_knows_the_phases_of_a_run(changed: dict[str, Any], expected: int, bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path, **changed)
    tune(recipe)
    config = load_config(recipe.model)
    costs = preflight.costs(recipe, config, structure_of(config))
    assert list(costs) == list(dict.fromkeys(row["phase"] for row in metrics(tmp_path) if "phase" in row))
    assert len(costs) == expected
    assert min(costs.values()) > 0


def test_the_card_tells_the_figures(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    card = (out / "model" / "README.md").read_text()
    cells = [f"{round(summary[name]['ppl'], 3):.4g}" for name in ("base", "dense_lora", "result")]
    assert "| | base | dense LoRA | this model |\n" in card
    assert f"| perplexity | {' | '.join(cells)} |\n" in card
    assert "fresh process" in card


def test_the_table_shows_before_and_after(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    text = rendered({**summary, "out": "runs/[demo]"})
    for expected in (
        "atp: runs/[demo]",
        "dense LoRA",
        f"{summary['base']['parameters']:,}",
        f"{summary['result']['parameters']:,} (70.0%)",
        f"{summary['result']['ppl']:.2f} ± {summary['result']['ppl_se']:.2f}",
        "MB",
        "reload",
        "decide 512, adapt 1,024",
    ):
        assert expected in text
    assert "accuracy" not in text  # there are no multiple-choice rows


def test_nothing_is_trained_where_masked_and_cut_logits_differ(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Any, seed: int) -> float:
        raise UserError("masked and cut logits differ")

    monkeypatch.setattr(pipeline, "self_check", fails)
    with pytest.raises(UserError, match="masked and cut logits differ"):
        tune(bench.recipe(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_result_worse_than_the_base_is_told(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    worse = {**summary, "result": {**summary["result"], "ppl": 289.05}, "base": {**summary["base"], "ppl": 30.61}}
    told = " ".join(rendered(worse).split())
    assert "caution perplexity is above the base's, 289.05 for 30.61" in told
    assert "train.warmup; else raise recover.steps or budget.keep" in told
    assert "else raise train.steps" in " ".join(rendered({**worse, "method": "finetune"}).split())
    for fine in ({**worse, "base": None}, {**worse, "base": {**worse["base"], "ppl": 289.05}}):
        assert "caution" not in rendered(fine)


def test_choices_give_an_accuracy_in_summary_and_table(bench: Bench, tmp_path: Path) -> None:
    rows = [
        {"prompt": text, "completion": [" yes", " no"][i % 2], "choices": ["yes", "no"], "label": i % 2}
        for i, text in enumerate(sentences(200, seed=5))
    ]
    data = bench.recipe("x").data.model_dump() | {
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "max_length": 48,
    }
    summary = tune(bench.recipe(tmp_path / "run", data=data))
    assert 0 <= summary["result"]["accuracy"] <= 1
    assert summary["base"]["rows"] > 10
    assert "test.outside_accuracy" not in summary["rows"]
    assert "accuracy, test" in rendered(summary)


def test_choices_without_a_right_one_are_told(bench: Bench, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": " maybe", "choices": ["yes", "no"]} for text in sentences(20, seed=5)]
    data = bench.recipe("x").data.model_dump() | {"test": write_rows(tmp_path / "rows.jsonl", rows), "max_length": 48}
    summary = tune(bench.recipe(tmp_path / "run", data=data, search__steps=1, recover__steps=1))
    assert summary["rows"]["test.outside_accuracy"] == summary["rows"]["test"] == 20
    assert "accuracy" not in summary["result"]


def test_choices_are_taken_from_all_over(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str | None]] = []

    def accuracy(model: Any, tokenizer: Any, rows: list[Any], *args: Any) -> dict[str, float]:
        seen.append([row.prompt for row in rows])
        return {}

    monkeypatch.setattr("slimtune.evaluate.figures.accuracy", accuracy)
    prompts = sentences(100, seed=5)
    rows = [{"prompt": text, "completion": " yes", "choices": ["yes", "no"], "label": 0} for text in prompts]
    data = bench.recipe("x").data.model_dump() | {"test": write_rows(tmp_path / "rows.jsonl", rows), "max_length": 48}
    short = {"search__steps": 1, "recover__steps": 1}
    tune(bench.recipe(tmp_path / "run", data=data, evaluate__choices=4, **short))
    assert seen == [[prompts[index] for index in (12, 37, 62, 87)]] * 2  # base and result


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_runs_of_other_precision_may_follow_one_another(bench: Bench, tmp_path: Path, precision: str) -> None:
    short = {"search__steps": 1, "recover__steps": 1}
    other = {"bfloat16": "float32", "float32": "bfloat16"}[precision]
    for name in (other, precision):
        tune(bench.recipe(tmp_path / name, train__precision=name, **short))
    assert losses(tmp_path / other)[0] != losses(tmp_path / precision)[0]


def test_weights_can_be_written_in_bfloat16(bench: Bench, tmp_path: Path) -> None:
    summary = tune(bench.recipe(tmp_path, export__dtype="bfloat16", search__steps=1, recover__steps=1))
    assert {tensor.dtype for tensor in tensors(tmp_path / "model").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert summary["result"]["bytes"] < 0.55 * summary["base"]["bytes"]


def test_finetune_from_scratch_and_from_a_base(bench: Bench, tmp_path: Path) -> None:
    scratch = {"method": "finetune", "train__steps": 3}
    config = {"init": "config", "config": {**TINY, "model_type": "llama"}, "tokenizer": bench.base}
    summary = tune(bench.recipe(tmp_path / "a", **scratch, model=config))
    assert (summary["base"], summary["result"]["parameters"]) == ({}, 133568)
    summary = tune(bench.recipe(tmp_path / "b", **scratch))
    assert summary["result"]["ppl"] < summary["base"]["ppl"]
    assert AutoConfig.from_pretrained(tmp_path / "b" / "model").model_type == "llama"
    assert not (tmp_path / "b" / "model" / "modeling_slimtune.py").exists()
    # the base is not touched: LoRA was merged into a copy
    assert tensors(tmp_path / "b" / "model").keys() == tensors(Path(bench.base)).keys()


# --- bad input -----------------------------------------------------------------------------------------------------------


def _rows(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"data__train": write_rows(tmp_path / "rows.jsonl", rows)}


def _no_config(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "empty").mkdir()
    return {"model__path": str(tmp_path / "empty")}


def _unknown_family(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(bench.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    return {"model__path": str(tmp_path / "base")}


def _empty_file(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    return {"data__train": str(tmp_path / "rows.jsonl")}


def _small_vocabulary(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    return {"model__path": str(write_base(tmp_path / "base", vocab_size=300))}


def _foreign_model_folder(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.txt").write_text("years of work")
    return {}


def _own_base(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(bench.base, tmp_path / "run" / "model")
    return {"model__path": str(tmp_path / "run" / "model")}


def _cut_short(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(bench.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return {"model__path": str(tmp_path / "base")}


def _no_weights(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(bench.base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    return {"model__path": str(tmp_path / "base")}


def _config_text(text: str) -> Make:
    def make(bench: Bench, tmp_path: Path) -> dict[str, Any]:
        shutil.copytree(bench.base, tmp_path / "base")
        (tmp_path / "base" / "config.json").write_text(text)
        return {"model__path": str(tmp_path / "base")}

    return make


def _drawn(config: dict[str, Any]) -> Make:
    return lambda bench, tmp_path: {"model": {"init": "config", "config": config, "tokenizer": bench.base}}


def _drawn_with(keys: dict[str, Any]) -> Make:
    return lambda bench, tmp_path: {"model": {"path": bench.base, "init": "config", "config": keys}}


def _other_roles(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    chats = [[{"role": "User", "content": text}, {"role": "Model", "content": "yes"}] for text in sentences(90)]
    return _rows(tmp_path, [{"messages": chat} for chat in chats]) | {"data__max_length": 64}


Make = Callable[[Bench, Path], dict[str, Any]]
BAD: dict[str, tuple[Make, list[str]]] = {
    "missing model": (lambda b, t: {"model__path": str(t / "nowhere")}, ["nowhere", "does not exist", "give a model folder"]),
    "revision of a folder": (lambda b, t: {"model__revision": "v1"}, ["model.revision='v1'", "leave it out"]),
    "no config.json": (_no_config, ["empty", "no config.json"]),
    "weights cut short": (_cut_short, ["cannot be loaded", "base", "check the folder's files"]),
    "no weights": (_no_weights, ["no model.safetensors", "check the folder's files"]),
    "config of another kind": (_config_text("[1]"), ["config.json is no object", "check the folder's files"]),
    "config of a wrong type": (_config_text('{"model_type": "llama", "num_hidden_layers": "two"}'), ["num_hidden_layers"]),
    "drawn with a misspelt key": (
        _drawn({"model_type": "llama", "hiden_size": 8}),
        ["hiden_size", "mean 'hidden_size'?"],
    ),
    "drawn with a wrong value": (_drawn({"model_type": "llama", "hidden_size": "big"}), ["hidden_size", "correct the values"]),
    "heads that do not divide the width": (_drawn_with({"hidden_size": 65}), ["hidden_size", "correct the values"]),
    "roles of another kind": (_other_roles, ["role 'assistant'", "['Model', 'User']", "Rename"]),
    "unknown family": (_unknown_family, ["gpt2", "llama"]),
    "budget too small": (lambda b, t: {"budget__keep": 0.05}, ["budget.keep=0.05", "cannot be met", "0."]),
    "budget too coarse": (
        lambda b, t: {"budget__ffn_multiple": 64, "budget__keep": 0.9},
        ["ffn_multiple=64", "use a smaller multiple"],
    ),
    "empty data": (_empty_file, ["rows.jsonl", "empty", "give a source with text"]),
    "missing data": (lambda b, t: {"data__train": str(t / "no.jsonl")}, ["no.jsonl", "does not exist", "give a file"]),
    "windows beyond the model": (
        # found before the data is read
        lambda b, t: {"data__max_length": 129, "data__train": str(t / "no.jsonl")},
        ["data.max_length=129", "max_position_embeddings=128", "set data.max_length=128"],
    ),
    "no data": (lambda b, t: {"data__train": []}, ["data.train is empty", "name a file"]),
    "wrong fields": (lambda b, t: _rows(t, [{"body": "x"}]), ["rows.jsonl:1", "'body'", "Rename the fields"]),
    "over-long rows": (
        lambda b, t: (
            _rows(t, [{"prompt": s, "completion": " me" * 60 * (i == 7) + " yes"} for i, s in enumerate(sentences(90))])
            | {"data__max_length": 64}
        ),
        ["rows.jsonl:8", "data.max_length=64", "data.on_long=truncate"],
    ),
    "no test rows": (lambda b, t: _rows(t, [{"text": s} for s in sentences(3)]), ["no token"]),
    "no test share": (lambda b, t: {"data__test_fraction": 0.0}, ["data.test", "0 rows", "data.test_fraction"]),
    "no valid share": (
        lambda b, t: {"data__valid_fraction": 0.0, "evaluate__every": 2},
        ["data.valid", "0 rows", "data.valid_fraction"],
    ),
    "test rows that train": (
        lambda b, t: {"data__test": write_rows(t / "test.jsonl", [{"text": sentences(300)[17].upper()}])},
        ["1 rows stand in two splits", "test.jsonl:1", "data.on_overlap=drop"],
    ),
    "tokenizer of another model": (_small_vocabulary, ["320 tokens", "vocab_size is 300", "model.tokenizer"]),
    "no GPU": (lambda b, t: {"device": "cuda"}, ["device='cuda'", "device=cpu"]),
    "no flash attention": (
        lambda b, t: {"model__attention": "flash_attention_2"},
        ["model.attention=flash_attention_2", "flash-attn", "model.attention=sdpa"],
    ),
    "unknown device": (lambda b, t: {"device": "tpu"}, ["device='tpu'", "auto, cpu or cuda"]),
    "foreign model folder": (_foreign_model_folder, ["holds other files than a model", "choose another"]),
    "its own base": (_own_base, ["model.path=", "choose another out"]),
    "out is a file": (lambda b, t: {"out": str(t / "file")}, ["file", "cannot be created", "choose another folder"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_changes_nothing(name: str, bench: Bench, tmp_path: Path) -> None:
    make, expected = BAD[name]
    (tmp_path / "file").write_text("a file")
    raw = bench.recipe(tmp_path / "run").model_dump(mode="json")
    for key, value in make(bench, tmp_path).items():
        section, _, leaf = key.partition("__")
        if leaf:
            raw[section][leaf] = value
        else:
            raw[section] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    before, folders = contents(tmp_path), sorted(path for path in tmp_path.rglob("*") if path.is_dir())
    result = run_cli(app, ["tune", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2, result.output
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    for part in expected:
        assert part in message
    assert contents(tmp_path) == before  # so the mended recipe runs without --overwrite
    assert sorted(path for path in tmp_path.rglob("*") if path.is_dir()) == folders


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(9)}), "model.norm.weight has another shape"),
        (None, "incomplete metadata"),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_a_damaged_base_is_named_and_may_be_mended(
    bench: Bench, tmp_path: Path, damage: Any, reason: str, measured: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bench.base, base)
    changes = {"search__steps": 1, "recover__steps": 1, "evaluate__base": measured}
    recipe = bench.recipe(tmp_path / "run", model={"path": str(base)}, **changes)
    file = base / "model.safetensors"
    if damage:
        weights = tensors(base)
        damage(weights)
        save_file(weights, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"model.path='.*base' cannot be loaded .*{reason}.*check the folder's files"):
        tune(recipe)
    shutil.copyfile(Path(bench.base) / "model.safetensors", file)
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


@pytest.mark.parametrize("measured", [True, False])
def test_a_base_of_no_numbers_is_not_blamed_on_the_learning_rate(bench: Bench, tmp_path: Path, measured: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(bench.base, base)
    weights = tensors(base)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"loss of model\.path='.*base' on the test data is nan before any training"):
        tune(bench.recipe(tmp_path / "run", model={"path": str(base)}, evaluate__base=measured))


def test_resume_and_overwrite_exclude_each_other(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        tune(bench.recipe(tmp_path / "run"), resume=True, overwrite=True)
    with pytest.raises(UserError, match=r"tune needs a Recipe, not dict: slimtune\.load_recipe"):
        tune({"out": "x"})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_names_the_nearest(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(bench.recipe(tmp_path / "run").to_yaml())
    result = run_cli(app, ["tune", str(tmp_path / "recipe.yaml"), "budget.kep=0.5"])
    assert (result.exit_code, result.stderr) == (2, "error: recipe: unknown key 'budget.kep'. Did you mean 'budget.keep'?\n")


def test_an_earlier_run_is_neither_replaced_nor_continued_unasked(bench: Bench, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    before = contents(out)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume, replace it with --overwrite"):
        tune(bench.recipe(out))
    assert contents(out) == before


# --- what goes wrong on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(
    bench: Bench, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimtune.train import tuner

    real = tuner.cross_entropy_sum
    calls = iter(range(100))

    def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return real(logits, labels) * (value if next(calls) == 5 else 1.0)

    monkeypatch.setattr(tuner, "cross_entropy_sum", poisoned)
    with pytest.raises(UserError, match=r"loss is (nan|inf) in phase 'recover', turn 'adapt', step 1: lower train.lr"):
        tune(bench.recipe(tmp_path, train__checkpoint_every=1))
    assert not (tmp_path / "model").exists()
    assert metrics(tmp_path)[-1] == {"checkpoint": ["main", "recover", 1]}


def test_an_infinite_gradient_never_reaches_a_checkpoint(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.train import tuner

    def steep(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits - logits.detach()).sum().abs().sqrt() + 1.0  # value 1, slope infinite

    monkeypatch.setattr(tuner, "cross_entropy_sum", steep)
    with pytest.raises(UserError, match="grad norm is nan in phase 'search', turn 'adapt', step 0"):
        tune(bench.recipe(tmp_path, train__checkpoint_every=1))
    assert not (tmp_path / "checkpoint-main.pt").exists()


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("atp", "train.lr (now 0.001) or generator.lr (now 0.01),"),
        ("finetune", "train.lr (now 0.001),"),
        ("twostage", "train.lr (now 0.001),"),
        ("tomoe", "train.lr (now 0.001), moe.lr (now 0.002) or moe.router_lr (now 0.0001),"),
    ],
)
def test_what_is_to_be_lowered_is_what_the_method_has(method: str, rates: str) -> None:
    recipe = Recipe(method=method, train={"lr": 1e-3}, generator={"lr": 1e-2}, moe={"lr": 2e-3})
    session, told = SimpleNamespace(recipe=recipe), SimpleNamespace(name="recover")
    with pytest.raises(UserError) as error:
        loop._stop_on_nan(session, told, told, 3, "loss is nan")  # type: ignore[arg-type]
    assert f"step 3: lower {rates} or set train.precision=float32" in str(error.value)


def test_keys_of_another_method_are_told_to_have_no_effect() -> None:
    recipe = Recipe(method="tomoe", generator={"lr": 1.0}, compensate={"weights": "none"}, moe={"lr": 1.0})
    assert preflight.idle(recipe) == ["generator.lr", "compensate.weights"]
    assert preflight.idle(Recipe(method="atp", moe={"tune": False}, generator={"lr": 1.0})) == ["moe.tune"]
    assert preflight.idle(Recipe()) == preflight.idle(Recipe(method="finetune", moe={"tune": False})) == []


def test_a_learning_rate_beyond_all_reason_is_named(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower train.lr \(now 1e\+30\)"):
        tune(bench.recipe(tmp_path, train__lr=1e30, train__warmup=0.0))
    assert not (tmp_path / "model").exists()


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint_keeps_the_last_one(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path, train__checkpoint_every=2)
    real, calls = torch.save, iter(range(100))

    def save(*args: Any, **kwargs: Any) -> None:
        (full if next(calls) >= 2 else real)(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(UserError, match=r"checkpoint .* cannot be written .*No space left.*continue with --resume"):
            tune(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-main.pt",
        "metrics.jsonl",
        "recipe.yaml",
        "stages.json",
    ]
    assert torch.load(tmp_path / "checkpoint-main.pt")["phase"] == "search"
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


def test_a_full_disk_at_the_metrics(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop._run_step

    def run_step(session: Any, phase: Any, step: int) -> None:
        if step == 2:
            session.metrics.path = Path("/dev/full")
        real(session, phase, step)

    monkeypatch.setattr(loop, "_run_step", run_step)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match=r"/dev/full' cannot be written \(No space left on device\).*continue with --resume"):
        tune(bench.recipe(tmp_path))


def test_a_full_disk_at_the_export_loses_nothing(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "save_torch_state_dict", full)
        with pytest.raises(UserError, match=r"no space for the model .*Free some space"):
            tune(recipe)
    assert not list(tmp_path.glob("*model*"))
    assert not list(tmp_path.glob(".model*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run_step", full)  # training is done
        assert tune(recipe, resume=True)["result"]["ppl"] > 1


def test_a_full_disk_at_the_last_write_keeps_the_card(bench: Bench, tmp_path: Path) -> None:
    recipe, real = bench.recipe(tmp_path), Path.write_text

    def write_text(self: Path, text: str, **kwargs: Any) -> int:
        if "README" in self.name and "| this model |" in text:  # the card with the figures
            real(self, text[:100], **kwargs)
            full()
        return real(self, text, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(UserError, match=r"README\.md' cannot be written \(No space left.*continue with --resume"):
            tune(recipe)
    model = tmp_path / "model"
    assert not list(model.glob("*.partial"))
    assert "## Widths" in (model / "README.md").read_text()  # the card without the figures, whole
    assert tune(recipe, resume=True)["result"]["ppl"] > 1
    assert "| this model |" in (model / "README.md").read_text()


def test_a_full_disk_at_the_very_first_write(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"recipe\.yaml' cannot be written \(No space left.*continue with --resume"):
            tune(recipe)
    assert not list(tmp_path.iterdir())
    (tmp_path / "recipe.yaml.partial").write_text("of a kill")
    assert tune(recipe, resume=True)["result"]["ppl"] > 1


@pytest.mark.parametrize(
    ("kind", "told"), [({"model_type": "llama"}, False), ({"model_type": "phi", "qk_layernorm": True}, True)]
)
def test_equal_widths_that_no_stock_class_takes_are_told(
    kind: dict[str, Any], told: bool, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {**TINY, **kind}  # phi's norm of a head is as wide as hidden / heads, so fewer heads are another class
    budget = {"keep": 0.4, "of": "block", "layout": "uniform", "tolerance": 0.05}
    model = {"init": "config", "path": "", "config": own, "tokenizer": bench.base}
    summary = tune(bench.recipe(tmp_path, model=model, budget=budget))
    assert ("no stock class takes" in " ".join(capsys.readouterr().err.split())) == told
    assert summary["result"]["class"].startswith("Slimtune") == told


def test_a_full_disk_at_the_first_write_of_a_replacement_keeps_the_earlier_run(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path))
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"recipe\.yaml' cannot be written"):
            tune(bench.recipe(tmp_path, budget__keep=0.8), overwrite=True)
    assert contents(tmp_path) == before


def test_no_file_of_the_export_tells_where_its_base_was(bench: Bench, finished: tuple[Path, dict[str, Any]]) -> None:
    files = [path for path in (finished[0] / "model").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path.name for path in files if str(bench.base).encode() in path.read_bytes()]


def test_an_export_that_computes_something_else_replaces_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def verify(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> float:
        seen.append(folder.name)
        return 0.1 * float(expected.abs().max())

    monkeypatch.setattr(delivery, "verify", verify)
    with pytest.raises(UserError, match="computes something else"):
        tune(bench.recipe(tmp_path, export__verify=True))
    assert seen == [".model.partial"]
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "summary.json").exists()


# --- --overwrite -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_overwrite_touches_nothing_before_the_checks_have_passed(bench: Bench, earlier: Path) -> None:
    before = contents(earlier)
    with pytest.raises(UserError, match="cannot be met"):
        tune(bench.recipe(earlier, budget__keep=0.05), overwrite=True)
    with pytest.raises(UserError, match="does not exist"):
        tune(bench.recipe(earlier, data={"train": "no.jsonl", "max_length": 32}), overwrite=True)
    assert contents(earlier) == before


def test_the_earlier_model_stays_until_the_new_one_is_complete(bench: Bench, earlier: Path) -> None:
    model = contents(earlier / "model")
    recipe = bench.recipe(earlier, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "save_torch_state_dict", full)
        with pytest.raises(UserError, match="no space"):
            tune(recipe, overwrite=True)
    assert contents(earlier / "model") == model
    # the figures of the earlier run are not to be taken for this one's; they still stand on the model's card
    assert not (earlier / "summary.json").exists()
    assert yaml.safe_load((earlier / "recipe.yaml").read_text())["seed"] == 1
    assert {row["stage"] for row in metrics(earlier) if "stage" in row} == {"main"}
    summary = tune(recipe, resume=True)
    assert summary["seed"] == 1
    assert contents(earlier / "model") != model
    assert Plan.from_json((earlier / "model" / "plan.json").read_text()).digest == summary["plan"]


def test_overwrite_leaves_what_is_not_the_runs(bench: Bench, earlier: Path) -> None:
    (earlier / "notes.txt").write_text("mine")
    tune(bench.recipe(earlier, search__steps=1, recover__steps=1), overwrite=True)
    assert (earlier / "notes.txt").read_text() == "mine"
    assert not (earlier / "checkpoint-dense_lora.pt").exists()
    assert len(losses(earlier)) == 2


def test_the_base_need_not_be_measured_again(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "run", evaluate__base=False)
    summary = tune(recipe)
    assert summary["base"] == {}
    assert summary["result"]["ppl"] > 1
    assert json.loads((tmp_path / "run" / "stages.json").read_text())["base"] == {}
    assert "perplexity" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_run_from_before_a_key_came_can_be_resumed(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "run")
    tune(recipe)
    file = tmp_path / "run" / "recipe.yaml"
    stored = yaml.safe_load(file.read_text())
    del stored["evaluate"]["base"]
    file.write_text(yaml.safe_dump(stored))
    assert tune(recipe, resume=True)["resumed"]
    file.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=r"--resume: evaluate\.base is False now but True in the run's recipe\.yaml"):
        tune(bench.recipe(tmp_path / "run", evaluate__base=False), resume=True)

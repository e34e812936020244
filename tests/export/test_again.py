"""``slimtune verify``: what was written is held to what it should compute, in processes of their own."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slimtune
from bases import Bench
from cuts import UNEVEN, write_folder
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import gguf_compared, record

run = CliRunner().invoke
pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    out = folder / "run"
    slimtune.tune(Bench(folder).recipe(out, export__verify=True))
    return out


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def damage(folder: Path, factor: float) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file({**weights, name: weights[name] * factor}, file, {"format": "pt"})


def test_a_runs_model_is_what_was_recorded_when_it_was_written(tuned: Path) -> None:
    done = run(app, ["verify", str(tuned), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["tokens_same"] == found["tokens"] > 8
    assert found["logprob_difference"] < 1e-4
    assert found["parameters"] == json.loads((tuned / "summary.json").read_text())["result"]["parameters"]
    assert found["bytes"] == sum(path.stat().st_size for path in (tuned / "model").glob("*.safetensors"))
    assert found["load_s"] > 0


def test_the_record_has_no_text_of_the_users(tuned: Path) -> None:
    kept = record.read(tuned / "model")
    assert kept
    vocabulary = json.loads((tuned / "model" / "config.json").read_text())["vocab_size"]
    assert kept.input_ids == record.drawn(vocabulary, len(kept.input_ids))[0].tolist()


def test_other_weights_are_found(tuned: Path, tmp_path: Path) -> None:
    other = copied(tuned / "model", tmp_path / "model")
    damage(other, 3.0)
    done = run(app, ["verify", str(other)])
    assert done.exit_code == 1
    assert "NOT the same model" in done.stdout
    against = slimtune.verify_export(other, against=tuned)
    assert not against["ok"]
    assert against["logprob_difference"] > 10 * against["limit"]


def test_a_model_of_others_needs_something_to_equal(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    with pytest.raises(UserError, match=r"has no verify.json, .*; say what it should equal: --against RUN"):
        slimtune.verify_export(tmp_path)
    found = slimtune.verify_export(tmp_path, against=tmp_path / "model")
    assert found["ok"]
    assert found["tokens_same"] == found["tokens"] == 64


def test_a_file_is_held_to_the_folder_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    slimtune.export_model(tmp_path, quantize="f32", check=False)
    done = run(app, ["verify", str(tmp_path / "model-f32.gguf")])
    assert done.exit_code == 0, done.output
    assert "96 of 96 as expected" in done.stdout
    slimtune.export_model(tmp_path, quantize="q8_0", check=False)
    done = run(app, ["verify", str(tmp_path / "model-q8_0.gguf")])
    assert re.search(r"within \S+, \S+ in the mean \(limit of the mean 0\.2\)", done.stdout), done.output
    assert "the same model; the difference is what fewer bits cost" in done.stdout
    damage(tmp_path / "model", 3.0)
    found: dict[str, Any] = slimtune.verify_export(tmp_path / "model-f32.gguf")
    assert not found["ok"]
    assert found["limit"] == 0.01
    (tmp_path / "model-f32.gguf").rename(tmp_path / "mine.gguf")
    with pytest.raises(UserError, match=r"no model's folder lies beside .*mine.gguf.*; say what it was made from: --against"):
        slimtune.verify_export(tmp_path / "mine.gguf")


@pytest.mark.parametrize(("kind", "limit"), [("q8_0", 0.2), ("q4_0", 1.5)])
def test_another_model_is_found_in_fewer_bits(tmp_path: Path, kind: str, limit: float) -> None:
    model = write_folder(tmp_path / "model", "llama", UNEVEN)
    slimtune.export_model(tmp_path, quantize=kind)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    with torch.no_grad():
        drawn = {name: torch.randn_like(each) * each.std() for name, each in model.named_parameters() if "norm" not in name}
    stored = load_file(tmp_path / "other" / "model.safetensors")
    save_file(stored | {name: each for name, each in drawn.items() if name in stored}, tmp_path / "other" / "model.safetensors")
    file = tmp_path / f"model-{kind}.gguf"
    found = slimtune.verify_export(file)
    assert (found["ok"], found["limit"], found["limit_of"]) == (True, limit, "logprob_mean")
    assert found["logprob_mean"] < limit / 3
    done = run(app, ["verify", str(file), "--against", str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "NOT the same model" in done.stdout


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_a_figure_that_is_no_number_is_not_the_same_model(kind: str) -> None:
    for wrong in (math.nan, math.inf):
        assert not gguf_compared.judged({"logprob_difference": wrong, "logprob_mean": wrong}, kind)["ok"]
        assert not gguf_compared.judged({"logprob_difference": wrong, "logprob_mean": 0.0}, kind)["ok"]


def test_a_file_of_a_kind_that_is_not_known_has_a_limit() -> None:
    assert gguf_compared.judged({"logprob_difference": 9.0, "logprob_mean": 1.4}, "other")["ok"]
    assert not gguf_compared.judged({"logprob_difference": 9.0, "logprob_mean": 1.6}, "other")["ok"]


@pytest.mark.parametrize("words", [["verify"], ["export", "--to", "hf"], ["export", "--to", "hf", "-q", "f16"]], ids=" ".join)
def test_weights_that_are_cut_short(tmp_path: Path, words: list[str]) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    record.write(tmp_path / "model", record.Record([1, 2], [3, 4], [-0.5, -0.5]))
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    done = run(app, [words[0], str(tmp_path / "model"), *words[1:]])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(("loading ", "writing "))]
    assert len(lines) == 1
    assert "cannot be read (" in lines[0] or "cannot be loaded (" in lines[0] or "fails in a fresh process (" in lines[0]
    assert len(lines[0]) < 300 + len(str(tmp_path))


BAD = {
    "nothing": ("{tmp}/nowhere", "does not exist; give a model folder"),
    "no file": ("{tmp}/nowhere.gguf", "is no file here; give a GGUF file, or the folder of a run or a model"),
    "no GGUF": ("{tmp}/text.gguf", "cannot be read as a GGUF file"),
    "broken record": ("{tmp}/model", "is no record of an export (its lists differ in length)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_one_clear_error(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    record.write(tmp_path / "model", record.Record([1, 2], [3], [0.5]))
    (tmp_path / "text.gguf").write_text("not a model at all")
    given, message = BAD[name]
    with pytest.raises(UserError) as caught:
        slimtune.verify_export(given.format(tmp=tmp_path))
    assert message in str(caught.value)


def test_against_a_smaller_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    record.write(tmp_path / "model", record.Record([999_999], [3], [-0.5]))
    with pytest.raises(UserError, match=r"fewer than .* it is another model's"):
        slimtune.verify_export(tmp_path, against=tmp_path / "model")


def test_what_is_recorded_is_the_likeliest_token_and_its_log_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 9.0]])
    kept = record.of(torch.tensor([1, 0]), logits)
    assert kept.tokens == [1, 2]
    assert kept.logprobs == pytest.approx(torch.log_softmax(logits, -1).max(-1).values.tolist(), abs=1e-6)

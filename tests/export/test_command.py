from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slimtune
from cuts import UNEVEN, write_folder
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import gguf_compared, gguf_vocab

run = CliRunner().invoke


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "model", "llama", UNEVEN)
    return folder


def test_the_table_tells_what_stays_wide(tuned: Path) -> None:
    done = run(app, ["export", str(tuned / "model"), "-q", "q8_0", "--no-check", "--out", str(tuned / "small.gguf")])
    assert done.exit_code == 0, done.output
    assert "deci of llama.cpp" in done.stdout
    assert "stay in 16 bits: their rows are no multiple of 32" in done.stdout
    assert "in llama.cpp " not in done.stdout


def test_a_file_that_runs_otherwise_does_not_take_the_place_of_another(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_compared, "LARGEST", {"f32": 1e-9})
    (tuned / "mine.gguf").write_text("GGUF, precious")
    with pytest.raises(UserError, match=r"llama.cpp computes other figures .* no file was written"):
        slimtune.export_model(tuned, quantize="f32", out=tuned / "mine.gguf")
    assert (tuned / "mine.gguf").read_text() == "GGUF, precious"
    assert not list(tuned.glob(".*"))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_another_model_in_fewer_bits_is_not_left(tuned: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def drawn(*given: Any) -> Any:
        model = pretrained(*given)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter[torch.randperm(len(parameter))])
        return model

    pretrained = gguf_compared.pretrained
    monkeypatch.setattr(gguf_compared, "pretrained", drawn)
    with pytest.raises(UserError, match=r"computes other figures .*, in the mean by [\d.]+\); no file was written"):
        slimtune.export_model(tuned, quantize=kind, out=tuned / "other.gguf")
    assert not list(tuned.glob("*other.gguf*"))


def test_a_file_that_splits_words_otherwise_is_not_left(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_vocab, "splitter", lambda *_: "llama-bpe")
    with pytest.raises(
        UserError, match=r"llama.cpp splits .* into \d+ tokens and the tokenizer of .* into \d+; no file was written"
    ):
        slimtune.export_model(tuned, out=tuned / "other.gguf")
    assert not list(tuned.glob("*other.gguf*"))


def test_weights_that_are_not_there(tuned: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1.mlp.up" not in name}, file)
    with pytest.raises(UserError, match=r"lack the tensor 'model.layers.1.mlp.up_proj.weight', which its config asks for"):
        slimtune.export_model(tmp_path, check=False)
    save_file({"tok_embeddings.weight": weights["model.embed_tokens.weight"]}, tmp_path / "model" / "consolidated.safetensors")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    slimtune.export_model(tmp_path, check=False, out=tmp_path / "x.gguf")
    assert [each.name for each in tmp_path.glob("*.gguf")] == ["x.gguf"]


BAD = {
    "target": (
        ["{run}", "--to", "ggml"],
        "--to 'ggml' is not known. Did you mean 'gguf'? Targets: hf, hf-uniform, gguf, onnx, vllm",
    ),
    "kind": (["{run}", "-q", "q8"], "--quantize q8 is not known. Did you mean 'q8_0'?"),
    "k-quant": (["{run}", "-q", "q4_K_M"], "K- and I-quants are made by llama.cpp alone"),
    "no run": (["{run}/nowhere"], "does not exist; give a model folder"),
    "no model": (["{run}/.."], "has no config.json"),
    "no folder": (["{run}", "--out", "{run}/no/x.gguf"], "there is no folder"),
    "folder": (["{run}", "--out", "{run}"], "is a folder; name a file"),
    "other file": (["{run}", "--out", "{run}/model/config.json"], "is no GGUF file and is not replaced; name another"),
    "package": (["builtin:base-10m"], "lies in the package; say where it goes: --out model.gguf"),
    "hub": (["org/name"], "is no folder here; fetch it (hf download org/name) and give the folder"),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_bad_words_are_told_in_one_line(tuned: Path, words: list[str], told: str) -> None:
    done = run(app, ["export", *(word.replace("{run}", str(tuned)) for word in words)])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("to", [["hf"], ["hf-uniform"], ["vllm"], ["vllm", "--form", "deci"], ["onnx"]], ids=" ".join)
def test_the_model_of_another_run_is_not_replaced(tuned: Path, tmp_path: Path, to: list[str]) -> None:
    shutil.copytree(tuned / "model", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("")
    done = run(app, ["export", str(tuned), "--to", *to, "--out", str(tmp_path / "model")])
    assert done.exit_code == 2
    assert "is the model of the run" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in (tuned / "model").iterdir()}


def test_a_tokenizer_that_llama_cpp_does_not_have(tuned: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    file = tmp_path / "model" / "tokenizer.json"
    raw = json.loads(file.read_text())
    for change, told in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits words in a way that is none of those known"),
        ({"model": {**raw["model"], "byte_fallback": True}}, "has no token '<0x00>': llama.cpp wants one for each"),
        ({"normalizer": {"type": "Lowercase"}}, "rewrites text before it splits it (Lowercase)"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "is a WordLevel tokenizer; GGUF is written for BPE alone"),
    ):
        file.write_text(json.dumps({**raw, **change}))
        with pytest.raises(UserError) as caught:
            slimtune.export_model(tmp_path)
        assert told in str(caught.value)
    file.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json' is not JSON"):
        slimtune.export_model(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        slimtune.export_model(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))

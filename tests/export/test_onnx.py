"""ONNX graphs, run by onnxruntime itself in a process of its own. Tracing costs ten seconds, so few models are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimtune
from cuts import UNEVEN, write_folder
from mixtures import write_sparse
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.export import onnx

run = CliRunner().invoke


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other widths in every layer, soft caps and windows, and beside it its graph."""
    folder = tmp_path_factory.mktemp("onnx")
    write_folder(folder / "model", "gemma2", UNEVEN[:2], num_hidden_layers=2)
    done = run(app, ["export", str(folder), "--to", "onnx"])
    assert done.exit_code == 0, done.output
    assert "32 of 32 greedy tokens as in torch" in done.stdout
    return folder


def test_the_folder_has_all_that_a_user_needs(written: Path) -> None:
    names = {path.name for path in (written / "model-onnx").iterdir()}
    assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not list(written.glob(".*"))


def test_lengths_batches_and_padding_of_any_kind(written: Path) -> None:
    found = onnx.compared(written / "model", written / "model-onnx")
    assert found["logit_difference"] < 1e-4
    assert found["tokens_same"] == found["tokens"] == 32
    session = pytest.importorskip("onnxruntime").InferenceSession(written / "model-onnx" / "model.onnx")
    model = AutoModelForCausalLM.from_pretrained(written / "model", dtype=torch.float32, attn_implementation="eager").eval()
    for batch, length in ((1, 1), (4, 3), (1, 50)):
        ids = torch.arange(3, 3 + batch * length).view(batch, length)
        given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.allclose(torch.from_numpy(session.run(["logits"], given)[0]), expected, atol=1e-4)
    # what stands before a row's first word must not count
    row = torch.arange(5, 15)
    padded = torch.stack([torch.cat([torch.full((6,), 1), row]), torch.arange(16)])
    mask = torch.ones_like(padded)
    mask[0, :6] = 0
    last = session.run(["logits"], {"input_ids": padded.numpy(), "attention_mask": mask.numpy()})[0][0, -1]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(last), model(row[None]).logits[0, -1], atol=1e-4)


def test_verify_holds_a_graph_to_the_folder_beside_it(written: Path, tmp_path: Path) -> None:
    done = run(app, ["verify", str(written / "model-onnx"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["bytes"] == (written / "model-onnx" / "model.onnx").stat().st_size
    weights = load_file(written / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    (tmp_path / "other").mkdir()
    for file in (written / "model").iterdir():
        if file.is_file():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    save_file({**weights, name: weights[name].flip(0)}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    other = run(app, ["verify", str(written / "model-onnx"), "--against", str(tmp_path / "other")])
    assert other.exit_code == 1
    assert "NOT the same model" in other.stdout


def test_a_graph_that_runs_otherwise_does_not_take_the_place_of_another(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        def save(self, file: Path) -> None:
            file.write_bytes((written / "model-onnx" / "model.onnx").read_bytes())

    monkeypatch.setattr(onnx, "_graph", lambda model: Graph())
    monkeypatch.setattr(onnx, "LIMIT", 0.0)
    target = tmp_path / "mine"
    target.mkdir()
    (target / "config.json").write_text("precious")
    with pytest.raises(UserError, match=r"onnxruntime computes other figures .* nothing was written"):
        slimtune.export_model(written, "onnx", out=target)
    assert (target / "config.json").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


BAD = {
    "quantize": (["{run}", "--to", "onnx", "-q", "q8_0"], "--quantize q8_0 is not for --to onnx"),
    "itself": (["{run}", "--to", "onnx", "--out", "{run}/model"], "is the model's own folder; name another"),
    "other files": (["{run}", "--to", "onnx", "--out", "{run}"], "holds other files than a model"),
    "builtin": (["builtin:base-10m", "--to", "onnx"], "say where it goes: --out model-onnx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_one_clear_error(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    words, message = BAD[name]
    done = run(app, ["export", *(word.format(run=tmp_path) for word in words)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    write_sparse(tmp_path / "model")
    with pytest.raises(UserError, match=r"--to onnx: a model of 'mixtral' chooses experts word by word.*use --to gguf"):
        slimtune.export_model(tmp_path / "model", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_absent_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", "llama", UNEVEN)
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"ONNX needs the packages onnx, onnxscript, onnxruntime; pip install 'slimtune\[onnx\]'"
    ):
        slimtune.export_model(tmp_path, "onnx")


def test_a_graph_alone_needs_something_to_equal(written: Path, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    for file in (written / "model-onnx").iterdir():
        (tmp_path / "graph" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"no model's folder lies beside .*graph.*--against RUN"):
        slimtune.verify_export(tmp_path / "graph")

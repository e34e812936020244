"""A folder is written whole or not at all."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slimtune.errors import UserError
from slimtune.export.folder import check_target, replacing

Usage = namedtuple("Usage", "total used free")


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("old")


def fail_half_way(folder: Path, error: Exception) -> None:
    with replacing(folder, 1) as partial:
        assert not list(partial.iterdir())
        (partial / "half").write_text("x")
        raise error


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "model", 1) as partial:
        (partial / "config.json").write_text("new")
        assert not (tmp_path / "a" / "model").exists()
    assert (tmp_path / "a" / "model" / "config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_space_is_asked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 7, 3_000_000))
    full = pytest.raises(UserError, match=r"model'.*needs 5\.00 GB, 3\.0 MB are free")
    with full, replacing(tmp_path / "model", 5 * 10**9):
        pytest.fail("nothing may be written")
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_while_tensors_are_written(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="no space"):
        fail_half_way(tmp_path / "model", error)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_failures_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), replacing(tmp_path / "model", 1):
        raise SafetensorError("bad header")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="holds other files"), replacing(tmp_path, 1):
        pytest.fail("nothing may be written")
    assert (tmp_path / "thesis.txt").exists()


FOREIGN = {
    "project": ("src/main.py", "'src'"),
    "program": ("tokenizer.py", "'tokenizer.py'"),
    "link": ("README.md", "'README.md'"),
    "weights of others": ("pytorch_model.bin", "'pytorch_model.bin'"),
    "hidden": (".git/HEAD", "'.git'"),
}


@pytest.mark.parametrize(("name", "told"), FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_the_users_with_a_config_is_not_replaced(tmp_path: Path, name: str, told: str) -> None:
    make_model(tmp_path / "p")
    file = tmp_path / "p" / name
    file.parent.mkdir(exist_ok=True)
    if name == "README.md":
        file.symlink_to(tmp_path / "p" / "config.json")
    else:
        file.write_text("the only copy")
    match = rf"^'.*p' holds other files than a model \({told}\) and is not replaced; choose another$"
    with pytest.raises(UserError, match=match), replacing(tmp_path / "p", 1):
        pytest.fail("nothing may be written")
    assert file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


MODEL = ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
MODEL += ("plan.json", "verify.json", "README.md", "modeling_slimtune.py", "modeling_slimtune_deci.py", "model.onnx.data")
MODEL += ("tokenizer.json", "tokenization_theirs.py", "merges.txt", "spiece.model", "__pycache__/x.pyc")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "changed.safetensors", "apply.json", "plan.json", "README.md")


@pytest.mark.parametrize("names", [MODEL, ADAPTER], ids=["model", "adapter"])
def test_all_that_is_written_is_replaced(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("old")
    with replacing(tmp_path / "model", 1, marker=names[0]) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_an_adapter_is_no_place_for_a_model_nor_a_model_for_an_adapter(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"no adapter_config.json"):
        check_target(tmp_path / "model", "adapter_config.json")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"\('adapter_config.json'\)"):
        check_target(tmp_path / "model")


def test_the_model_of_a_run_is_for_the_run_to_replace(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    check_target(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"model' is the model of the run '.*'; choose another folder$"):
        check_target(tmp_path / "model")
    with replacing(tmp_path / "model", 1) as partial:
        (partial / "new").write_text("new")
    shutil.rmtree(tmp_path / "model")
    check_target(tmp_path / "model")


def test_here_is_a_target_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    monkeypatch.chdir(tmp_path / "p")
    for text in ("one", "two"):
        with replacing(Path("."), 1) as partial:
            (partial / "config.json").write_text(text)
        assert Path("config.json").read_text() == text
    Path("notes.txt").write_text("the only copy")
    for here in (Path("."), Path("/")):
        with pytest.raises(UserError, match="holds other files than a model"), replacing(here, 1):
            pytest.fail("nothing may be written")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("name", ["/proc/x/y", "{tmp}/file/y", "{tmp}/" + "n" * 300])
def test_where_no_folder_can_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"model folder '.*' cannot be written: .*; choose another folder$"):
        fail_half_way(Path(name.format(tmp=tmp_path)), RuntimeError("it was made"))


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(UserError, match="is a file"), replacing(tmp_path / "model", 1):
        pytest.fail("nothing may be written")


def test_leavings_of_a_killed_run_are_cleared_and_the_old_model_comes_back(tmp_path: Path) -> None:
    make_model(tmp_path / ".model.old")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("x")
    with pytest.raises(RuntimeError, match="again"):
        fail_half_way(tmp_path / "model", RuntimeError("again"))
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

"""A folder is written whole or not at all."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slimtune.errors import UserError
from slimtune.export.folder import replacing

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

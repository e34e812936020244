"""Whose the output folder is: files of others stay, whatever they are called."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimtune.errors import UserError
from slimtune.recipe import parse
from slimtune.runtime import RunFolder
from slimtune.train.claim import FREE_ON_RESUME, check_model, claim, is_held, open_folder, place, seen_from


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["summary.json", "stages.json", "metrics.jsonl", "checkpoint-main.pt", "summary.json.partial", "recipe.yaml"]
)
def test_files_of_others_are_refused_by_name(tmp_path: Path, name: str, resume: bool, overwrite: bool) -> None:
    (tmp_path / name).write_text("flour: 500 g")
    with pytest.raises(UserError, match=rf"holds {name}, which a run would replace; choose another out"):
        open_folder(parse({"out": str(tmp_path)}), resume, overwrite)
    assert (tmp_path / name).read_text() == "flour: 500 g"


def test_a_model_of_others_is_refused(tmp_path: Path) -> None:
    recipe = parse({"out": str(tmp_path)})
    (tmp_path / "model").mkdir()
    check_model(RunFolder(tmp_path), recipe)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds model, which a run would replace; choose another out"):
        check_model(RunFolder(tmp_path), recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    check_model(RunFolder(tmp_path), recipe)


def test_what_no_run_writes_may_lie_beside_and_stays(tmp_path: Path) -> None:
    recipe = parse({"out": str(tmp_path)})
    others = ["checkpoint-500.pt", "download.partial", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    claim(open_folder(recipe, False, False), recipe, False)
    assert names(tmp_path) == sorted([*others, "recipe.yaml"])


def test_an_adapter_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"holds adapter, which a run would replace; choose another out"):
        open_folder(parse({"out": str(tmp_path)}), False, True)


def test_replacing_a_run_removes_its_files_and_no_others(tmp_path: Path) -> None:
    recipe = parse({"out": str(tmp_path)})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    for name in (
        "summary.json",
        "stages.json",
        "checkpoint-main.pt",
        "checkpoint-main.pt.partial",
        "checkpoint-500.pt",
        "x.partial",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / "adapter").mkdir()  # it would not fit the new run's plan
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    claim(open_folder(recipe, False, True), recipe, False)
    assert names(tmp_path) == ["checkpoint-500.pt", "recipe.yaml", "x.partial"]


OTHER: dict[str, Any] = {
    "track": ["tensorboard"],
    "train.checkpoint_every": 7,
    "train.compile": False,
    "train.shard": "full",
    "train.threads": 3,
    "evaluate.batch": 5,
    "export.verify": False,
    "export.dtype": "bfloat16",
    "export.adapter": False,
}


def nested(key: str, value: Any) -> dict[str, Any]:
    section, _, leaf = key.rpartition(".")
    return {section: {leaf: value}} if section else {leaf: value}


@pytest.mark.parametrize("key", sorted(FREE_ON_RESUME))
def test_what_changes_nothing_learned_may_change_on_a_resume(tmp_path: Path, key: str) -> None:
    stored = parse({"out": str(tmp_path / "old")})
    (tmp_path / "recipe.yaml").write_text(stored.to_yaml())
    (tmp_path / "checkpoint-main.pt").write_text("weights")
    recipe = parse({"out": str(tmp_path)} | nested(key, str(tmp_path) if key == "out" else OTHER[key]))
    claim(open_folder(recipe, True, False), recipe, True)
    assert parse(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == recipe != stored
    assert (tmp_path / "checkpoint-main.pt").read_text() == "weights"


def test_what_a_run_is_held_to_may_change_on_a_resume(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(parse({"out": str(tmp_path), "guard": {"ppl": "< 3", "loss": "< 1"}}).to_yaml())
    changed = {"guard": {"ppl": "< 5"}, "alarm": {"then": "stop"}, "speed": {"batches": [1, 8]}}
    open_folder(parse({"out": str(tmp_path)} | changed), True, False)
    with pytest.raises(UserError, match=r"only alarm, .*, guard, .*, speed, .* may change"):
        open_folder(parse({"out": str(tmp_path), "seed": 1}), True, False)


def test_a_run_whose_recipe_has_an_earlier_name_of_a_key_is_resumed(tmp_path: Path) -> None:
    recipe = parse({"out": str(tmp_path), "track": ["tensorboard"]})
    stored = recipe.to_yaml()
    (tmp_path / "recipe.yaml").write_text(stored.replace("track:", "trackers:"))
    assert (tmp_path / "recipe.yaml").read_text() != stored
    claim(open_folder(recipe, True, False), recipe, True)
    assert (tmp_path / "recipe.yaml").read_text() == stored


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.micro_batch", 2), ("model.attention", "eager"), ("device", "cpu"), ("evaluate.every", 3), ("train.lr", 1e-5)],
)
def test_all_else_may_not(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(parse({"out": str(tmp_path)}).to_yaml())
    with pytest.raises(UserError, match=rf"--resume: {key} is {value!r} now but .* in the run's recipe.yaml.* --overwrite"):
        open_folder(parse({"out": str(tmp_path)} | nested(key, value)), True, False)


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="the system does not list its locks")
def test_that_a_folder_is_held_is_seen_without_taking_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place()
    assert place() == place()
    folder = RunFolder(tmp_path)
    assert not is_held(tmp_path)
    with folder.held():
        assert is_held(tmp_path)
        assert seen_from(tmp_path) == place()
        assert not is_held(tmp_path / "absent")
        with monkeypatch.context() as patch:  # as of some file systems, and of systems without such a list
            patch.setattr("slimtune.train.claim.os.minor", lambda device: 255)
            assert seen_from(tmp_path) is None
    assert not is_held(tmp_path)
    assert seen_from(tmp_path) is None


def test_a_run_begins_however_often_its_folder_is_looked_at(tmp_path: Path) -> None:
    """With a lock that is taken to find out, some of these would be refused."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_held(tmp_path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with RunFolder(tmp_path).held():
                pass
    finally:
        done.set()
        watcher.join()

"""A checkpoint is the old one or the new one, never half; what does not fit is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gated import random_model
from slimtune.errors import UserError
from slimtune.train import checkpoint

CPU = torch.device("cpu")


def state(number: int) -> dict[str, Any]:
    return {"step": number, "phase": "search", "tensors": {"a": torch.full((3,), float(number))}, "plan": None}


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(value: Any, file: Any) -> None:
    file.write(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")


def test_a_state_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-main.pt"
    assert checkpoint.load(path, CPU) is None
    for number in (1, 2):
        checkpoint.save(path, state(number))
        loaded = checkpoint.load(path, CPU)
        assert loaded is not None
        assert torch.equal(loaded.pop("tensors")["a"], torch.full((3,), float(number)))
        assert loaded == {"step": number, "phase": "search", "plan": None}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_state_comes_back_to_one_of_several_processes_on_cpus(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "state.pt", {"tensor": torch.arange(3)})
    found = checkpoint.load(tmp_path / "state.pt", torch.device("cpu:0"))
    assert found is not None
    assert found["tensor"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("where", "fault"),
    [("os.replace", full_disk), ("os.fsync", full_disk), ("torch.save", full_disk), ("torch.save", half_written)],
)
def test_a_full_disk_leaves_the_old_checkpoint(where: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint-main.pt"
    checkpoint.save(path, state(1))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"slimtune.train.checkpoint.{where}", fault)
        with pytest.raises(UserError, match=r"checkpoint-main\.pt.*cannot be written.*--resume"):
            checkpoint.save(path, state(2))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    checkpoint.save(path, state(3))
    loaded = checkpoint.load(path, CPU)
    assert loaded is not None
    assert loaded["step"] == 3


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint-main.pt"
    checkpoint.save(path, state(1))

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, state(2))
    loaded = checkpoint.load(path, CPU)
    assert loaded is not None
    assert loaded["step"] == 1
    checkpoint.save(path, state(3))  # over what the kill left behind
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("free", "reason"), [(100, "No space left on device"), (10**9, "unexpected pos")])
def test_what_torch_says_of_a_full_disk_is_put_in_words(
    free: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=reason) as error:
        checkpoint.save(tmp_path / "checkpoint-main.pt", state(1))
    assert "previous" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "gone" / "checkpoint.pt", state(1))


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    checkpoint.save(tmp_path / "checkpoint.pt", state(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut short"])
def test_a_damaged_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state(1))
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=r"checkpoint\.pt.*is damaged.*delete it"):
        checkpoint.load(path, CPU)


def test_trainable_tensors_come_back_and_misfits_are_refused() -> None:
    model, _ = random_model("llama", seed=0, rank=2)
    other, _ = random_model("llama", seed=1, rank=2)
    saved = {name: tensor.clone() for name, tensor in checkpoint.trainable_state(model).items()}
    assert saved
    assert all("lora_" in name for name in saved)
    checkpoint.restore_trainable(other, saved)
    restored = checkpoint.trainable_state(other)
    assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())
    with pytest.raises(UserError, match=r"lora_A.*has shape"):
        checkpoint.restore_trainable(random_model("llama", rank=3)[0], saved)
    saved.popitem()
    with pytest.raises(UserError, match="another model or LoRA setting"):
        checkpoint.restore_trainable(other, saved)

"""Files that commands write: whole or not at all, and bad names told before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.text_file import named, write, write_atomically, write_or_print


def test_no_value_and_the_terminal_are_no_files(tmp_path: Path) -> None:
    assert named("--json", None) is named("--json", "-") is None
    assert named("--json", tmp_path / "new.json") == tmp_path / "new.json"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", r"^--json '.*' is a folder; name a file$"),
        ("new/", r"^--json '.*new/' is a folder; name a file$"),
        ("no/x.json", r"^--json '.*no/x\.json': there is no folder '.*/no'; make it, or name another file$"),
    ],
)
def test_bad_names(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        named("--json", f"{tmp_path}/{name}")


def test_what_may_not_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"x\.json' cannot be written; name another file"):
        named("--json", tmp_path / "x.json")


def test_a_failure_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    (tmp_path / "x.json.partial").mkdir()  # stands in the way, as a full disk would
    with pytest.raises(UserError, match=r"^--json '.*' cannot be written \(Is a directory\); name another file$"):
        write("--json", file, "new")
    with pytest.raises(UserError, match="it was printed instead"):
        write_or_print("--json", file, "new")
    assert capsys.readouterr().out == "new"
    assert file.read_text() == "old"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    write_atomically(link, "through")
    assert (link.is_symlink(), file.read_text()) == (True, "through")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "text")
        assert os.read(reader, 99) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()

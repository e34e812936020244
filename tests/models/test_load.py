"""Where models are looked for, and what cannot be loaded together."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.models.load import locate


def test_a_mistyped_path_beside_a_folder_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("models/nope") == ("models/nope", False)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=r"model.path='models/nope' does not exist; give a model folder"):
        locate("models/nope")

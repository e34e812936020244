"""Runs of methods go without the check on a two-layer clone: a sixth of such short ones, and other tests make it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.pipeline.self_check", lambda config, seed: 0.0)

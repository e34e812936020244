"""Pieces of long texts."""

from __future__ import annotations

from slimtune.data.pieces import pieces


def test_pieces_end_at_lines_then_words() -> None:
    assert pieces("ab cd\nef gh", 8) == ["ab cd\n", "ef gh"]
    assert pieces("abcd efgh ijkl", 8) == ["abcd", " efgh", " ijkl"]
    assert pieces("x" * 20, 8) == ["x" * 8, "x" * 8, "x" * 4]
    assert pieces("", 8) == []

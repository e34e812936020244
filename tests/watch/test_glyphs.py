"""Curves and bars as characters."""

from __future__ import annotations

from slimtune.watch import glyphs


def test_curves_as_characters() -> None:
    assert glyphs.spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert glyphs.spark([1, 10, 100]) == "▁▅█"  # logarithms: ▁▂█ else
    assert glyphs.spark([2.0, 2.0]) == "▅▅"
    assert glyphs.spark([]) == ""
    assert glyphs.spark([0, 1], ascii_only=True) == ".@"
    assert glyphs.means([1, 2, 3], 5) == [1, 2, 3]
    assert glyphs.means([1, 3, 5, 7, 9, 11], 3) == [2, 6, 10]
    assert len(glyphs.means(range(1000), 7)) == 7


def test_layers_as_bars() -> None:
    assert glyphs.bars([1, 0.5, 0.125, 0.01, 0]) == ["█▄▁▁░"]
    assert glyphs.bars([1, 0.5, 0.25], height=2) == ["█░░", "██▄"]
    assert glyphs.bars([1, 0], width=3) == ["██ ░░ "]
    assert glyphs.bars([1, 0], ascii_only=True) == ["@ "]

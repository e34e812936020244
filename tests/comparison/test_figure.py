"""The figure: the same rows give the same bytes; what a reader needs stands in it."""

from __future__ import annotations

import builtins
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from comparisons import row
from slimtune.comparison.figure import draw, drawable
from slimtune.comparison.rows import Row
from slimtune.errors import UserError


def some(domain: str = "somewhere") -> list[Row]:
    rows = [row("dense_lora", 1.0, seed, 12.0 + seed, domain=domain) for seed in (0, 1)]
    for method, loss in (("atp", 3.0), ("flap", 4.0)):
        for keep in (0.8, 0.6):
            rows += [row(method, keep, seed, 12.0 + seed + loss / keep, domain=domain) for seed in (0, 1)]
            rows.append(row(method, keep, 0, 1e7 * keep, "parameters", domain=domain))
    return rows


def test_lines_levels_and_sizes(tmp_path: Path) -> None:
    for name in ("one.svg", "again.svg"):
        draw([*some(), *some("other")], tmp_path / "deep" / name)
    first, again = ((tmp_path / "deep" / name).read_text() for name in ("one.svg", "again.svg"))
    assert first == again
    assert "<dc:date>" not in first
    for text in ("somewhere, tiny", "other, tiny", "dense LoRA, nothing cut: 12.50", "atp", "flap", "6.0 M", "80%"):
        assert f"<!-- {text}" in first


def test_one_budget_and_one_bad_method(tmp_path: Path) -> None:
    rows = [*(it for it in some() if it["keep"] != 0.8), row("random", 0.6, 0, 300.0)]
    draw(rows, tmp_path / "figure.svg")
    assert "<!-- random" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-8, 1e29, 1e300, 1.7e308, math.inf, math.nan])
def test_no_figure_makes_the_drawing_fail(tmp_path: Path, value: float) -> None:
    odd = [row("odd", keep, seed, value) for keep in (0.8, 0.6) for seed in (0, 1)]
    odd += [row("half", 0.6, 0, 14.0), row("half", 0.6, 1, value), row("odd", 0.6, 0, value, "parameters")]
    for dense in (12.0, value):
        rows = [{**it, "value": dense} if it["method"] == "dense_lora" else it for it in (*some(), *odd)]
        for part in (rows, [it for it in rows if it["keep"] != 0.8], odd):
            if drawable(part):
                draw(part, tmp_path / "figure.svg")
    assert not drawable([row("odd", 0.6, 0, 1e300)])


def drawn(rows: list[Row], file: Path) -> str:
    draw(rows, file)
    return file.read_text()


def test_a_size_that_is_not_in_the_rows_is_not_made_up(tmp_path: Path) -> None:
    told = some()
    shown = drawn([it for it in told if it["metric"] != "parameters"], tmp_path / "none.svg")
    assert "<!-- 60% -->" in shown
    assert " M" not in "".join(re.findall("<!-- .* -->", shown))
    part = drawn([it for it in told if (it["metric"], it["keep"]) != ("parameters", 0.6)], tmp_path / "part.svg")
    assert "<!-- 8.0 M" in part
    assert "<!-- 60% -->" in part
    # where the size would lie, were it told: 0.6 of the 10 M that 0.8 is a share of
    lines = [re.findall(r'<path d="(M [^"]*)" clip-path', text) for text in (part, drawn(told, tmp_path / "all.svg"))]
    assert lines[0] == lines[1] != []


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        draw([row("dense_lora", 1.0, 0, 12.0)], tmp_path / "figure.svg")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw(some(), tmp_path / "file" / "figure.svg")
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"the figure needs matplotlib: pip install 'slimtune\[plot\]'"):
        draw(some(), tmp_path / "figure.svg")

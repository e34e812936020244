"""What is shown of runs that make experts: alone, beside others, on the way, and held to gates."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runs import GROUPS, WIDTH, write_experts, write_run
from slimtune.errors import UserError
from slimtune.report import experts
from slimtune.report.check import check
from slimtune.report.page import report
from slimtune.report.run import read_run
from slimtune.report.table import render
from slimtune.report.verdict import verdict


def page_of(*runs: Path) -> str:
    return report(list(runs), runs[0].parent / "page.html").read_text(encoding="utf-8")


def figure(text: str, key: str) -> str:
    found = re.search(rf'<figure id="{key}">.*?</figure>', text, re.DOTALL)
    assert found is not None, key
    return found.group()


def table(text: str, title: str) -> dict[str, list[str]]:
    """Cells by the head of their row."""
    (found,) = re.findall(rf"<caption>{title}</caption>.*?</table>", text, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>.*?</tr>", found, re.DOTALL)]
    return {cells[0]: cells[1:] for cells in rows}


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(file.read_text())
    how(found)
    file.write_text(json.dumps(found))


def lines(summary: dict[str, Any]) -> list[str]:
    """The closing table, as a file gets it."""
    file = io.StringIO()
    Console(width=120, file=file).print(render(summary))
    return file.getvalue().splitlines()


def row(summary: dict[str, Any], label: str) -> list[str]:
    (found,) = [line for line in lines(summary) if line.startswith(f"│ {label} ")]
    return [cell.strip() for cell in found.strip("│").split("│")][1:]


def test_the_closing_table_tells_what_is_stored_and_what_a_token_uses(tmp_path: Path) -> None:
    summary = json.loads((write_experts(tmp_path / "run") / "summary.json").read_text())
    assert row(summary, "parameters") == ["1,000,000", "950,000 (95.0%)"]
    assert row(summary, "stored of the blocks") == ["100.0%", "90.0%"]
    assert row(summary, "used by a token") == ["1,000,000", "620,000 (62.0%)"]
    assert row(summary, "used by a token, of the blocks") == ["100.0%", "60.0%"]
    told = [line for line in lines(summary) if line.startswith("experts ")]
    assert told == ["experts    of a layer's choices the least used one gets 10.0%, the most used 50.0%; evenly 25.0%"]
    assert lines(summary)[0].startswith("tomoe: ")
    assert not any("kept of the blocks" in line for line in lines(summary))


def test_the_page_of_experts(tmp_path: Path) -> None:
    run = write_experts(tmp_path / "run")
    text = page_of(run)
    drawn = figure(text, "shape")
    assert drawn.count('data-mark="shared-ffn"') == drawn.count('data-mark="routed-ffn"') == 3
    assert "MLP channels: 25% shared, 50% routed, 25% in none" in drawn
    assert "4 experts of 128 channels, of which a token uses 2 beside 256 shared ones: 512 of 1,024 in all" in drawn
    assert "75.0% of all channels are in some expert." in drawn
    assert "is stored" not in drawn
    loads = figure(text, "experts")
    assert 'data-mark="share"' in loads
    assert "Dotted: all alike, 25.0%. Least used: 10.0% (layer 1, expert 0); most used: 50.0% (layer 2, expert 3)." in loads
    assert '<td class="n">50.0% (3)</td>' in loads
    size = table(text, "Size, quality, cost")
    assert size["stored of the blocks"] == ["100.0%", "90.0%"]
    assert size["used by a token"] == ["1,000,000", "620,000"]
    assert "slimtune convert " in text
    assert "slimtune tune " not in text
    assert "A token uses 620,000 parameters, 60.0% of the base&#39;s blocks; stored it is 5.0% smaller" in text


def test_without_figures_of_the_base_the_verdict_tells_what_is_stored(tmp_path: Path) -> None:
    run = write_experts(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (run / "summary.json").write_text(json.dumps({**summary, "base": {}}), encoding="utf-8")
    assert "60.0% of the base's blocks; 950,000 parameters are stored" in verdict(read_run(run))


def test_channels_in_several_experts_are_told_to_be_stored_more_than_once(tmp_path: Path) -> None:
    run = write_experts(tmp_path / "run", overlap=True, changes={"parameters": 2_500_000, "block_ratio": 2.8})
    text = page_of(run)
    assert "MLP channels: 75% routed, 25% in none" in figure(text, "shape")
    assert 'data-mark="shared-ffn"' not in figure(text, "shape")
    assert "A channel that is in some expert is stored 2.0 times, on average." in figure(text, "shape")
    assert "stored it is 2.50 times as large (2.5 M for 1.0 M parameters)" in verdict(read_run(run))
    assert ">280.0%</td>" in text


def test_experts_that_are_never_chosen_are_counted(tmp_path: Path) -> None:
    shares = [[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [0.25] * 4]
    run = write_experts(tmp_path / "run", shares=shares)
    found = experts.loads(read_run(run), "key")
    assert found is not None
    assert "2 are never chosen." in found.note
    assert found.rows[0] == ["0", "0.0% (2)", "50.0% (0)", "2.00", "2 of 4"]
    assert found.rows[1][-1] == "0 of 4"
    change(run / "summary.json", lambda summary: summary.pop("shares"))
    assert experts.loads(read_run(run), "key") is None


def test_beside_runs_without_experts(tmp_path: Path) -> None:
    one, two = write_experts(tmp_path / "one"), write_run(tmp_path / "two", layers=3)
    text = page_of(one, two)
    beside = table(text, "Side by side")
    assert beside["stored of the blocks"][:2] == ["90.0%", "50.0%"]
    assert beside["used by a token"][:3] == ["620,000", "600,000", "1,000,000"]
    assert beside["used by a token, of the blocks"][:2] == ["60.0%", "50.0%"]
    assert "parameters that a token uses" in figure(text, "size0")
    assert "MLP channels" in figure(text, "shape0")
    assert "MLP width" in figure(text, "shape1")
    assert 'id="experts0"' in text
    assert 'id="experts1"' not in text
    assert "of experts: that some expert has" in figure(text, "shapes")
    plain = page_of(two, write_run(tmp_path / "three", layers=3, seed=1))
    assert "kept of the blocks" in table(plain, "Side by side")
    assert not {"used by a token", "stored of the blocks"} & set(table(plain, "Side by side"))
    assert "that a token uses" not in plain


def test_on_the_way_the_part_that_a_token_uses_follows_the_target(tmp_path: Path) -> None:
    run = write_experts(tmp_path / "run", finished=False)
    read = read_run(run)
    assert [value for _, value in read.line("kept")] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.6, 0.6])
    assert verdict(read) == "This run is not finished: recover step 3, 60.0% used by a token, 6 steps in all."
    text = page_of(run)
    assert "Used by a token, against target" in text
    assert "experts fixed" in figure(text, "kept")
    assert "What a token uses: more is stored." in figure(text, "kept")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    assert "search step 1, 90.0% used by a token" in verdict(read_run(run))


@pytest.mark.parametrize("shares", [3, [3], [[0.5, 0.5], [1.0]], [[0.5, "x"]], [[]]])
def test_shares_that_no_run_writes_are_named(tmp_path: Path, shares: Any) -> None:
    run = write_experts(tmp_path / "run")
    change(run / "summary.json", lambda summary: summary.update(shares=shares))
    with pytest.raises(UserError, match=r"is no summary of a run: shares is "):
        read_run(run)


def test_gates_on_what_a_token_uses(tmp_path: Path) -> None:
    run, other = write_experts(tmp_path / "run"), write_experts(tmp_path / "other", changes={"active_parameters": 500_000})
    held = check(run, gates={"active_ratio": "<= 0.6", "active_parameters": "<= 0.62 x dense", "block_ratio": "<= 0.8"})
    assert [ruling.figure for ruling in held.failed] == ["block_ratio"]
    assert [ruling.figure for ruling in check(run, other).failed] == ["active_parameters"]
    dense = write_run(tmp_path / "dense", layers=3)  # of which a token uses all
    assert check(run, dense, {"active_parameters": "<= baseline"}).failed[0].limit == 600_000
    assert not check(dense, run, {"active_parameters": "<= baseline"}).failed
    assert "active_parameters" not in {ruling.figure for ruling in check(dense, write_run(tmp_path / "same", layers=3)).rulings}


def test_a_plan_of_experts_and_its_parts_add_up(tmp_path: Path) -> None:
    plan = read_run(write_experts(tmp_path / "run")).plan
    assert plan is not None
    assert [sum(experts._parts(plan, layer)) for layer in range(3)] == [WIDTH] * 3
    assert len(plan.kept[0]["kv_group"]) < GROUPS
    assert "beside" not in experts.words(replace(plan, experts=tuple(replace(each, shared=()) for each in plan.experts)))

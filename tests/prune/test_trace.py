"""How a decision moved, as rows of metrics.jsonl tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bases import Bench
from slimtune.models.load import load_config, structure_of
from slimtune.pipeline import tune
from slimtune.prune.trace import Trace
from slimtune.structure.axes import FFN, KV_GROUP


def masks(*layers: tuple[list[int], list[int]]) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (index, axis): torch.tensor(mask, dtype=torch.float32)
        for index, layer in enumerate(layers)
        for axis, mask in zip((KV_GROUP, FFN), layer, strict=True)
    }


def test_widths_and_units_that_changed_sides_by_hand() -> None:
    trace = Trace()
    assert trace.row({}) == {}
    first = trace.row(masks(([1, 1], [1, 1, 0, 0]), ([1, 0], [1, 1, 1, 1])))
    assert first == {"closed": 3 / 12, "reopened": 0.0, "widths_kv_group": [2, 1], "widths_ffn": [2, 4]}
    second = trace.row(masks(([1, 0], [0, 1, 1, 0]), ([1, 0], [1, 1, 1, 1])))
    assert second == {"closed": 2 / 12, "reopened": 1 / 12, "widths_kv_group": [1, 1], "widths_ffn": [2, 4]}


def test_a_search_that_goes_on_compares_with_the_step_before_it() -> None:
    before, now = masks(([1, 1], [1, 0, 0, 0])), masks(([1, 0], [1, 0, 0, 1]))
    whole, resumed = Trace(), Trace()
    whole.row(before)
    resumed.follow(before)
    assert resumed.row(now) == whole.row(now)
    assert resumed.row(before)["closed"] == 1 / 6  # and of one that begins, with all units kept
    resumed.follow({})
    assert resumed.row(before)["closed"] == 3 / 6


def test_widths_in_the_rows_of_a_run_are_those_that_its_kept_ratio_is_counted_from(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path / "run", search__steps=6))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    search = [row for row in rows if row.get("phase") == "search"]
    assert [len(row[f"widths_{axis}"]) for row in search for axis in (KV_GROUP, FFN)] == [3] * 12
    assert all("widths_ffn" not in row for row in rows if row.get("phase") == "recover")
    structure = structure_of(load_config(bench.recipe(tmp_path).model))
    for row in search:  # the same units as those that the kept ratio was counted from
        gone = sum(
            (layer.units[axis] - row[f"widths_{axis}"][index]) * layer.unit_params[axis]
            for index, layer in enumerate(structure.layers)
            for axis in (KV_GROUP, FFN)
        )
        assert 1 - gone / structure.total_params == pytest.approx(row["kept"], abs=1e-6)
    units = 3 * (2 + 96)
    left = sum(map(sum, (search[-1]["widths_kv_group"], search[-1]["widths_ffn"])))
    assert round(sum(row["closed"] - row["reopened"] for row in search) * units) == units - left > 0

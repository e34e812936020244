"""The scripts that make published figures: rows are flat, joined by seed, and a failed run is told."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def summary(ppl: float, method: str = "atp") -> dict[str, Any]:
    return {
        "method": method,
        "keep": 0.6 if method == "atp" else 1.0,
        "of": "total",
        "base": {"ppl": 40.0, "parameters": 100},
        "result": {"ppl": ppl, "ppl_se": 0.5, "parameters": 60, "seconds": 3.0, "block_ratio": 0.5},
        "tokens": {"adapt": 10, "decide": 5},
        "leak": None,
        "reload_difference": 1e-6,
        "plan": "abc",
        "version": "0",
        "torch": "2",
        "machine": "somewhere",
    }


def test_rows_are_joined_to_dense_lora_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    grid = script("grid")
    done = [
        ("atp", 0, summary(20.0)),
        ("atp", 1, summary(22.0)),
        ("dense_lora", 0, summary(10.0, "finetune")),
        ("dense_lora", 1, summary(20.0, "finetune")),
        ("broken", 0, {"failed": "error: no"}),
    ]
    rows = grid.rows_of(done, "tiny", "somewhere")
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    found = {(row["method"], row["seed"]): row for row in rows if row["metric"] == "domain_ppl"}
    assert found["atp", 1]["dense_value"] == 20.0
    assert found["atp", 0]["tokens"] == 15
    assert found["dense_lora", 0]["keep"] == 1.0
    assert [row["value"] for row in rows if row["metric"] == "failed"] == ["error: no"]
    grid.print_table(rows)
    table = capsys.readouterr().out
    assert "| atp | 60 | 21.00 ± 1.41 | 1.550 ± 0.636 | 15 | 0, 1 |" in table
    assert "| broken | failed |" in table


def test_the_reference_inside_a_run_is_a_row_of_dense_lora() -> None:
    grid = script("grid")
    dense = {"ppl": 16.0, "ppl_se": 0.4, "parameters": 100, "seconds": 2.0, "tokens": 7, "tuning_tokens": 10}
    with_reference = {**summary(20.0), "dense_lora": dense}
    rows = grid.rows_of([("atp", 3, with_reference), ("aware", 3, summary(21.0))], "tiny", "somewhere")
    found = [row for row in rows if row["method"] == "dense_lora" and row["metric"] == "domain_ppl"]
    assert [(row["value"], row["tokens"], row["keep"], row["dense_value"]) for row in found] == [(16.0, 10, 1.0, 16.0)]
    assert {row["dense_value"] for row in rows if row["metric"] == "domain_ppl"} == {16.0}


def test_only_one_variant_may_bring_a_dense_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, off = script("grid"), "evaluate.dense_lora=false"
    demo = str(ROOT / "recipes" / "demo.yaml")  # which takes it
    one = [("dense_lora", ["method=finetune"]), ("atp", [off])]
    assert grid.references(demo, one) == ["dense_lora"]
    assert grid.references(demo, [("atp", []), ("aware", [off])]) == ["atp"]
    arguments = [demo, "atp:", "aware: lora.semantics=lora_aware", "--rows", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["grid.py", *arguments])
    with pytest.raises(SystemExit):
        grid.main()
    assert "atp, aware each bring a dense LoRA" in capsys.readouterr().err


def test_rows_of_several_calls_make_one_table() -> None:
    grid = script("grid")
    first = grid.rows_of([("atp", 0, {"failed": "no"}), ("atp", 1, summary(22.0))], "tiny", "somewhere")
    second = grid.rows_of([("dense_lora", 1, summary(20.0, "finetune")), ("atp", 0, summary(21.0))], "tiny", "somewhere")
    found = {(row["method"], row["seed"], row["metric"]): row for row in grid.joined(first, second)}
    assert len(found) == 6
    assert found["atp", 1, "domain_ppl"]["dense_value"] == 20.0
    assert found["atp", 0, "domain_ppl"]["dense_value"] is None
    assert ("atp", 0, "failed") not in found


def test_a_finished_run_is_taken_as_it_is_until_its_words_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, calls = script("grid"), []

    def tune(command: list[str], **_: Any) -> Any:
        calls.append(command)
        out = Path(next(word for word in command if word.startswith("out=")).removeprefix("out="))
        (out / "summary.json").write_text(json.dumps(summary(20.0 + len(calls))))
        (out / "plan.json").write_text(json.dumps({"plan": {"kept": [{"kv_group": [0, 2]}, {"kv_group": [1]}]}}))
        return type("Done", (), {"returncode": 0})

    commits = iter(["one", "two", "three"])
    monkeypatch.setattr(grid, "commit", lambda: next(commits))
    monkeypatch.setattr(grid.subprocess, "run", tune)
    done = [grid.run("demo.yaml", grid.Job("atp", [f"search.steps={steps}"], 0, ""), tmp_path, 1) for steps in (3, 3, 4, 3)]
    found = [(summary["result"]["ppl"], summary["commit"]) for _, _, summary in done]
    assert found == [(21.0, "one"), (21.0, "one"), (22.0, "two"), (23.0, "three")]
    assert "--overwrite" in calls[0]
    rows = grid.rows_of(done[:1], "tiny", "somewhere")
    assert {(row["kv_groups"], row["block_ratio"]) for row in rows} == {(3, 0.5)}


def test_published_rows_are_flat_and_whole() -> None:
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))
        assert rows
        for row in rows:
            assert all(not isinstance(value, (dict, list)) for value in row.values())
            if file.stem == "dry-run":
                assert {"model", "machine", "peak_gib", "expected_peak_gib", "search_seconds"} <= set(row)
                continue
            assert {"base", "domain", "method", "seed", "metric", "value"} <= set(row)
            assert row["metric"] != "failed"


def test_a_run_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"stage": "main", "phase": phase, "step": step, "kept": 1.0 - 0.1 * step, "valid_ppl": 30.0 - step}
        for phase in ("search", "recover")
        for step in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "summary.json").write_text(json.dumps(summary(20.0)), encoding="utf-8")
    picture = tmp_path / "run.svg"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(tmp_path), str(picture)])
    script("plot_run").main()
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_a_dry_run_goes_from_random_weights_to_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 6144}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    dry_run, rows = script("dry_run"), tmp_path / "rows.json"
    arguments = ["llama-3-8b", f"model.config={json.dumps(tiny)}", "budget={keep: 0.6, of: block, tolerance: 0.05}"]
    arguments += [
        "data.max_length=64",
        "lora.rank=2",
        "--steps",
        "4",
        "--batch",
        "2",
        "--out",
        str(tmp_path / "runs"),
        "--rows",
        str(rows),
    ]
    for _ in range(2):  # a second run replaces the row of the first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dry_run.py", *arguments])
            dry_run.main()
    (row,) = json.loads(rows.read_text())
    assert row["model"] == "llama-3-8b"
    assert row["recover_tokens_per_second"] == pytest.approx(128 / row["recover_seconds"])
    assert row["search_seconds"] > 0 < row["expected_search_seconds"]
    assert "measured (expected)" in capsys.readouterr().out
    dry_run.print_table([{**row, "peak_gib": 1.0, "expected_peak_gib": 2.0}])
    assert f"| 1.00 (2.00) | {row['search_seconds']:.2f} (" in capsys.readouterr().out

"""Pages of runs that are not as usual: numbers that are none, names of all kinds, one step, many runs, foreign benches."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import bench_of, ruling, write_run
from slimtune.errors import UserError
from slimtune.report.check import check
from slimtune.report.ink import look, shortened
from slimtune.report.page import report
from slimtune.report.quality import telling
from slimtune.report.run import read_run
from slimtune.report.verdict import verdict
from slimtune.report.words import number


def page_of(*runs: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return report(list(runs), runs[0].parent / "page.html").read_text(encoding="utf-8")


def figure(text: str, key: str) -> str:
    found = re.search(rf'<figure id="{key}">.*?</figure>', text, re.DOTALL)
    assert found is not None, key
    return found.group()


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(file.read_text())
    how(found)
    file.write_text(json.dumps(found))


def change_rows(run: Path, how: Callable[[dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        how(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_that_are_none_stand_in_metrics_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = ("adapt_loss", "valid_ppl", "closed", "reopened", "kept", "decide_sampled")
    change_rows(run, lambda row: row.update({name: "nan" for name in names if name in row and row["step"] % 3}))
    change_rows(run, lambda row: row.update({name: "inf" for name in names if name in row and row["step"] % 5 == 0}))
    text = page_of(run)
    assert 'data-mark="loss-0"' in figure(text, "loss")
    assert ">nan</td>" in text
    going = write_run(tmp_path / "going", finished=False)
    change_rows(going, lambda row: row.update(adapt_loss="nan", kept="nan") if "kept" in row else None)
    assert "nan% kept" in page_of(going)


def test_a_model_of_which_a_figure_is_no_number_is_left_out_of_its_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", changes={"pubmedqa.accuracy": float("nan"), "ppl": float("nan")})
    drawn = figure(page_of(run), "dots")
    assert 'data-mark="dots-base"' in drawn
    assert 'data-mark="dots-result"' not in drawn
    alike = write_run(tmp_path / "alike", changes={"pubmedqa.accuracy_low": None, "pubmedqa.accuracy_high": None})
    assert 'data-mark="dots-result"' in figure(page_of(alike), "dots")


def test_names_are_what_they_are(tmp_path: Path) -> None:
    names = ["lr0.0005-keep0.625", "_hidden", "a $x^2$ and $\\frac{1}$", "重み “q” #c00001 <&>"]
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    text = page_of(*runs)
    for key in ("size0", "loss", "kept", "ppl"):
        for name in ("lr0.0005-keep0.625", "_hidden", "a $x^2$ and $\\frac{1}$", "重み “q” #c00001 &lt;&amp;&gt;"):
            assert re.search(rf">\s*{re.escape(name)}</text>", figure(text, key)), (key, name)


def test_long_names_stay_different() -> None:
    names = [f"run-of-a-long-name-{index:02}-with-an-end" for index in range(12)]
    short = shortened(names)
    assert len(set(short)) == 12
    assert all(f"{index:02}" in name and len(name) <= 26 for index, name in enumerate(short))
    assert shortened(["short", "uscode_headings_of_titles, macro-F1"]) == ["short", "uscode_headings_… macro-F1"]


def test_no_two_of_twelve_runs_look_the_same() -> None:
    looks = [look(index, points=True) for index in range(20)]
    assert len({(each["color"], each["marker"]) for each in looks}) == 20
    assert len({(each["color"], str(each["linestyle"])) for each in looks}) == 20


def test_a_run_looks_the_same_in_every_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    change(runs[1] / "summary.json", lambda found: found["result"].pop("pubmedqa.accuracy"))
    change_rows(runs[1], lambda row: row.pop("valid_pubmedqa.accuracy", None))
    text = page_of(*runs)
    for key, mark in (("size0", "size-2"), ("size1", "size-2"), ("task0", "valid-2")):
        drawn = figure(text, key)
        found = re.search(rf'data-mark="{mark}">.*?</g>\s*</g>', drawn, re.DOTALL)
        assert found is not None, key
        assert "var(--s3)" in found.group(), key
    assert 'data-mark="size-1"' not in figure(text, "size1")


def test_a_single_step_is_a_point(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", steps=1, search=0, every=1))
    for key, mark in (("loss", "loss-0"), ("kept", "kept-0"), ("ppl", "valid-0")):
        found = re.search(rf'data-mark="{mark}">.*?</g>\s*</g>', figure(text, key), re.DOTALL)
        assert found is not None
        assert "<use" in found.group(), key


def test_how_the_decision_moves_is_seen_before_there_is_a_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=30, search=60, finished=False)
    assert '<figure id="moving">' not in page_of(run)  # of a run that did not say of how many
    change(run / "stages.json", lambda found: found.update(units={"ffn": [1024] * 12, "kv_group": [8] * 12}))
    assert 'data-mark="moving-ffn"' in figure(page_of(run), "moving")


def test_a_bench_of_the_base_alone_is_not_the_results(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bench=False)
    found = bench_of(1_000_000, 2_000_000)
    (run / "bench.json").write_text(json.dumps(found))
    assert "Speed and memory" not in page_of(run)
    assert "speed not measured" in verdict(read_run(run))


def test_a_bench_against_another_model_than_the_base_names_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bench=False)
    found = bench_of(600_000, 700_000)
    found["models"][1]["name"] = "rival"
    found["rows"] = [{**row, "model": row["model"].replace("base", "rival")} for row in found["rows"]]
    (run / "bench.json").write_text(json.dumps(found))
    text = page_of(run)
    assert "decodes 1.50 times as fast as rival (1.40 to 1.60, batch 1, graph, a test machine)" in text
    assert ">rival</th>" in text
    assert "Speed against another model" in text


def test_a_bench_of_gguf_files_says_what_ran_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bench=False)
    found = bench_of(600_000, 1_000_000)
    rows = [{**row, "how": "llama.cpp"} for row in found["rows"] if row["how"] == "eager"]
    ratios = [{**ratio, "how": "llama.cpp"} for ratio in found["ratios"] if ratio["how"] == "eager"]
    found = {**found, "rows": rows, "ratios": ratios, "runtime": "llama.cpp", "dtype": "as in the file"}
    del found["context"]
    (run / "bench.json").write_text(json.dumps(found))
    text = page_of(run)
    assert "(1.40 to 1.60, batch 1, llama.cpp, a test machine)" in text
    assert "a test machine, llama.cpp, as in the file, prompts of 512 tokens; medians" in text


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "plan.json").write_text('{"plan": ')
    with pytest.raises(UserError, match=r"run/plan\.json' cannot be used: this is not a plan\.json"):
        report([run])


def test_bounds_that_are_missed_by_little_are_told_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    missed = ruling("x", condition="<= 1.7756", value=1.77564, limit=1.77561, holds=False, words={})
    change(run / "summary.json", lambda found: found.update(guard=[missed]))
    text = page_of(run)
    assert "<td>1.77564</td><td>&lt;= 1.7756</td><td>1.77561</td>" in text


def test_huge_numbers_take_no_page_of_digits() -> None:
    assert number("ppl", 1e30) == "1e+30"
    assert number("ppl", 123456.7) == "123,457"


def test_a_figure_that_stands_alone_in_its_task_is_not_left_out() -> None:
    assert telling(["a.accuracy", "a.macro_f1", "b.macro_f1", "w.perplexity"]) == ["a.accuracy", "b.macro_f1", "w.perplexity"]


def test_a_run_that_cuts_nothing_has_its_own_steps_side_by_side(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", method="finetune", train={"steps": 77})
    text = page_of(one, write_run(tmp_path / "two"))
    assert re.search(r'<th scope="row">steps</th><td class="n">77</td><td class="n">240</td>', text)
    assert re.search(r'<th scope="row">keep</th><td class="n"></td><td class="n">0.6</td>', text)


def test_a_finished_run_without_its_plan_still_tells_which_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    digest = json.loads((run / "summary.json").read_text())["plan"]
    (run / "plan.json").unlink()
    assert digest in page_of(run)
    assert f">{digest[:12]}</td>" in page_of(run, write_run(tmp_path / "other", keep=0.5))


def test_the_score_among_the_first_numbers_is_one_that_the_sentence_is_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    cards = re.compile(r"<ul class=\"cards\">.*?</ul>", re.DOTALL)
    assert "pubmedqa, accuracy" in cards.findall(page_of(run))[0]
    change(run / "summary.json", lambda found: found["dense_lora"].update({"pubmedqa.accuracy_low": 0.1}))  # below the baseline
    assert "pubmedqa, accuracy" not in cards.findall(page_of(run))[0]


def test_a_run_that_a_guard_stopped_is_told_as_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, finished=False, alarm={"then": "stop"})
    assert verdict(read_run(run)).startswith("This run is not finished: search step 1, ")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(json.dumps({**json.loads(rows[0]), "breached": ["ppl"]}) + "\n")
    assert re.fullmatch(r"Stopped by a guard \(ppl\) at search step 1, .*% kept, 1 step in all\.", verdict(read_run(run)))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([1], r"is damaged \(\[1\] is no object\)"),
        ({"result": {"ppl": "x"}}, r"is no summary of a run: result\.ppl is 'x'"),
        ({"result": {"ppl": 3.0}, "base": [1]}, r"base is \[1\]"),
        ({"result": {"ppl": 3.0}, "seconds": "long"}, r"seconds is 'long'"),
        ({"result": {"ppl": 3.0}, "guard": [{"guard": "ppl"}]}, r"guard is \{'guard': 'ppl'\}"),
        ({"result": {"ppl": 3.0}, "rows": {"train": "many"}}, r"rows\.train is 'many'"),
    ],
)
def test_a_summary_with_what_no_run_writes_is_named(tmp_path: Path, found: Any, told: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"run/summary\.json' .*{told}.*; the run writes it anew with --resume$"):
        report([run])


@pytest.mark.parametrize("table", ["rows", "models", "ratios"])
def test_what_only_looks_like_a_bench_is_none(tmp_path: Path, table: str) -> None:
    run, good = write_run(tmp_path / "run"), write_run(tmp_path / "good")
    change(run / "bench.json", lambda found: found[table].append({"parameters": 1}))
    assert "speed not measured" in verdict(read_run(run))
    assert "speed.decode_faster" in check(run, good).left_out
    change(run / "bench.json", lambda found: found.update({table: []} if table != "ratios" else {table: 3}))
    assert read_run(run).bench is None


def test_rows_with_what_no_run_writes_are_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = len(read_run(run).rows)
    odd: list[dict[str, Any]] = [{"phase": 3}, {"step": "x"}]
    with (run / "metrics.jsonl").open("ab") as file:
        file.writelines(json.dumps({"stage": "main", "phase": "recover", "step": 1, **each}).encode() + b"\n" for each in odd)
        file.write(b'{"stage": "main", "phase": "\xff", \xfe\n')
    assert len(read_run(run).rows) == whole
    foreign: dict[str, Any] = {"kept": "x", "valid_ppl": "x", "adapt_loss": "y", "closed": "z", "reopened": None}
    foreign |= {"widths_ffn": [1, "x"], "widths_kv_group": 3}
    with (run / "metrics.jsonl").open("a") as file:
        for more in ({}, {"widths_ffn": [1] * 12, "widths_kv_group": ["x"] * 12}):
            file.write(json.dumps({"stage": "main", "phase": "recover", "step": 999, **foreign, **more}) + "\n")
    assert "<h2" in page_of(run)

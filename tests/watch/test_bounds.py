"""Guards by the latest figures."""

from __future__ import annotations

from pathlib import Path

from watched import RECOVERY, SEARCH, Folder, closing, guarded, step


def test_guards_by_the_latest_validation_figures(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run")
    shown = run.rows(*SEARCH[:4]).shown()
    assert "not yet     ppl, to be <= 1.2 x dense_lora" in shown
    assert "at the end  seconds, to be <= 100" in shown
    shown = run.rows(closing(4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.46}), RECOVERY[0]).shown()
    guards = shown[shown.index("Guards") :].splitlines()
    assert guards[0] == "Guards  by the validation figures of search, step 5"
    assert guards[1:4] == [
        "BREACHED    ppl is 25, to be <= 1.2 x dense_lora = 24",  # first
        "holds       rqe.accuracy is 0.46, to be >= 0.9 x dense = 0.45",
        "at the end  seconds, to be <= 100",
    ]


def test_guards_that_begin_after_the_cut_are_not_judged_before(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run", "recover").rows(closing(4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.4}))
    assert "BREACHED" not in run.shown()
    run.rows(*RECOVERY[:4], step("recover", 4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.4}))
    assert run.shown().count("BREACHED") == 2
    assert guarded(tmp_path / "end", "end").rows(closing(4, valid_ppl=25.0)).shown().count("at the end") == 3


def test_a_guard_on_a_task_whose_file_is_not_here_goes_by_what_the_run_said(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run", guard={"mine.cited": ">= 0.5"}, evaluate={"every": 5, "tasks": ["mine.yaml"]}).stages()
    assert "holds       mine.cited, to be >= 0.5" in run.rows(closing(4, valid_ppl=25.0)).shown()
    assert (
        "BREACHED    mine.cited, to be >= 0.5" in run.rows(step("recover", 4, valid_ppl=25.0, breached=["mine.cited"])).shown()
    )

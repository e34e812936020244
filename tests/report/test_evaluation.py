"""The table of ``slimtune evaluate``."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from slimtune.report.evaluation import render


def found(**figure: Any) -> dict[str, Any]:
    accuracy = {"value": 0.61, "low": 0.55, "high": 0.67, "majority": 0.5, **figure}
    perplexity = {"value": 23.456, "low": 21.0, "high": None}
    return {
        "model": "runs/x",
        "parameters": 1234567,
        "dtype": "float32",
        "split": "test",
        "suites": {"mine": ["uscode_headings"], "general": ["wikitext2"]},
        "tasks": {
            "uscode_headings": {
                "rows": 1500,
                "split": "test",
                "rows_empty": 0,
                "prompts_cut": 3,
                "figures": {"accuracy": accuracy},
            },
            "wikitext2": {
                "rows": 9,
                "split": "test",
                "rows_empty": 0,
                "prompts_cut": 0,
                "figures": {"perplexity": {**perplexity, "high": 26.0}},
            },
        },
        "skipped": {},
        "not_protected": None,
        "window": 2048,
        "max_length": None,
        "versions": {"lm_eval": "1", "transformers": "2", "torch": "3"},
        "seed": 7,
        "seconds": 12.0,
        "device": "cpu",
    }


def text(value: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(value))
    return console.export_text()


def test_figures_intervals_and_baselines_fit_80_columns() -> None:
    shown = text(found())
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "uscode_headings accuracy 61.0 55.0 to 67.0 50.0 1,500" in lines
    assert "wikitext2 perplexity ↓ 23.46 21.00 to 26.00 9" in lines
    assert "1,234,567 parameters, fp32, test rows" in lines
    assert "Prompts cut from the left to fit 2,048 tokens, answers included: 3 of" in lines
    assert "fit 1,024 tokens" in text({**found(), "max_length": 1024})
    assert "fit 2,048 tokens" in text({**found(), "max_length": 4096})
    assert "…" not in shown
    assert "Yellow" not in shown


def test_a_figure_no_better_than_the_majority_is_marked() -> None:
    assert "Yellow" in text(found(low=0.49))
    assert "rows alike: none" in text(found(low=None, high=None))
    one = found(low=None, high=None)
    one["tasks"]["uscode_headings"]["rows"] = 1
    assert "one row: none" in text(one)


def test_rouge_has_its_baseline_in_the_same_column() -> None:
    value = found()
    value["tasks"]["uscode_headings"]["figures"] = {"rougeL": {"value": 0.2, "low": 0.18, "high": 0.22, "chance": 0.06}}
    assert "uscode_headings ROUGE-L 20.0 18.0 to 22.0 6.0 1,500" in [
        " ".join(line.split()) for line in text(value).splitlines()
    ]


def test_tasks_that_were_skipped_are_named() -> None:
    shown = " ".join(text({**found(), "skipped": {"rqe": "why", "meqsum": "why"}}).split())
    assert "Skipped, for their rows cannot be read: rqe, meqsum (why: the lines above, or the JSON)." in shown
    assert "Skipped" not in text(found())


def test_tasks_that_a_run_did_not_protect_are_named() -> None:
    shown = " ".join(text({**found(), "not_protected": ["billsum", "rqe"]}).split())
    assert "Their rows were not kept from what this model was tuned on: billsum, rqe." in shown
    assert "were not kept" not in text({**found(), "not_protected": []})


def test_what_was_read_is_said_where_it_is_not_the_split() -> None:
    value = found()
    value["tasks"]["wikitext2"] |= {"split": "given", "source": "mine/a.txt"}
    shown = " ".join(text(value).split())
    assert "1,234,567 parameters, fp32, test rows" in shown
    assert "Rows of a given file, of no split: wikitext2 (mine/a.txt)." in shown
    value["tasks"]["uscode_headings"] |= {"split": "given", "source": "b.jsonl"}
    shown = " ".join(text(value).split())
    assert "fp32, rows of given files" in shown
    assert "uscode_headings (b.jsonl), wikitext2 (mine/a.txt)." in shown
    assert "given file" not in text(found())


def test_rows_without_an_answer_are_told() -> None:
    value = found()
    value["tasks"]["uscode_headings"]["rows_empty"] = 1200
    assert "Rows without an answer, left out: 1,200 of uscode_headings." in " ".join(text(value).split())
    assert "without an answer" not in text(found())


@pytest.mark.parametrize(("high", "poor"), [(14.25, False), (20.0, True)])
def test_a_metric_of_ones_own_is_a_plain_number_and_may_be_better_the_lower(high: float, poor: bool) -> None:
    """It is poor where it may be as high as what answers of other rows get."""
    value = found()
    errors = {"value": 12.5, "low": 11.0, "high": high, "chance": 20.0, "better": "lower"}
    value["tasks"]["uscode_headings"]["figures"] = {"made_up": errors}
    shown = text(value)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"uscode_headings made_up ↓ 12.500 11.000 to {high:.3f} 20.000 1,500" in lines
    assert "of ROUGE and metrics of your own (plain numbers), the reference" in " ".join(shown.split())
    assert ("Yellow: the interval does not lie above the baseline, or below it where lower" in " ".join(shown.split())) is poor

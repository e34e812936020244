"""The tables: means over the seeds that are there, what is missing, and who is ahead."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from comparisons import row, write_comparison
from slimtune.comparison.config import load
from slimtune.comparison.jobs import Part, jobs_of
from slimtune.comparison.rows import Row, joined, packed
from slimtune.comparison.sheet import markdown, render
from slimtune.comparison.table import listing, sheets


def some() -> list[Row]:
    rows = [row("dense_lora", 1.0, seed, 12.0 + seed) for seed in (0, 1)]
    rows += [row("atp", 0.6, seed, 15.0 + 2 * seed) for seed in (0, 1)]
    rows += [row("atp", 0.6, 0, 1_500_000, "parameters"), row("atp", 0.6, 0, 0.75, "rqe.accuracy")]
    return rows


def text(rows: list[Row]) -> str:
    return markdown(sheets(joined([], rows)))


def test_one_row_a_method_and_budget() -> None:
    found = text(some())
    assert "| method | keep | M params | perplexity | retention | M tokens | GPU s | seeds |" in found
    # 12/15 and 13/17: seed by seed, not of the means
    assert "| atp | 0.6 | 1.50 | 16.00 ± 1.41 | 0.782 ± 0.025 | 2.00 | 30 | 0, 1 |" in found
    assert "| dense_lora | all |  | 12.50 ± 0.71 | 1.000 ± 0.000 | 2.00 | 30 | 0, 1 |" in found
    assert "INCOMPLETE" not in found


def test_experts_tell_what_a_token_uses_and_how_evenly_they_are_used() -> None:
    own = [{"least_share": 0.9, "most_share": 1.1, "coverage": 0.8}, {"least_share": 0.7, "most_share": 1.05, "coverage": 0.9}]
    moe = [{**row("tomoe", 0.6, seed, 14.0), "block_ratio": 0.9, "active_ratio": 0.61, **own[seed]} for seed in (0, 1)]
    cut = [{**row("atp", 0.6, seed, 15.0), "block_ratio": 0.6 + 0.01 * seed} for seed in (0, 1)]
    found = text([*some()[:2], *cut, *moe])
    assert "| M params | used of blocks | expert shares | covered | perplexity |" in found
    assert "| atp | 0.6 |  | 60.5% |  |  | 15.00 ± 0.00 |" in found
    assert "| tomoe | 0.6 |  | 61.0% | 0.70 to 1.10 | 85.0% | 14.00 ± 0.00 |" in found
    assert "| dense_lora | all |  |  |  |  | 12.50 ± 0.71 |" in found
    assert "what is stored" in found
    assert "used of blocks" not in text(some())


def test_tasks_have_a_table_for_each_kind_of_metric() -> None:
    rows = [*some(), row("atp", 0.6, 0, 40.0, "wikitext2.perplexity"), row("atp", 0.6, 0, 0.2, "meqsum.rougeL")]
    rows += [row("dense_lora", 1.0, seed, 0.5, "mine.exact") for seed in (0, 1)]
    found = text(rows)
    for kind, metric, line in (
        ("text", "wikitext2.perplexity", "atp | 0.6 | 40.000 (n=1)"),
        ("choices", "rqe.accuracy", "atp | 0.6 | 0.750 (n=1)"),
        ("answers", "meqsum.rougeL", "atp | 0.6 | 0.200 (n=1)"),
        ("exact", "mine.exact", "dense_lora | all | 0.500 ± 0.000"),
    ):
        assert f"tasks, {kind}**\n\n| method | keep | {metric} |\n| --- | --- | --- |\n| {line} |\n\n" in found


def test_a_figure_of_a_task_has_its_interval_the_mean_of_its_seeds_ends() -> None:
    """Beside what lies between seeds: what other test rows would do, which the rows tell."""
    ends = {"low": 0.4721, "high": 0.5564}
    rows = [row("atp", 0.6, 0, 15.0), {**row("atp", 0.6, 0, 0.514, "rqe.accuracy"), **ends, "majority": 0.5}]
    rows += [row("dense_lora", 1.0, seed, 12.0) for seed in (0, 1)]
    rows += [{**row("dense_lora", 1.0, 0, 0.6, "rqe.accuracy"), "low": 0.55, "high": 0.7}]
    rows += [{**row("dense_lora", 1.0, 1, 0.7, "rqe.accuracy"), "low": 0.65, "high": 0.72}]
    found = text(rows)
    assert "| atp | 0.6 | 0.514 [0.472, 0.556] |" in found
    assert "| dense_lora | all | 0.650 ± 0.071 [0.600, 0.710] |" in found
    assert "in brackets behind a figure: its 95% interval over the test rows, the mean of the seeds' ends" in found
    assert "| atp | 0.6 | 0.514 [0.472, 0.556] (n=1) |" in text([*rows, row("atp", 0.6, 1, 15.0)])
    # a mean of two seeds has no interval of one
    rows[-1] |= {"low": None}
    assert "| dense_lora | all | 0.650 ± 0.071 |" in text(rows)
    assert "behind a figure" not in text([it for it in rows if it["method"] != "atp"])


def test_a_perplexity_has_its_interval_over_the_test_windows() -> None:
    """By hand: 1.96 x 0.5 / 10 of a seed's logarithm is a factor of 1.1030, and 1.96 x 0.6 / 12 the same."""
    rows = [{**row("atp", 0.6, 0, 10.0), "se": 0.5}, {**row("atp", 0.6, 1, 12.0), "se": 0.6}]
    rows += [{**row("flap", 0.6, 0, 10.0), "se": 0.5}, {**row("flap", 0.6, 1, 12.0), "se": None}]
    rows += [{**row("taylor", 0.6, seed, 10.0), "se": 0.5} for seed in (0,)]
    found = text(rows)
    assert "| atp | 0.6 |  | 11.00 ± 1.41 [9.97, 12.13] |" in found
    assert "| flap | 0.6 |  | 11.00 ± 1.41 |" in found
    assert "| taylor | 0.6 |  | 10.00 [9.07, 11.03] |" in found
    assert found.count("[9.97") == 1  # not in the means
    assert "in brackets behind a perplexity: its 95% interval over the test windows, the mean of the seeds' ends" in found
    assert "over the test rows" not in found
    assert "over the test windows" not in text(some())


@pytest.mark.parametrize(("value", "error"), [(math.nan, math.nan), (math.inf, math.nan), (math.inf, math.inf), (0.0, 1.0)])
def test_a_perplexity_of_no_use_has_no_interval(value: float, error: float) -> None:
    assert "[" not in text([{**row("atp", 0.6, 0, value), "se": error}])


def test_the_accuracy_of_a_test_source_has_its_baseline_and_interval() -> None:
    rows = [row("atp", 0.6, 0, 15.0), {**row("atp", 0.6, 0, 0.5, "accuracy"), "low": 0.404, "high": 0.596, "majority": 0.4}]
    found = text(rows)
    assert "| perplexity | retention | accuracy [0.400] |" in found
    assert "| 0.500 [0.404, 0.596] |" in found
    assert "in brackets in a head: what answers get that know nothing" in found


def test_task_scores_above_chance_are_held_against_those_of_dense_lora_on_the_same_seed() -> None:
    gains = [row("dense_lora", 1.0, 0, 0.2, "tasks_above_chance"), row("dense_lora", 1.0, 1, -0.1, "tasks_above_chance")]
    gains += [row("atp", 0.6, seed, 0.15, "tasks_above_chance") for seed in (0, 1)]
    found = text([*some(), *gains])
    assert "| method | keep | tasks_above_chance | task retention |" in found
    # seed 1 has nothing above chance to retain
    assert "| atp | 0.6 | 0.150 ± 0.000 | 0.750 (n=1) |" in found
    assert "task retention: that over dense LoRA's" in found
    assert "task retention" not in text(some())


def test_means_over_fewer_seeds_than_the_row_has_say_of_how_many() -> None:
    def seed(number: int, *, dense: bool = True) -> list[Row]:
        chance, ends = {"chance": 0.1}, {"low": 0.2, "high": 0.4}
        found = [row("atp", 0.6, number, 15.0), row("atp", 0.6, number, 0.2, "tasks_above_chance")]
        found += [{**row("atp", 0.6, number, 0.3, "meqsum.rougeL"), **chance, **ends}]
        uncut = [row("dense_lora", 1.0, number, 12.0), row("dense_lora", 1.0, number, 0.2, "tasks_above_chance")]
        uncut += [{**row("dense_lora", 1.0, number, 0.3, "meqsum.rougeL"), **chance, **ends}]
        return [*found, *(uncut if dense else [])]

    whole, part = [*seed(0), *seed(1), *seed(2)], [*seed(0), *seed(1), *seed(2, dense=False)]
    assert "n=" not in text(whole)
    assert "n: how many" not in text(whole)
    found = text(part)
    assert "| 15.00 ± 0.00 | 0.800 ± 0.000 (n=2) |" in found
    assert "| tasks_above_chance | task retention | learned | learned retention |" in found
    assert "| atp | 0.6 | 0.200 ± 0.000 | 1.000 ± 0.000 (n=2) | 0.200 ± 0.000 | 1.000 ± 0.000 (n=2) |" in found
    assert found.count("n: how many seeds a mean is over, where the row has more") == 1  # once for all tables


def test_tasks_that_dense_lora_did_not_learn_are_left_out_of_the_learned() -> None:
    def score(method: str, keep: float, seed: int, metric: str, value: float, low: float) -> Row:
        baseline = {"majority": 0.5} if metric == "rqe.accuracy" else {"chance": 0.1}
        return {**row(method, keep, seed, value, metric), "low": low, "high": 1.0, **baseline}

    scores = [score("dense_lora", 1.0, seed, "rqe.accuracy", 0.6, low) for seed, low in ((0, 0.51), (1, 0.49))]
    scores += [score("dense_lora", 1.0, seed, "meqsum.rougeL", 0.3, 0.2) for seed in (0, 1)]
    scores += [score("atp", 0.6, seed, "rqe.accuracy", 0.7, 0.6) for seed in (0, 1)]
    scores += [score("atp", 0.6, seed, "meqsum.rougeL", value, 0.2) for seed, value in ((0, 0.2), (1, 0.25))]
    means = [row(method, keep, seed, 0.1, "tasks_above_chance") for method, keep in CELLS for seed in (0, 1)]
    found = text([*some(), *scores, *means])
    assert "| tasks_above_chance | task retention | learned | learned retention |" in found
    # of meqsum alone: (0.2 - 0.1) and (0.25 - 0.1), of dense LoRA's 0.2
    assert "| atp | 0.6 | 0.100 ± 0.000 | 1.000 ± 0.000 | 0.125 ± 0.035 | 0.625 ± 0.177 |" in found
    assert "learned: meqsum.rougeL.\n" in found
    assert "learned: tasks_above_chance over those tasks alone" in found
    unlearned = [it for it in scores if it["metric"] == "rqe.accuracy"]
    assert "learned" not in text([*some(), *unlearned, *means])


CELLS = (("dense_lora", 1.0), ("atp", 0.6))


def test_seconds_of_a_cpu_are_not_called_gpu_seconds() -> None:
    assert "| s | seeds |" in text([{**it, "machine": "1 CPU threads (x86)"} for it in some()])


def test_missing_and_failed_seeds_are_named() -> None:
    failed: Row = {**row("flap", 0.6, 1, 0.0), "metric": "failed", "value": "error"}
    found = text([*some(), row("flap", 0.6, 0, 16.0), failed, row("wanda", 0.6, 1, 16.0)])
    assert "| flap | 0.6 |  | 16.00 | 0.750 | 2.00 | 30 | 0; FAILED: 1 |" in found
    assert "1; MISSING: 0 |" in found
    assert "INCOMPLETE: 2 of 8 runs are missing or failed" in found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_left_out_and_told(value: float) -> None:
    rows = [*some(), *(row("flap", 0.6, seed, 16.0) for seed in (0, 1))]
    rows += [row(name, keep, 2, value) for name, keep in (*CELLS, ("flap", 0.6))]
    rows += [row("flap", 0.6, seed, value, "valid_ppl") for seed in (0, 1)]
    rows += [{**row("atp", 0.6, 0, 0.5, "mine.accuracy"), "low": value, "high": value, "majority": value}]
    rows += [{**row("atp", 0.6, 1, 0.5, "mine.accuracy"), "majority": value}]
    found = text(rows)
    assert found.count("| 0, 1; FAILED: 2 |") == 3
    assert "| flap | ≈ +0.00 ± 1.41 (n=2) |" in found
    assert "dense_lora domain_ppl (seeds 2)" in found
    assert "left out, being infinite, nan, or a perplexity not above 0: " in found
    assert "flap 0.6 valid_ppl (seeds 0, 1)" in found
    assert str(value) not in "".join(line for line in found.splitlines() if line.startswith("|"))
    assert "being infinite" not in text(some())


def test_a_huge_figure_is_told_by_its_power_of_ten() -> None:
    assert "| 1e+300 ± 0.00 | 0.000 ± 0.000 |" in text([*some(), *(row("random", 0.6, seed, 1e300) for seed in (0, 1))])


def test_what_was_asked_for_is_missing_until_it_is_there(tmp_path: Path) -> None:
    jobs = jobs_of(load(write_comparison(tmp_path, keep=[0.8, 0.6], seeds=[0, 1, 2])))
    found = markdown(sheets(joined([], some()), jobs))
    assert "| atp | 0.8 |  |  |  |  |  | MISSING: 0, 1, 2 |" in found
    assert "0, 1; MISSING: 2 |" in found
    assert "INCOMPLETE: 5 of 9 runs" in found


def test_what_other_words_made_is_left_out_and_told(tmp_path: Path) -> None:
    jobs = jobs_of(
        load(write_comparison(tmp_path, keep=0.6, methods={"atp": {}, "flap": {}, "dense_lora": {"method": "finetune"}}))
    )
    digests = {job.key[2:]: job.digest for job in jobs}
    rows = [*some(), *(row("flap", 0.6, seed, 16.0) for seed in (0, 1)), *(row("else", 0.6, seed, 16.0) for seed in (0, 1))]
    rows = [{**it, "words": digests.get((it["method"], it["keep"], it["seed"]), "unknown")} for it in rows]
    told = "made by other words of the recipe, not comparable: "
    found = markdown(sheets(rows, jobs))
    assert told not in found
    assert "| else | ≈ +0.00 ± 1.41 |" in found  # not of this comparison
    assert "| flap | ≈ +0.00 ± 1.41 |" in found
    for it in rows:
        if (it["method"], it["seed"]) in (("flap", 0), ("dense_lora", 0), ("dense_lora", 1)):
            it["words"] = "older"
    found = markdown(sheets(rows, jobs))
    assert f"{told}dense_lora (seeds 0, 1), flap 0.6 (seeds 0)." in found
    assert "| flap | 0.6 |  | 16.00 |  | 2.00 | 30 | 1; MISSING: 0 |" in found
    assert "| flap | **16.00*** |" in found
    assert "| flap | -1.00 (n=1) |" in found
    assert "no dense LoRA among the rows" in found
    # others are held against dense LoRA, shown or not
    assert f"{told}dense_lora (seeds 0, 1)." in markdown(sheets(rows, jobs, Part(only=("atp",))))
    assert told not in markdown(sheets(rows))
    del rows[7]["words"]
    assert markdown(sheets(rows, jobs)) == found  # nothing is known of it


def test_the_best_of_each_budget_is_marked() -> None:
    rows = [*some(), *(row("flap", keep, seed, 10.0) for keep in (0.8, 0.6) for seed in (0, 1)), row("atp", 0.8, 0, 9.0)]
    found = text(rows)
    assert "| method | keep 0.8 | keep 0.6 |" in found
    assert "| atp | **9.00\\*** | 16.00 ± 1.41 |".replace("\\", "") in found
    assert "| flap | 10.00 ± 0.00 | **10.00 ± 0.00** |" in found
    assert "nothing cut: dense_lora 12.50 ± 0.71" in found
    assert "not all seeds are there" in found
    kept = found[found.index("mean retention") :]
    assert "| atp | **1.333*** |" in kept
    assert "| flap | 1.250 ± 0.071 | **1.250 ± 0.071** |" in kept
    assert "mean retention" not in text([each for each in rows if each["method"] != "dense_lora"])


def test_a_task_has_its_baseline_in_the_head() -> None:
    rows = [{**row("atp", 0.6, 0, 0.5, "rqe.accuracy"), "majority": 0.4}, row("atp", 0.6, 0, 15.0)]
    assert "| rqe.accuracy [0.400] |" in text(rows)


def test_who_is_ahead_and_by_how_much_on_the_same_seeds() -> None:
    rivals = {"clear": (1.1, 1.2), "close": (0.1, 2.0), "mixed": (-0.5, 1.0), "better": (-1.0, -0.5), "best": (-1.0, -1.1)}
    rows = some() + [row(name, 0.6, seed, 15.0 + 2 * seed + gap[seed]) for name, gap in rivals.items() for seed in (0, 1)]
    rows.append(row("single", 0.6, 1, 18.0))
    found = text(rows)
    assert "| clear | ▲ +1.15 ± 0.07 |" in found
    assert "| close | △ +1.05 ± 1.34 |" in found
    assert "| mixed | ≈ +0.25 ± 1.06 |" in found
    assert "| better | ▽ -0.75 ± 0.35 |" in found
    assert "| best | ▼ -1.05 ± 0.07 |" in found
    assert "| single | +1.00 (n=1) |" in found
    assert "of twenty equal rivals one gets ▲ and another ▼" in found


def test_without_a_rival_on_the_same_seed_there_is_no_table_of_leads() -> None:
    for rows in (
        some(),
        [*some(), row("flap", 0.8, 0, 14.0)],
        [*some(), row("flap", 0.6, 5, 14.0)],
        [row("flap", 0.6, 0, 1.0)],
    ):
        assert "ahead by" not in text(rows)
        assert "mean perplexity" in text(rows)


def test_a_lead_tells_how_far_other_text_would_move_it() -> None:
    """The difference of what a window adds, in perplexity, over two seeds and four windows."""
    ours, theirs = ([1.0, -1.0, 0.5, -0.5], [1.0, -1.0, 0.0, 0.0]), ([1.25, -1.25, 0.5, -0.5], [1.0, -1.0, 0.25, -0.25])

    def told(numbers: list[float], windows: str = "abc") -> dict[str, Any]:
        return {"windows": packed({"windows": windows, "numbers": numbers})}

    rows = [{**row("atp", 0.6, seed, 10.0), **told(ours[seed])} for seed in (0, 1)]
    rows += [{**row("flap", 0.6, seed, 12.0 + seed), **told(theirs[seed])} for seed in (0, 1)]
    rows += [row("wanda", 0.6, seed, 12.0) for seed in (0, 1)]
    mean = [
        ((12 * a - 10 * b) + (13 * c - 10 * d)) / 2 for a, b, c, d in zip(theirs[0], ours[0], theirs[1], ours[1], strict=True)
    ]
    error = statistics.stdev(mean) / 2
    found = text(rows)
    assert f"| flap | △ +2.50 ± 0.71, text ± {error:.2f} |" in found
    assert "| wanda | ▲ +2.00 ± 0.00 |" in found
    assert "text: standard error of that mean over the test windows" in found
    assert "text: standard error" not in text(some())
    for other in (told([1.0, 2.0]), told(theirs[1], "abd"), {"windows": None}):  # nothing can be paired
        for number in (3, 1):  # of flap, of atp
            changed = [{**it, **other} if index == number else it for index, it in enumerate(rows)]
            assert "| flap | △ +2.50 ± 0.71 |" in text(changed)


def test_domains_have_tables_of_their_own_and_different_programs_are_told() -> None:
    rows = [{**it, "program": "a"} for it in some()] + [{**row("atp", 0.6, 0, 5.0, domain="other"), "program": "a"}]
    found = text(rows)
    assert "**other, tiny: all figures**" in found
    assert "**somewhere, tiny: all figures**" in found
    assert "no dense LoRA among the rows" in found
    assert "versions of the program" not in found
    rows[0]["program"] = "b"
    assert "made by 2 versions of the program" in text(rows)
    rows[0]["machine"] = "B GPU"
    assert "seconds were taken on different machines: B GPU, a GPU" in text(rows)


def test_the_screen_shows_the_same(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=(tmp_path / "screen").open("w"))
    beside = {"rqe.accuracy": {"low": 0.7, "high": 0.8}, "domain_ppl": {"se": 0.5}}
    rows = [{**it, **beside.get(it["metric"], {})} for it in some()]
    console.print(render(sheets(joined([], [*rows, row("a[b]", 0.6, 0, 14.0)]))))
    shown = console.export_text()
    assert "16.00 ± 1.41" in shown
    assert "a[b]" in shown
    assert "  [15.05, 17.01]" in shown
    assert "  [0.700, 0.800]" in shown  # below its figure, so that many tasks fit
    assert "perplexity" in shown  # not cut off
    assert "rqe  \n" in shown  # a task's name and its metric one above the other
    assert "▸ 14.00*" in shown
    console.file.close()


def test_a_part_is_shown_and_held_against_the_same(tmp_path: Path) -> None:
    rows = [*some(), row("dense_lora", 1.0, 1, 0.5, "mine.exact"), *(row("flap", 0.6, seed, 16.0) for seed in (0, 1))]
    rows += [{**row("flap", 0.8, 0, 14.0), "machine": "B GPU"}, row("dense_lora", 1.0, 0, 11.0, domain="other")]

    def shown(part: Part) -> str:
        return markdown(sheets(joined([], rows), part=part))

    found = shown(Part(only=("atp",)))
    assert "| atp | 0.6 | 1.50 | 16.00 ± 1.41 | 0.782 ± 0.025 | 2.00 | 30 | 0, 1 |" in found
    for hidden in ("| dense_lora", "flap", "keep 0.8", "B GPU", "mine.exact", "other, tiny", "no dense LoRA", "nothing cut"):
        assert hidden not in found
    found = shown(Part(keep=(0.6,), seeds=(1,)))
    assert "| atp | 0.6 |  | 17.00 | 0.765 | 2.00 | 30 | 1 |" in found
    assert "| dense_lora | all |  | 13.00 | 1.000 | 2.00 | 30 | 1 |" in found
    assert "| flap | 0.8 |" not in found
    assert "| flap | -1.00 |" in found
    # what is missing is missing in a part as well
    assert "| flap | 0.8 |  | 14.00 | 0.857 | 2.00 | 30 | 0; MISSING: 1 |" in shown(Part(only=("flap",)))
    jobs = jobs_of(load(write_comparison(tmp_path, seeds=[0, 1, 2])))
    assert "MISSING: 2 |" in markdown(sheets(joined([], rows), jobs, Part(only=("atp",), keep=(0.6,), seeds=(0, 2))))
    assert "FAILED: 0 |" in markdown(sheets([{**row("atp", 0.6, 0, 0.0), "metric": "failed", "value": "error"}]))


def test_a_listing_tells_what_would_run(tmp_path: Path) -> None:
    jobs = jobs_of(load(write_comparison(tmp_path)))
    found = markdown([listing(jobs, jobs[:1])])
    assert "| atp | 0.8 | 10 | 52 | 26,624 | 1 | 0 |" in found
    assert "| dense_lora | all | 13 | 52 | 26,624 | 0, 1 |  |" in found
    assert "5 of 6 runs to make, 133,120 tokens at most" in found

"""The page of a run, or of several: what stands on it, how big it is, how long it takes, and what it must not say."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bases import Bench
from runs import ruling, write_run
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.report.page import report
from slimtune.report.run import read_run, read_runs
from slimtune.report.verdict import verdict


class _Page(HTMLParser):
    """Tables by caption, ids, and every address on the page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._caption = self._cell = False
        self._rows: list[list[str]] = []
        self._name = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[name] for name in ("src", "href", "xlink:href", "action", "srcset") if name in found]
        if tag == "table":
            self._rows, self._name = [], ""
        if tag == "tr":
            self._rows.append([])
        self._caption = tag == "caption"
        if tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table" and self._name:
            self.tables[self._name] = self._rows
        self._cell = self._cell and tag not in ("td", "th")
        self._caption = self._caption and tag != "caption"

    def handle_data(self, data: str) -> None:
        if self._caption:
            self._name += data
        elif self._cell:
            self._rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def page_of(*runs: Path, out: Path) -> tuple[str, _Page]:
    text = report(list(runs), out).read_text(encoding="utf-8")
    return text, _Page(text)


def test_one_run_has_all_its_parts_and_no_address_but_its_own(tmp_path: Path) -> None:
    text, page = page_of(write_run(tmp_path / "mine"), out=tmp_path / "page.html")
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings == ["Shape", "Quality", "Speed", "Training", "How it was made"]
    for name in ("shape", "moving", "changing", "dots", "rates", "loss", "kept", "ppl", "task0", "task1"):
        assert name in page.ids
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "<script" not in text
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http://www.w3.org/2000/svg", "")
    assert len(page.ids) == len(set(page.ids))


def test_tables_hold_the_figures_of_the_summary(tmp_path: Path) -> None:
    _, page = page_of(write_run(tmp_path / "mine"), out=tmp_path / "page.html")
    tasks = page.tables["Tasks, before and after"]
    assert tasks[0] == ["task", "figure", "better", "base (95%)", "dense LoRA (95%)", "result (95%)", "baseline", "rows"]
    cells = ["40.0% (37.0% to 43.0%)", "70.0% (67.0% to 73.0%)", "68.0% (65.0% to 71.0%)", "50.0%", "500"]
    assert tasks[1] == ["pubmedqa", "accuracy", "↑", *cells]
    general = page.tables["General ability: what was forgotten"]
    assert general[1][:3] == ["wikitext2", "bits per byte", "↓"]
    assert general[1][-2:] == ["+8.3%", "300"]
    speed = page.tables["Speed and memory"]
    assert speed[1] == ["prefill", "1", "6.67 ms", "10 ms", "1.50 (1.40 to 1.60)", "1.66"]
    assert speed[-1] == ["weights", "", "1.2 MB", "2.0 MB", "", ""]
    made = dict(row for row in page.tables["How it was made"] if len(row) == 2)
    assert made["data, test"] == "bb" * 32
    assert made["Plan (SHA-256)"] == read_run(tmp_path / "mine").plan.digest  # type: ignore[union-attr]
    assert made["versions"] == "slimtune 0.1.0, torch 2.13.0"
    size = {row[0]: row[1:] for row in page.tables["Size, quality, cost"]}
    assert size["perplexity, test"] == ["40.00 ± 0.20", "15.00 ± 0.20", "16.00 ± 0.20"]


def test_the_verdict_by_hand(tmp_path: Path) -> None:
    told = verdict(read_run(write_run(tmp_path / "mine")))
    assert told == (
        "40.0% smaller (600,000 of 1.0 M parameters); "
        "decodes 1.50 times as fast (1.40 to 1.60, batch 1, graph, a test machine); "
        "perplexity 16.00 for dense LoRA's 15.00, keeps 97% of dense LoRA's accuracy on pubmedqa; "
        "general text, bits per byte against its base: +8.3% on wikitext2."
    )
    unmeasured = verdict(read_run(write_run(tmp_path / "other", bench=False)))
    assert "speed not measured (slimtune bench)" in unmeasured
    going = verdict(read_run(write_run(tmp_path / "going", steps=100, finished=False)))
    assert going == "This run is not finished: recover step 40, 60.0% kept, 100 steps in all."


def test_the_page_of_a_run_that_goes_on_and_of_one_without_a_step(tmp_path: Path) -> None:
    text, page = page_of(write_run(tmp_path / "going", steps=100, finished=False), out=tmp_path / "going.html")
    assert "This run is not finished: recover step 40" in text
    assert {"loss", "kept", "ppl"} <= set(page.ids)
    assert "shape" not in page.ids
    text, page = page_of(write_run(tmp_path / "none", steps=0, finished=False), out=tmp_path / "none.html")
    assert "has no step yet" in text
    assert "loss" not in page.ids


def test_what_is_worth_a_caution_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", changes={"ppl": 50.0})
    summary = json.loads((run / "summary.json").read_text())
    broken = ruling(condition="<= dense", value=50.0, limit=40.0, holds=False, words={})
    (run / "summary.json").write_text(json.dumps({**summary, "guard": [broken]}))
    text, page = page_of(run, out=tmp_path / "page.html")
    cautions = re.findall(r'class="caution"><b>Caution:</b> ([^<]*)<', text)
    assert cautions[0].startswith("perplexity is above the base&#39;s, 50.00 for 40.00")
    assert cautions[1] == "out of the bounds of guard: ppl"
    assert page.tables["Guards"][1] == ["ppl", "ppl", "50", "<= dense", "40", "BREACHED"]


def test_the_command_repeats_the_run_and_names_hold_no_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a <b>run</b> & more")
    text, _ = page_of(run, out=tmp_path / "page.html")
    assert "a &lt;b&gt;run&lt;/b&gt; &amp; more" in text
    assert "<b>run</b>" not in text
    out = str(run)
    assert f"cd /home/me/work\nslimtune tune '{out}/recipe.yaml' 'out={out}-again'" in _unescaped(text)


def _unescaped(text: str) -> str:
    from html import unescape

    return unescape(text)


def test_no_secret_of_an_alarm_is_on_the_page(tmp_path: Path) -> None:
    alarm = {"webhook": "https://user:pw@hooks.example.org/T0/s3cret?key=abc", "command": ["notify", "--token", "s3cret"]}
    text, _ = page_of(write_run(tmp_path / "mine", alarm=alarm), out=tmp_path / "page.html")
    assert "https://hooks.example.org/..." in text
    for secret in ("s3cret", "pw@", "abc", "--token"):
        assert secret not in text
    text, _ = page_of(write_run(tmp_path / "other", alarm={"webhook": "${HOOK}"}), out=tmp_path / "page.html")
    assert re.search(r"webhook: \$\{HOOK\}\n", text)
    part = {
        "alarm": {"webhook": "${HOST}/T0/s3cret"},
        "data": {"train": [{"path": "https://me:s3cret@example.org/rows.jsonl"}]},
    }
    text, _ = page_of(write_run(tmp_path / "part", **part), out=tmp_path / "page.html")
    assert "webhook: ${HOST}/..." in text
    assert "path: https://...@example.org/rows.jsonl" in text
    assert "s3cret" not in text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, keep=keep, seed=seed) for name, keep, seed in (("a", 0.6, 0), ("b", 0.6, 1), ("c", 0.8, 2))
    ]
    text, page = page_of(*runs, out=tmp_path / "page.html")
    for name in ("size0", "shapes", "shape2", "agreement", "plan1", "loss", "kept", "ppl"):
        assert name in page.ids
    beside = {row[0]: row[1:] for row in page.tables["Side by side"]}
    assert beside[""] == ["a", "b", "c", "base", "dense LoRA"]  # of which all three have the same
    assert beside["parameters"] == ["600,000", "600,000", "800,000", "1,000,000", "1,000,000"]
    assert beside["perplexity, test"] == [*["16.00 ± 0.20"] * 3, "40.00 ± 0.20", "15.00 ± 0.20"]
    assert beside["seed"] == ["0", "1", "2", "", ""]
    for what in ("reads prompts", "first token", "decodes"):
        assert beside[f"{what}, times as fast as its base"] == [*["1.50 (1.40 to 1.60)"] * 3, "", ""]
    assert "guards" not in beside
    one, two = (read_run(run).plan for run in runs[:2])
    assert one is not None
    assert two is not None
    layer = page.tables["a / b"][1]
    mine, theirs = set(one.kept[0]["ffn"]), set(two.kept[0]["ffn"])
    assert layer[:3] == ["0", f"{len(mine)} / {len(theirs)}", f"{len(mine - theirs)} / {len(theirs - mine)}"]
    assert "Test data differ" not in text


def test_what_runs_were_cut_from_and_how_guards_stand_is_beside_them(tmp_path: Path) -> None:
    one, two, three = (write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two", "three")))
    for run, holds in ((one, [False, True]), (two, [True, True])):
        found = json.loads((run / "summary.json").read_text())
        found["guard"] = [ruling(name, holds=each) for name, each in zip("xy", holds, strict=True)]
        found |= {"base": {**found["base"], "ppl": 41.0}, "weights": "ee" * 32} if run == two else {}
        found["dense_lora"] = found["dense_lora"] if run == one else None
        (run / "summary.json").write_text(json.dumps(found))
    _, page = page_of(one, two, three, out=tmp_path / "page.html")
    beside = {row[0]: row[1:] for row in page.tables["Side by side"]}
    assert beside[""] == ["one", "two", "three", "base of one", "base of two", "dense LoRA"]
    assert beside["perplexity, test"][3:] == ["40.00 ± 0.20", "41.00 ± 0.20", "15.00 ± 0.20"]
    assert beside["guards"] == ["out: x", "all hold", "", "", "", ""]


def test_a_run_without_dense_lora_is_held_to_that_of_a_run_of_the_same_base_and_rows(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    found = json.loads((two / "summary.json").read_text())
    del found["dense_lora"]
    (two / "summary.json").write_text(json.dumps(found))
    text, _ = page_of(one, two, out=tmp_path / "page.html")
    assert "perplexity 16.00 for dense LoRA&#39;s (one) 15.00, keeps 97% of dense LoRA&#39;s (one) accuracy on pubmedqa" in text
    assert (
        "perplexity 16.00 for the untuned base&#39;s 40.00, on none of 1 tasks did"
        in page_of(two, out=tmp_path / "page.html")[0]
    )
    unlike = ({"data": {"test": "ee" * 32}}, {"weights": "ee" * 32}, {"data": {}}, {"task_rows": {"pubmedqa": "ee" * 32}})
    for change in unlike:  # of what is not known, nothing is said either
        (two / "summary.json").write_text(json.dumps({**found, **change}))
        assert "dense LoRA&#39;s (one)" not in page_of(one, two, out=tmp_path / "page.html")[0]


def test_a_loss_that_went_astray_does_not_flatten_the_others(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "c"))]
    assert "Beyond the picture" not in page_of(*runs, out=tmp_path / "page.html")[0]
    rows = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, **({"adapt_loss": 60.0} if "adapt_loss" in row else {})} for row in rows]
    (runs[2] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Beyond the picture: c, to 60.00." in page_of(*runs, out=tmp_path / "page.html")[0]


def test_runs_of_other_bases_and_data_are_told_apart(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run", layers=6)
    summary = json.loads((two / "summary.json").read_text())
    (two / "summary.json").write_text(json.dumps({**summary, "data": {"test": "ee" * 32}}))
    text, page = page_of(one, two, out=tmp_path / "page.html")
    both = [f"{model} of {run}" for model in ("base", "dense LoRA") for run in ("x/run", "y/run")]
    assert page.tables["Side by side"][0] == ["", "x/run", "y/run", *both]  # each of its own rows
    assert "Test data differ between these runs" in text
    assert "Not held against size, for the test rows of these runs differ: perplexity, test." in text
    assert '<figure id="size0">' in text  # tasks' rows are the same
    assert "Quality against size: perplexity" not in text
    assert "No Plan, or one of another base than that of x/run, and left out: y/run." in text


def test_what_bench_and_evaluate_wrote_into_the_folder_is_part_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", bench=False)
    figure = {"value": 0.61, "low": 0.58, "high": 0.64, "majority": 0.5}
    entry = {"rows": 300, "figures": {"accuracy": figure}}
    found = {"parameters": 600_000, "tasks": {"rqe": entry}, "suites": {"healthcare": ["rqe"]}, "split": "test"}
    (run / "after.json").write_text(json.dumps(found))
    (run / "foreign.json").write_text(json.dumps({**found, "parameters": 7}))  # of a model that is none of this run's
    _, page = page_of(run, out=tmp_path / "page.html")
    assert page.tables["Evaluation: after.json"][1] == ["rqe", "accuracy", "61.0% (58.0% to 64.0%)", "50.0%", "300"]
    assert "Evaluation: foreign.json" not in page.tables


def test_ten_runs_of_several_thousand_evaluations_in_five_seconds_and_five_megabytes(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    runs, rich = ten_runs(tmp_path / "two", 0), ten_runs(tmp_path / "eight", 6)
    # of the processor, for other tests run beside it; of three attempts one will do, for they slow it as well
    attempts = (_seconds(reported(page, runs)) for _ in range(3))
    assert any(seconds < 5 for seconds in attempts)
    assert page.stat().st_size < 5e6
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("valid_ppl", 0) > 0 for row in rows) == 4000
    # with as many figures as the runs in docs/reports have, and eight drawn for two, it takes less than twice as long
    assert any(_seconds(reported(page, rich)) < 2 * _seconds(reported(tmp_path / "two.html", runs)) for _ in range(3))
    assert page.stat().st_size < 5e6
    assert len(json.loads((rich[0] / "metrics.jsonl").read_text().splitlines()[-2])) == 35


def ten_runs(root: Path, tasks: int) -> list[Path]:
    """Of 4,000 steps, each with an evaluation, and of ``tasks`` tasks more than two."""
    sizes = (0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3)
    how = {"steps": 4000, "search": 400, "layers": 32, "every": 1, "tasks": tasks}
    return [write_run(root / f"r{n}", keep=keep, seed=n, **how) for n, keep in enumerate(sizes)]


def reported(page: Path, runs: list[Path]) -> list[str]:
    """The command that writes the page."""
    code = "import sys; from slimtune.report.page import report; report(sys.argv[2:], sys.argv[1])"
    return [sys.executable, "-c", code, str(page), *map(str, runs)]


def _seconds(command: list[str]) -> float:
    """Of the processor, in a process of its own, its imports included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_a_real_run(bench: Bench, tmp_path: Path) -> None:
    summary = tune(bench.recipe(tmp_path / "run", search__steps=6, evaluate__every=2, evaluate__dense_lora=True))
    text, page = page_of(tmp_path / "run", out=tmp_path / "page.html")
    assert {"shape", "moving", "changing", "loss", "kept", "ppl"} <= set(page.ids)
    assert summary["plan"] in text
    size = {row[0]: row[1:] for row in page.tables["Size, quality, cost"]}
    assert size["parameters"][-1] == f"{summary['result']['parameters']:,}"
    widths = re.search(r"MLP width: ([\d,]+) of 288 stay", text)
    assert widths is not None
    assert int(widths.group(1)) == sum(len(layer["ffn"]) for layer in read_run(tmp_path / "run").plan.kept)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent", "does not exist; give the folder of a run"),
        (lambda root: write_run(root / "run") / "plan.json", "is a file; give the folder of a run"),
        (lambda root: root, "holds neither summary.json nor recipe.yaml of a run"),
        (lambda root: _with_model(root), "that is a run's model: give"),
        (lambda root: _damaged(root), r"summary.json' is damaged .* the run writes it anew with --resume"),
    ],
)
def test_what_is_no_run_says_so(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        report([make(tmp_path)])  # type: ignore[operator]


def _with_model(root: Path) -> Path:
    model = write_run(root / "run") / "model"
    model.mkdir()
    return model


def _damaged(root: Path) -> Path:
    run = write_run(root / "run")
    (run / "summary.json").write_text('{"result": ')
    return run


def test_out_and_folders_given_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=80)
    assert report([run]) == run / "report.html"
    with pytest.raises(UserError, match="is a folder; name a file"):
        report([run], tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        report([run], tmp_path / "no" / "such" / "page.html")
    with pytest.raises(UserError, match="is given twice"):
        read_runs([run, run / "."])

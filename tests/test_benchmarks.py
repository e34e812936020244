"""The scripts that make published figures, and the rows that they made."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import slimtune
from bases import make_tokenizer, sentences, write_base, write_rows
from comparisons import stand_in
from slimtune.comparison import launch
from slimtune.comparison.rows import packed
from slimtune.comparison.stats import boards
from slimtune.data.batches import load_splits
from slimtune.evaluate.perplexity import Influences, perplexity
from slimtune.train.objective import forward

ROOT = Path(__file__).parent.parent
OF_OWN_KIND = {
    "dry-run": {"model", "machine", "peak_gib", "expected_peak_gib", "search_seconds"},
    "crosscheck": {"library", "version", "criterion", "axis", "measure", "value"},
    "loading": {"shape", "command", "when", "base_bytes", "own", "with_files", "machine"},
    "speed": {"shape", "model", "what", "how", "batch", "ms", "seconds", "bytes", "flops", "machine"},
    "locking": {"way", "model", "layers", "gib", "lock_seconds", "gpu"},
    "small-updates": {"way", "model", "layers", "rate", "steps", "before", "after", "gpu"},
    "startup": {"command", "seconds", "fastest", "runs", "python", "typer"},
    "compiling": {"way", "model", "layers", "widths", "graphs", "first_seconds", "step_seconds", "gpu"},
    "tomoe-caught": {"recipe", "keep", "layer", "active", "tokens", "routed", "fixed", "fixed_seen", "commit", "machine"},
    "tomoe-fits": {"name", "words", "seed", "ppl", "ppl_se", "valid_ppl", "tokens", "commit", "machine"},
    "tomoe-gguf": {"shape", "keep", "model", "what", "ms", "seconds", "bytes", "flops", "xllamacpp", "machine"},
    "tomoe-probes": {"probe", "name", "method", "keep", "ppl", "parameters", "block_ratio", "commit", "machine"},
    "tomoe-routing": {"run", "class", "dtype", "difference", "ppl_gated", "ppl_written", "machine"}
    | {"same_given", "same", "same_stock"},
    "tomoe-speed": {"shape", "kind", "keep", "implementation", "graphs", "ms", "bytes_read_model", "weight_bytes", "machine"},
    "decode-ways": {"way", "batch", "dense_us", "aligned_us", "by_size", "machine"},
}
"""What rows have that are no figures of models, by file."""


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


def test_a_grid_runs_variants_at_the_budget_of_their_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    rows, off = tmp_path / "rows.json", "evaluate.dense_lora=false"

    def call(*words: str) -> None:
        where = ["--rows", str(rows), "--runs", str(tmp_path / "runs"), "--seeds", "0,1", "--base", "tiny", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["grid.py", *words, *where])
        script("grid").main()

    demo = str(ROOT / "recipes" / "demo.yaml")
    call(demo, f"atp: budget.keep=0.7 {off}", f"broken: lora.rank=13 {off}")
    call(demo, "dense_lora: method=finetune", "--add")
    capsys.readouterr()
    call()
    table = capsys.readouterr().out
    assert "| atp | 70 | 17.00 ± 0.71 | 1.620 ± 0.042 | 15 | 0, 1 |" in table
    assert "| broken | failed |" in table
    found = {(row["method"], row["keep"], row["domain"]) for row in json.loads(rows.read_text())}
    assert found == {("atp", 0.7, "demo"), ("broken", 0.6, "demo"), ("dense_lora", 1.0, "demo")}


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


def test_published_rows_are_flat_and_whole() -> None:
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert files
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))
        assert rows
        for row in rows:
            assert all(not isinstance(value, (dict, list)) for value in row.values())
            if file.stem in OF_OWN_KIND:
                assert OF_OWN_KIND[file.stem] <= set(row)
                continue
            if file.stem in ("cost", "growth", "scale"):
                assert {"model", "gpu"} <= set(row)
                assert file.stem == "growth" or {"seconds", "peak_gib", "tokens", "gpus"} <= set(row)
                assert file.stem != "cost" or "what" in row
                continue
            if file.stem.startswith("lm-eval"):
                assert {"task", "metric", "ours", "plain", "difference", "dtype", "lm_eval"} <= set(row)
                continue
            assert {"base", "domain", "method", "seed", "metric", "value"} <= set(row)
            assert row["metric"] != "failed"


def test_shares_of_small_updates_are_of_the_same_seed_in_fp32_and_have_a_deviation() -> None:
    size = {"model": "m", "layers": 2, "gpu": "g", "steps": 4, "rate": 1e-5, "batch": 1, "window": 8}
    losses = {("fp32", 0): 9.0, ("fp32", 1): 8.0, ("eager", 0): 9.5, ("eager", 1): 10.0}  # from 10: 1 and 2, 0.5 and nothing
    rows = [{**size, "way": way, "seed": seed, "before": 10.0, "after": after} for (way, seed), after in losses.items()]
    whole, eager = script("small_updates").table(rows).splitlines()[2:]
    assert whole.endswith("| 2 | 10.00000 | -1.50000 | 1.00 |")
    assert eager.endswith("| 2 | 10.00000 | -0.25000 | 0.25 ± 0.35 |")
    alone = script("small_updates").table([row for row in rows if row["seed"] == 0]).splitlines()[-1]
    assert alone.endswith("| 1 | 10.00000 | -0.50000 | 0.50 |")


def test_figures_of_plain_lm_eval_are_held_against_ours() -> None:
    figures = {"accuracy": {"value": 0.5}, "perplexity": {"value": 202.0}}
    ours = {
        "tasks": {"pick": {"rows": 3, "figures": figures}},
        "dtype": "float32",
        "device": "cpu",
        "versions": {"lm_eval": "1"},
    }
    rows = script("plain_lm_eval").compared(ours, {"slimtune_pick": {"accuracy,none": 0.52, "perplexity,none": 200.0}})
    assert [(row["metric"], row["plain"], row["lm_eval"]) for row in rows] == [
        ("accuracy", 0.52, "1"),
        ("perplexity", 200.0, "1"),
    ]
    assert [row["difference"] for row in rows] == pytest.approx([0.02, 0.01])


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


def test_a_dry_run_goes_from_random_weights_to_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = tuple((f"document.{number}", sentence * 9) for number, sentence in enumerate(sentences(60)))
    monkeypatch.setattr("slimtune.data.sources.documents", lambda: documents)  # parsing the library takes longer than all else
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


def test_tables_and_figures_of_the_results_are_those_of_their_rows(tmp_path: Path) -> None:
    results, file = script("results"), ROOT / "docs" / "RESULTS.md"
    aside = [ROOT / "docs" / "results" / name for name in ("FIGURES.md", "EARLIER.md")]
    text = file.read_text(encoding="utf-8")
    assert text.count(results.START) > 3
    for document in (file, *aside):
        assert results.START in document.read_text(encoding="utf-8")
        assert results.filled(document.read_text(encoding="utf-8"), document.parent) == document.read_text(encoding="utf-8")
    assert results.pictures(text, file.parent)
    for rows, picture in results.pictures(text, file.parent):
        results.draw(results.read(rows), tmp_path / "again.svg")
        # paths of glyphs differ between versions of matplotlib; what is drawn of the rows does not
        drawn = [re.findall(r'<path d="(M [^"]*)"', shown.read_text()) for shown in (picture, tmp_path / "again.svg")]
        assert drawn[0] == drawn[1] != []


def test_a_document_gets_its_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"base": "tiny", "domain": "words", "keep": 0.6, "metric": "domain_ppl", "tokens": 10, "gpu_seconds": 1.0}
    rows = [
        {**common, "method": method, "seed": seed, "value": value + seed / 3}
        for method, value in (("atp", 10.0), ("wanda", 12.0))
        for seed in (0, 1)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    document = tmp_path / "page.md"
    start, end = "before\n<!-- rows rows.json: leads -->\n", "<!-- /rows -->\n<!-- figure rows.json -->\n![x](x.svg)\n"
    document.write_text(f"{start}old\n{end}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["results.py", str(document)])
    script("results").main()
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"{start}**words, tiny: what atp is ahead by")
    assert text.endswith(end)
    assert "| wanda | ▲ +2.00 ± 0.00 |" in text
    assert text.count("- rival minus atp, the same seed each") == 1
    document.write_text(text + text, encoding="utf-8")
    script("results").main()  # what the signs mean is said once
    text = document.read_text(encoding="utf-8")
    assert (text.count("| wanda | ▲"), text.count("rival minus atp")) == (2, 1)
    assert "old" not in text
    assert "<svg" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    for bad, reason in (
        (f"{start}{start}{end}", "not in pairs"),
        (f"{start}prose", "not in pairs"),
        (f"{start}{end}".replace("leads", "leads meens"), "no part 'meens'"),
        (f"{start}{end}".replace("rows.json:", "none.json:"), "no rows in"),
    ):
        document.write_text(bad, encoding="utf-8")
        with pytest.raises(SystemExit, match=reason):
            script("results").main()
        assert document.read_text(encoding="utf-8") == bad


def test_leads_are_counted_over_all_budgets_and_tested_together() -> None:
    """By hand: t = 3 * 3**0.5 and 0.1 * 3**0.5, and with two degrees of freedom p = 1/2 - t / (2 (2 + t^2)**0.5)."""
    common = {"base": "tiny", "domain": "words", "metric": "domain_ppl", "plan": "a"}
    values = {("atp", 0.6): (10.0, 10.0, 10.0), ("wanda", 0.6): (12.0, 13.0, 14.0)}
    values |= {("atp", 0.5): (20.0, 20.0, 20.0), ("wanda", 0.5): (19.1, 20.1, 21.1)}
    rows = [
        {**common, "method": method, "keep": keep, "seed": seed, "value": value}
        for (method, keep), found in values.items()
        for seed, value in enumerate(found)
    ]
    leads = script("leads")
    assert leads.together(rows) == ["wanda: ahead in 5 of 6 pairs, +15.25%"]
    assert leads.holm(rows) == [
        "stands  p 0.0175, bound 0.0250  words 0.6 wanda",
        "-       p 0.4392, bound 0.0500  words 0.5 wanda",
    ]
    assert leads.again(rows, [{**rows[0], "value": 10.5, "plan": "b"}]) == ["words 0.6 atp seed 0: +0.500, other units"]
    assert leads.moved(rows, [{**rows[0], "value": 10.5}, {**rows[1], "value": 10.1}, rows[2]]) == ["words: +0.300 over 2 runs"]
    better = [{**row, "value": row["value"] - 1 - row["seed"]} for row in rows if row["method"] == "atp"]
    before, after = ([float(line.split()[3]) for line in leads.crossed(rows, other)] for other in (rows, better))
    assert after == pytest.approx([lead + 2 for lead in before])  # seeds 0, 1, 2: 2 in the mean
    assert leads.learned(rows) == []
    assert leads.pooled(rows, rows) == []
    more = [{**row, "seed": row["seed"] + 10, "value": row["value"] + 100 * (row["method"] != "atp")} for row in rows]
    assert len(lines := leads.pooled(rows, more)) == len(leads.crossed(rows, rows))
    assert all(float(line.split()[3]) > 40 and line.endswith(" seeds") for line in lines)
    scores = [
        {**row, "metric": "rqe.accuracy", "value": value + row["seed"] / 100, "low": 0.6, "high": 0.9, "majority": 0.5}
        for row in rows
        for value in [{"atp": 0.7, "wanda": 0.72}[row["method"]]]
    ]
    scores += [{**row, "method": "dense_lora", "keep": 1.0} for row in scores if row["method"] == "atp"]
    assert all(line.endswith("wanda: -0.020, -0.020, -0.020") for line in leads.learned(scores) if "dense" not in line)
    assert any("wanda" in line for line in leads.learned(scores))


def test_perplexities_of_a_part_of_the_text_are_made_of_what_each_window_added(tmp_path: Path) -> None:
    clean, learned = sentences(20), " ".join(sentences(6, seed=9))
    train = write_rows(tmp_path / "train.jsonl", [{"text": f"{text} {learned} {text}"} for text in sentences(30, seed=1)])
    tests = [*clean[:10], f"{' '.join(clean[10:16])} {learned}"]
    test = write_rows(tmp_path / "test.jsonl", [{"text": text} for text in tests])
    base = write_base(tmp_path / "base")
    data = {"train": train, "test": test, "max_length": 64, "ngram_share": 0.9, "on_overlap": "drop"}
    recipe = slimtune.Recipe.model_validate({"model": {"path": base}, "data": data})
    clean_text, tokenizer = script("clean_text"), make_tokenizer()
    shared, tokens = clean_text.parts_of(recipe)
    windows = load_splits(recipe.data, tokenizer, frozenset({"test"})).test
    model, influences = AutoModelForCausalLM.from_pretrained(base), Influences()
    whole = perplexity(model, windows, 512, 4, torch.device("cpu"), influences=influences)
    assert shared.any()
    assert not shared[:2].any()
    row = {"base": "tiny", "domain": "words", "method": "atp", "keep": 0.6, "seed": 0, "metric": "domain_ppl"}
    row |= {"value": whole["ppl"], "windows": packed({"windows": influences.windows, "numbers": influences.numbers})}
    (board,) = boards([row])
    for part in (shared, ~shared):
        batch = windows.collate(part.nonzero()[0].tolist())
        labels = batch["labels"][:, 1:].flatten()
        with torch.no_grad():
            loss = F.cross_entropy(forward(model, batch)[:, :-1].flatten(0, 1), labels, ignore_index=-100)
        assert clean_text.of_part(row, board, tokens, part) == pytest.approx(loss.exp().item(), rel=2e-3)
    text = clean_text.lines(board, shared, tokens)
    assert text[0] == f"words: {(~shared).sum()} of {len(shared)} windows have no run of words in train"
    assert re.match(r"0\.6 atp +\d+\.\d\d +\d+\.\d\d$", text[1])


def test_a_whole_run_is_measured_beside_plain_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = tuple((f"document.{number}", sentence * 9) for number, sentence in enumerate(sentences(60)))
    monkeypatch.setattr("slimtune.data.sources.documents", lambda: documents)
    cost, rows = script("cost"), tmp_path / "rows.json"
    words = ["cost.py", "cpu-size", "model.config.num_hidden_layers=2", "budget={keep: 0.6, of: block, tolerance: 0.05}"]
    words += ["--steps", "12", "--search", "3", "--prior", "1", "--batch", "2", "--window", "64", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "runs"), "--rows", str(rows)])
    cost.main()
    earlier, atp = json.loads(rows.read_text())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--what", "lora"])
    cost.main()
    stayed, lora = json.loads(rows.read_text())
    assert stayed == atp
    assert lora["seconds"] != earlier["seconds"], "in place of the row of before"
    assert (lora["what"], atp["what"]) == ("lora", "atp")
    assert atp["tokens"] == lora["tokens"] == 12 * 2 * 64
    assert (atp["search_steps"], atp["recover_steps"]) == (3, 4)  # two batches before and three decide turns out of twelve
    assert atp["seconds"] > atp["search_seconds"] + atp["recover_seconds"]
    table = capsys.readouterr().out
    assert f"| 0.00 | {atp['seconds']:.1f} | {atp['seconds'] / earlier['seconds']:.2f} |" in table


def test_experts_are_timed_beside_the_dense_model_and_held_to_the_bytes_that_a_step_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed, rows = script("tomoe_speed"), tmp_path / "rows.json"
    layers, hidden, words, base = 2, 256, 128, speed.base_of("cpu-size").to_dict()
    base |= {"num_hidden_layers": layers, "vocab_size": words}
    monkeypatch.setattr(speed, "base_of", lambda _: AutoConfig.for_model(**base))
    monkeypatch.setattr(speed.Rates, "of", lambda *_: speed.Rates(1e9, 1e12))
    call = ["tomoe_speed.py", "cpu-size", "--keeps", "0.5", "--tolerance", "0.02", "--repeats", "1", "--rows", str(rows)]
    call += ["--batches", "2", "16", "--prompt", "4", "--tokens", "32", "--context", "3", "--launched", "1"]
    monkeypatch.setattr(sys, "argv", call)
    speed.main()
    found = json.loads(rows.read_text())
    assert all(not isinstance(value, (dict, list)) for row in found for value in row.values())
    assert len({tuple(row[key] for key in speed.SAME) for row in found}) == len(found)
    decoded = {(row["kind"], row["implementation"], row["batch"]): row for row in found if row["what"] == "decode"}
    every = [("partition", way) for way in ("", *speed.WAYS)] + [("unshared", way) for way in ("", *speed.WAYS)]
    every += [("overlap", way) for way in ("", *speed.WAYS)] + [("uniform", "")]
    copied = {(kind, way, 16) for kind, way in every if way == "batched_mm"}  # of many rows it is not timed
    assert set(decoded) == {(kind, way, batch) for kind, way in every for batch in (2, 16)} - copied
    assert {row["prompt"] for row in found if row["what"] == "prefill"} == {4, 2}
    mine = [row for row in found if row["what"] == "decode" and row["model"] == "other" and "number" in row]
    for row in mine:  # fp32 on the CPU; the head is read, the embedding is not
        assert row["experts_expected"] == pytest.approx(
            row["number"] * (1 - (1 - row["top_k"] / row["number"]) ** row["batch"])
        )
        assert row["top_k"] <= row["experts_read"] <= row["number"]
        channels = row["shared"] + row["experts_expected"] * row["width"]
        parts = row["groups"] * 6 * 32 * hidden + channels * 3 * hidden + (row["number"] + 2) * hidden  # 2 query heads a group
        assert row["bytes_read_model"] == pytest.approx(4 * (layers * parts + hidden + words * hidden), abs=1)
        assert row["active"] == pytest.approx(0.5, abs=0.02)
        dense = next(
            each for each in found if each["model"] == "dense" and all(each[key] == row[key] for key in speed.SAME[:4])
        )
        assert row["faster_by_weights"] == pytest.approx(dense["bytes_read_model"] / row["bytes_read_model"])
    assert "| decode | 2 | batched_mm | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*call, "--kinds", "uniform"])
    speed.main()
    again = json.loads(rows.read_text())
    cuts = [row for row in found if row["kind"] == "uniform"]
    assert again[: -len(cuts)] == [row for row in found if row["kind"] != "uniform"]
    assert [row["model"] for row in again[-len(cuts) :]] == [row["model"] for row in cuts]
    assert again[-len(cuts) :] != cuts, "in place of the rows of before"


def test_experts_are_held_to_the_dense_model_in_its_own_fastest_way() -> None:
    def row(model: str, how: str, ms: float, keep: float = 0.5) -> dict[str, Any]:
        return {"model": model, "what": "decode", "how": how, "batch": 64, "keep": keep, "ms": ms}

    slow_graph = [
        row("dense", "graph", 50.0),
        row("other", "graph", 40.0),
        row("dense", "eager", 20.0),
        row("other", "eager", 60.0),
    ]
    alike = [row("dense", "eager", 30.0, 0.8), row("other", "eager", 15.0, 0.8)]
    found = script("tomoe_speed")._fastest([*slow_graph, *alike], [0.8, 0.5])
    assert found[-1] == "| decode | 64 | 25.00 | 2.00x (eager) | 0.50x (eager and graph) |"


def test_what_routed_and_fixed_channels_catch_by_hand(tmp_path: Path) -> None:
    caught = script("caught")
    energy = torch.tensor([[4.0, 1.0, 0.0], [0.0, 2.0, 3.0]])
    routed = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    parts = caught.caught(energy, routed, torch.tensor([0.0, 0.0, 1.0]), 1)
    assert parts == pytest.approx({"routed": 6 / 7, "fixed": 3 / 7, "fixed_seen": 4 / 7})
    demo, few = ROOT / "recipes" / "tomoe-demo.yaml", ("moe.prior_steps=2", "moe.prior_tokens=1024")
    (own, other) = caught.rows_of(demo, 0.5, str(tmp_path), *few)[:2]
    assert [own["layer"], other["layer"]] == [0, 1]
    assert own["fixed"] <= own["fixed_seen"] <= 1
    assert own["fixed"] < own["routed"] <= 1
    assert caught.table([own, other]).splitlines()[-1].startswith("| tomoe-demo | 0.5 | 352 | ")


def test_growth_is_told_as_a_multiple_of_plain_loras() -> None:
    growth = script("growth")
    args = growth.parser("").parse_args(["cpu-size"])
    args.layers, args.axes = 4, growth.AXES
    asked = list(growth.sizes(args))
    assert [value for axis, value, _ in asked if axis == "layers"] == [2, 4, 8, 16]
    assert {axis for axis, *_ in asked} == {"window", "batch", "layers", "keep"}
    row = {
        "axis": "layers",
        "value": 8.0,
        "lora_seconds": 2.0,
        "decide_seconds": 3.0,
        "adapt_seconds": 2.4,
        "recover_seconds": 1.2,
    }
    assert "| layers | 8 | 2.000 | 1.50x | 1.20x | 0.60x |  |  |" in growth.table([row])


@pytest.mark.parametrize("gpus", [2, 4])
def test_runs_for_gpus_are_words_that_their_scripts_understand(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of benchmarks/on_gpus.sh up to its parser: a slip would show on rented GPUs only."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/$$.words\n")
    python.chmod(0o755)
    environment = os.environ | {"GPUS": str(gpus), "PYTHON": str(python), "EXACT": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "on_gpus.sh"), str(tmp_path / "rows")]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert told[-1] == "all done"
    assert {line.split(" at ")[0].split(" ended with ")[1] for line in told[:-1]} == {"0"}
    commands = [file.read_text().splitlines() for file in tmp_path.glob("*.words")]
    assert len(commands) == len(told) - 1 > 10

    class Understood(Exception):
        pass

    def stopping(parse: Any) -> Any:
        def parsed(self: Any, *words: Any) -> Any:
            raise Understood(parse(self, *words))

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for path, *words in commands:
        monkeypatch.setattr(sys, "argv", [path, *words])
        with pytest.raises(Understood):
            script(Path(path).stem).main()

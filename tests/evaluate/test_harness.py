"""The harness on model objects: the same figures as our own code, and nothing left changed behind."""

from __future__ import annotations

import ast
import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bases import TINY, make_tokenizer, sentences, write_rows
from slimtune.data.sources import Row
from slimtune.errors import UserError
from slimtune.evaluate import harness
from slimtune.evaluate.choices import accuracy
from slimtune.evaluate.harness import evaluate_tasks, flat
from slimtune.evaluate.rows import Prepared, held_out, prepare
from slimtune.evaluate.tasks import find_task

WINDOW = TINY["max_position_embeddings"]


def make_model(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **overrides}))


def choice_rows(count: int = 12) -> list[dict[str, Any]]:
    rows = []
    for number, text in enumerate(sentences(count)):
        choices = [text[:5], "her brother", "at night"]
        prompt = f"{text * (1 + 4 * (number % 2))} Who?"  # every other one is longer than the window
        rows.append({"prompt": prompt, "completion": " " + choices[number % 3], "choices": choices, "label": number % 3})
    return rows


def prepared(folder: Path, metric: str, rows: list[dict[str, Any]], tokenizer: Any) -> Prepared:
    write_rows(folder / f"{metric}-test.jsonl", rows)
    file = folder / f"{metric}.yaml"
    file.write_text(f"metric: {metric}\nsources: [{{path: '{metric}-{{split}}.jsonl'}}]\ntokens: 8\n")
    return prepare(find_task(str(file)), "test", tokenizer, WINDOW)


@pytest.mark.parametrize("bos", [False, True])
def test_accuracy_is_that_of_our_own_code(bos: bool, tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(bos), make_model()
    rows = choice_rows()
    task = prepared(tmp_path, "choice", rows, tokenizer)
    assert task.cut
    own = [Row(**{**row, "choices": tuple(row["choices"])}) for row in rows]
    expected = accuracy(model, tokenizer, own, WINDOW, torch.device("cpu"))
    assert 0 < expected["accuracy"] < 1
    found = evaluate_tasks(model, tokenizer, [task], batch=4)["choice"]
    assert found["accuracy"]["value"] == expected["accuracy"]
    assert found["accuracy"]["majority"] == expected["majority"]
    assert found["accuracy"]["low"] < expected["accuracy"] < found["accuracy"]["high"]


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, texts: list[str], first: int) -> tuple[float, int]:
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[first, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        total, tokens = total + float(logp.sum()), tokens + ids.shape[1] - 1
    return total, tokens


@pytest.mark.parametrize(("bos", "first"), [(False, 0), (True, 2)])
def test_a_text_is_read_behind_one_token_as_in_training(bos: bool, first: int, tmp_path: Path) -> None:
    """Behind the tokenizer's own BOS, once, or behind end-of-text: what precedes a document in a window of training."""
    tokenizer, model = make_tokenizer(bos), make_model(bos_token_id=2 if bos else None).eval()
    texts = sentences(5)
    total, tokens = by_hand(model, tokenizer, texts, first)
    task = prepared(tmp_path, "perplexity", [{"text": text} for text in texts], tokenizer)
    found = evaluate_tasks(model, tokenizer, [task], batch=2)["perplexity"]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"]["value"] == pytest.approx(-total / math.log(2) / size, rel=1e-5)


def test_a_model_in_training_comes_back_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA, a hook that masks, modules in two modes, no padding token, caches off; random numbers go on as without it."""
    monkeypatch.chdir(tmp_path)  # no repository of git
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    calls: list[torch.Size] = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    model.config.use_cache = False
    model.train()
    layer.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    tasks = [prepared(tmp_path, "choice", choice_rows(4), tokenizer), prepared(tmp_path, "rouge", choice_rows(3), tokenizer)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    found = evaluate_tasks(model, tokenizer, tasks, batch=4, seed=5, intervals=False)
    assert calls
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.pad_token is None
    assert model.config.use_cache is False
    assert set(found["rouge"]) == {"rouge1", "rouge2", "rougeL"}
    assert set(found["choice"]["accuracy"]) == {"value", "majority"}
    assert capfd.readouterr() == ("", "")


def test_flat_names() -> None:
    figures = {"rqe": {"accuracy": {"value": 0.5, "low": 0.1, "high": None, "majority": 0.6}}}
    assert flat(figures) == {"rqe.accuracy": 0.5, "rqe.accuracy_low": 0.1, "rqe.accuracy_majority": 0.6}


def test_an_absent_harness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match=r"lm-eval is not installed: pip install 'slimtune\[eval\]'"):
        evaluate_tasks(torch.nn.Linear(1, 1), None, [])


def test_the_harness_is_imported_only_when_tasks_are_run() -> None:
    sources = sorted(Path(harness.__file__).parents[1].rglob("*.py"))
    assert len(sources) > 50
    for source in sources:
        top = [node for node in ast.parse(source.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {getattr(node, "module", None) or node.names[0].name for node in top}
        assert not {name for name in names if name.split(".")[0] in ("lm_eval", "rouge_score", "datasets", "tqdm")}, source


def test_every_kind_of_request_is_counted_to_its_end(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), make_model().eval()
    rows = {"choice": choice_rows(4), "rouge": choice_rows(3), "perplexity": [{"text": text} for text in sentences(5)]}
    tasks = [prepared(tmp_path, kind, items, tokenizer) for kind, items in rows.items()]
    seen: list[tuple[str, int, int]] = []
    evaluate_tasks(model, tokenizer, tasks, batch=2, intervals=False, see=lambda *told: seen.append(told))
    ends = {(what, total): done for what, done, total in seen}
    assert ends == {("likelihoods", 17): 17, ("answers", 3): 3}
    assert all(before[1] < after[1] for before, after in pairwise(seen) if before[::2] == after[::2])


def test_a_run_follows_its_tasks(bench: Any, tmp_path: Path) -> None:
    """Validation rows beside the kept ratio while it runs, test rows of base and result in the summary."""
    from bases import metrics
    from slimtune import pipeline
    from slimtune.report.table import render

    write_rows(tmp_path / "mine-test.jsonl", choice_rows(6))
    write_rows(tmp_path / "mine-valid.jsonl", choice_rows(12)[6:])
    (tmp_path / "mine.yaml").write_text("metric: choice\nsources: [{path: 'mine-{split}.jsonl'}]\n")
    tasks = {"evaluate__tasks": [str(tmp_path / "mine.yaml")], "evaluate__every": 4, "evaluate__rows": 4}
    summary = pipeline.tune(bench.recipe(tmp_path / "run", **tasks))
    rows = [row for row in metrics(tmp_path / "run") if "valid_mine.accuracy" in row]
    assert [row["phase"] for row in rows] == ["search", "recover"]
    assert all(0 <= row["valid_mine.accuracy"] <= 1 and 0.6 < row["kept"] < 1 for row in rows)
    for name in ("base", "result"):
        assert summary[name]["mine.rows"] == 6
        assert summary[name]["mine.accuracy_majority"] == pytest.approx(1 / 3)
        assert summary[name]["mine.accuracy_low"] <= summary[name]["mine.accuracy"] <= summary[name]["mine.accuracy_high"]
    assert "mine, accuracy (baseline 0.333)" in "".join(str(cell) for cell in render(summary).renderables[0].columns[0].cells)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["result"]["mine.rows"] == 6
    task = find_task(str(tmp_path / "mine.yaml"))
    assert written["task_rows"] == {"mine": prepare(task, "test", make_tokenizer(), 128, limit=1).whole}


def test_texts_are_read_in_passes_of_no_more_tokens_than_the_runs_own(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from slimtune import pipeline
    from slimtune.evaluate import figures

    seen: list[tuple[list[str], int]] = []

    def spy(model: Any, tokenizer: Any, tasks: Any, batch: int, **words: Any) -> Any:
        seen.append(([task.name for task in tasks], batch))
        return evaluate_tasks(model, tokenizer, tasks, batch=batch, **words)

    write_rows(tmp_path / "pick-test.jsonl", [{"prompt": "a", "completion": " b", "choices": ["b", "c"], "label": 0}] * 3)
    write_rows(tmp_path / "texts-test.jsonl", [{"text": "a few words and some more " * 20}] * 2)
    for name, metric in (("pick", "choice"), ("texts", "perplexity")):
        (tmp_path / f"{name}.yaml").write_text(f"metric: {metric}\nsources: [{{path: '{name}-{{split}}.jsonl'}}]\n")
    monkeypatch.setattr(figures, "evaluate_tasks", spy)
    names = [str(tmp_path / "pick.yaml"), str(tmp_path / "texts.yaml")]
    summary = pipeline.tune(bench.recipe(tmp_path / "run", evaluate__tasks=names, evaluate__batch=16))
    assert seen[:2] == seen[2:]  # base and result
    (few, small), (many, large) = sorted(seen[:2], key=lambda call: call[1])
    assert (few, many, large) == (["texts"], ["pick"], 16)
    recipe = bench.recipe(tmp_path / "run")
    window = figures.window_of(pipeline.load_config(recipe.model))
    longest = prepare(find_task(names[1]), "test", AutoTokenizer.from_pretrained(bench.base), window).longest
    assert longest <= window
    assert small == 16 * recipe.data.max_length // longest < 16
    assert {"texts.perplexity", "texts.rows", "pick.accuracy", "pick.rows"} < set(summary["result"])


@pytest.mark.parametrize("split", ["test", "valid"])
def test_rows_of_a_task_that_is_followed_are_not_learned(bench: Any, tmp_path: Path, split: str) -> None:
    from slimtune import pipeline

    rows = choice_rows(12)
    write_rows(tmp_path / "mine-test.jsonl", rows[:6])
    write_rows(tmp_path / "mine-valid.jsonl", rows[6:])
    (tmp_path / "mine.yaml").write_text("metric: choice\nsources: [{path: 'mine-{split}.jsonl'}]\n")
    data = bench.recipe(tmp_path / "run").data
    train = [*data.train, {"path": str(tmp_path / f"mine-{split}.jsonl")}]
    keys = {"data": {**data.model_dump(), "train": train}, "evaluate__tasks": [str(tmp_path / "mine.yaml")]}
    with pytest.raises(UserError, match=rf"mine-{split}\.jsonl\S+ \(data\.\w+\) is the same as \S+mine-{split}\.jsonl"):
        pipeline.tune(bench.recipe(tmp_path / "run", **keys))


def test_a_task_without_validation_rows_is_guarded_by_its_test_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", choice_rows(4))
    (tmp_path / "mine.yaml").write_text(f"metric: choice\nsources: [{{path: {tmp_path / 'rows.jsonl'}}}]\n")
    assert [source.path for source in held_out([find_task(str(tmp_path / "mine.yaml"))])] == [str(tmp_path / "rows.jsonl")]

"""ATP from base to export, in every variant of its parts, on a base so small that a run takes a second."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimtune  # noqa: F401  (teaches transformers per-layer models)
from bases import Bench, losses, metrics, plan_of, session_of, stored_shapes
from slimtune import delivery
from slimtune.errors import UserError
from slimtune.evaluate.perplexity import perplexity
from slimtune.methods import atp, decide
from slimtune.models.load import load_config, load_model, load_tokenizer, structure_of
from slimtune.models.surgery import cut
from slimtune.pipeline import tune
from slimtune.prune.gates import mean_over_ranks
from slimtune.prune.solve import solve
from slimtune.structure.plan import count
from slimtune.train import objective, tuner
from slimtune.train.objective import forward

CPU = torch.device("cpu")
AWARE: dict[str, Any] = {"lora__semantics": "lora_aware", "search__steps": 12, "recover__steps": 14, "lora__settle": 1.0}


@torch.no_grad()
def randomise_lora(run: Any) -> None:
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"generator__kind": "direct", "budget": {"keep": 0.5, "of": "block", "ffn_multiple": 1}},
        {"generator__prior": "taylor", "generator__prior_steps": 2, "train__optimizer": "muon"},
        {"generator__noise": "gumbel"},
        {"generator__estimator": "ste"},
        {"generator__noise": "gumbel", "generator__estimator": "ste", "generator__train_embedding": False},
        {"budget": {"keep": 0.75, "ffn_multiple": 1, "layout": "uniform"}},
        {"search__decide_every": 2, "train__micro_batch": 2},
        {"search__update": "joint", "compensate__weights": "none", "train__micro_batch": 2},
        {"search__decide_on": "train", "generator__prior": "taylor", "generator__prior_ranking": "axis"},
        {"model__checkpointing": "non_reentrant"},
        {"lora__semantics": "lora_aware", "model__checkpointing": "reentrant"},
        {"lora__semantics": "lora_aware", "lora__lasso": "loss"},
        {"recover__steps": 0},
        {"search__steps": 0, "generator__prior": "taylor", "generator__prior_steps": 2},
        {"budget": {"keep": 1.0}},
    ],
    ids=str,
)
def test_every_variant_ends_at_the_budget(bench: Bench, tmp_path: Path, overrides: dict[str, Any]) -> None:
    recipe = bench.recipe(tmp_path, **overrides)
    summary = tune(recipe)
    structure, plan = structure_of(load_config(recipe.model)), plan_of(tmp_path)
    counts = count(structure, plan)
    ratio = counts.total_ratio if recipe.budget.of == "total" else counts.block_ratio
    assert abs(ratio - recipe.budget.keep) <= 0.002
    written = sum(math.prod(shape) for shape in stored_shapes(tmp_path).values())
    assert written == summary["result"]["parameters"] == counts.total
    assert plan.is_uniform or recipe.budget.layout != "uniform"
    assert (summary["leak"] is None) == (recipe.lora.semantics == "hard")
    steps = recipe.search.steps + recipe.recover.steps
    assert len(losses(tmp_path)) == steps
    turns = math.ceil(recipe.search.steps / recipe.search.decide_every) if recipe.search.update == "alternating" else 0
    assert len(losses(tmp_path, "decide_loss")) == turns
    assert steps == 0 or math.isfinite(summary["result"]["ppl"])


def test_a_longer_run_learns(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(
        tmp_path, search__steps=12, recover__steps=40, lora__rank=16, train__lr=1e-2, evaluate__dense_lora=True
    )
    summary = tune(recipe)
    assert summary["result"]["ppl"] < 0.5 * summary["base"]["ppl"]
    assert summary["dense_lora"]["ppl"] < summary["result"]["ppl"]


def test_tokens_are_counted_without_padding(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path, generator__prior="taylor", generator__prior_steps=3, search__decide_every=2)
    # one long window and three short ones, so a batch of four is mostly padding
    rows = [{"prompt": "who?", "completion": " " + "me " * n} for n in (12, 3, 2, 1)]
    texts = [json.dumps({**row, "prompt": f"{row['prompt']} {number}"}) for number in range(25) for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(texts), encoding="utf-8")
    data = recipe.data.model_dump() | {"train": str(file), "packing": False}
    summary = tune(bench.recipe(tmp_path / "run", **recipe.model_dump(exclude={"data", "out"}), data=data))
    session = session_of(bench, tmp_path / "other", data=data)

    def expected(windows: Any, purpose: str, steps: int) -> int:
        batches = session.batches(windows, purpose, 4)
        real = [
            int(windows.offsets[i + 1] - windows.offsets[i])
            for step in range(steps)
            for i in batches.order.indices(step * 4, 4)
        ]
        return sum(real)

    assert summary["tokens"] == {
        "prior": 2 * expected(session.splits.decision, "decision", 3),  # for Taylor, and for the second moments
        "decide": expected(session.splits.decision, "decision", 2),
        "adapt": expected(session.splits.train, "train", 8),
    }


# --- semantics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"search__steps": 8}], ids=str)
def test_enough_settling_closes_the_leak(bench: Bench, tmp_path: Path, overrides: dict[str, Any]) -> None:
    summary = tune(bench.recipe(tmp_path, **{**AWARE, **overrides, "lora__lasso_weight": 3.0}))
    assert summary["leak"] <= 1e-5
    assert [row["phase"] for row in metrics(tmp_path) if "phase" in row].count("settle") == overrides.get("search__steps", 12)
    left = [row["adapt_lasso_left"] for row in metrics(tmp_path) if row.get("phase") == "settle"]
    assert left[-1] <= left[0]
    assert "adapt_lasso_left" not in metrics(tmp_path)[-2]  # recovery: nothing is left to shrink


@pytest.mark.parametrize("lasso", ["proximal", "loss", "none"])
def test_a_leak_is_told(bench: Bench, tmp_path: Path, lasso: str, capsys: pytest.CaptureFixture[str]) -> None:
    aware = {**AWARE, "lora__settle": 0.0, "lora__lasso": lasso, "lora__lasso_weight": 1e-3}
    summary = tune(bench.recipe(tmp_path, **aware))
    assert summary["leak"] > 1e-5
    told = " ".join(capsys.readouterr().err.split())
    assert f"leak {summary['leak']:.1e} is above 1e-05" in told
    assert "lora.settle" in told


def test_settling_cannot_hide_a_lasso_too_weak_to_hold(bench: Bench, tmp_path: Path) -> None:
    summary = tune(bench.recipe(tmp_path, **{**AWARE, "lora__lasso_weight": 1e-6, "train__lr": 2e-2}))
    left = [row["adapt_lasso_left"] for row in metrics(tmp_path) if row.get("phase") == "settle"]
    assert min(left[:-1]) == 0.0
    assert left[-1] > 0.0
    assert summary["leak"] > 1e-5


def test_the_lasso_loss_shrinks_pruned_groups(bench: Bench, tmp_path: Path) -> None:
    aware = {**AWARE, "lora__lasso": "loss"}
    with_lasso = tune(bench.recipe(tmp_path / "a", **aware, lora__lasso_weight=20.0))
    without = tune(bench.recipe(tmp_path / "b", **aware, lora__lasso_weight=0.0))
    assert with_lasso["leak"] < 0.7 * without["leak"]
    penalty = losses(tmp_path / "a", "adapt_penalty")
    assert len(penalty) == 24
    assert penalty[-1] > 0
    assert set(losses(tmp_path / "b", "adapt_penalty")) == {0.0}


def test_hard_masks_and_lora_aware_masks_give_other_losses(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path / "hard"))
    tune(bench.recipe(tmp_path / "aware", lora__semantics="lora_aware", lora__lasso="none", lora__settle=0.0))
    hard, aware = losses(tmp_path / "hard"), losses(tmp_path / "aware")
    assert hard[0] == aware[0]  # B is zero, so LoRA adds nothing yet
    assert hard[1] != aware[1]


# --- distillation ------------------------------------------------------------------------------------------------------


def test_distillation_changes_the_loss_only_with_a_weight(bench: Bench, tmp_path: Path) -> None:
    runs = {
        "plain": {},
        "off": {"distill__weight": 0.0, "distill__temperature": 3.0},
        "search": {"distill__weight": 1.0},
        "recover": {"distill__weight": 1.0, "distill__recover": True},
        "warm": {"distill__weight": 1.0, "distill__temperature": 3.0},
    }
    for name, overrides in runs.items():
        tune(bench.recipe(tmp_path / name, **overrides))
    found = {name: losses(tmp_path / name) for name in runs}
    assert found["off"] == found["plain"]
    assert found["search"][0] > found["plain"][0]  # cross-entropy plus a divergence
    assert found["recover"][:4] == found["search"][:4]
    assert found["recover"][4] > found["search"][4] + 1e-3  # the same weights at that step, and a teacher
    assert found["warm"][0] != found["search"][0]


def test_the_teacher_is_the_model_with_open_gates(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, distill__weight=0.5))
    randomise_lora(run)
    batch = run.tuner.batches.at(0)[0]
    run.model.eval()
    run.masks = run.decider.masks(100)
    with torch.no_grad():
        run.bank.open()
        theirs = atp.forward(run.model, batch)
        run.bank.close(run.masks)
        ours = atp.forward(run.model, batch)
    wanted = batch["labels"][:, 1:] != -100
    p, q = (torch.log_softmax(logits[:, :-1][wanted].double(), -1) for logits in (theirs, ours))
    divergence = float((p.exp() * (p - q)).sum())
    truth = float(-q.gather(1, batch["labels"][:, 1:][wanted][:, None]).sum())
    assert divergence > 1
    loss = run._student_loss()(batch)
    assert loss.item() == pytest.approx(truth + 0.5 * divergence, rel=1e-5)
    run.model.zero_grad()
    loss.backward()
    assert run.bank.consumer(0, "ffn") is not None  # gates are closed again for what follows


# --- turns -------------------------------------------------------------------------------------------------------------


def test_every_module_is_in_train_mode_in_every_turn(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = atp._Atp(session_of(bench, tmp_path)), list[bool]()
    real = objective.loss_sum

    def loss_sum(*args: Any, **rest: Any) -> torch.Tensor:
        seen.append(all(each.training for each in run.model.modules()))
        return real(*args, **rest)

    for module in (decide, tuner):  # activations are recomputed in train mode alone
        monkeypatch.setattr(module, "loss_sum", loss_sum)
    run.tuner.update(0, run.tuner.loss)
    run.model.eval()
    run.decider.turn(0)
    run.model.eval()
    run.tuner.update(1, run.tuner.loss)
    assert len(seen) >= 3
    assert all(seen)


def test_a_decide_turn_leaves_lora_alone_and_an_adapt_turn_the_generator(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path))
    both = {"lora": run.model, "generator": run.decider.generator}

    def state() -> dict[str, dict[str, torch.Tensor]]:
        return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in both.items()}

    def changed(before: dict[str, Any], after: dict[str, Any], name: str) -> set[str]:
        return {key for key, value in after[name].items() if not torch.equal(value, before[name][key])}

    for step in range(2):
        before = state()
        run.decider.turn(step)
        between = state()
        assert changed(before, between, "lora") == set()
        assert changed(before, between, "generator")
        assert all(parameter.grad is None for parameter in run.model.parameters())
        run._search_adapt(step)
        after = state()
        assert changed(between, after, "generator") == set()
        assert changed(between, after, "lora")
        assert all("lora_" in key for key in changed(between, after, "lora"))
        assert all(parameter.grad is None for parameter in run.decider.generator.parameters())


def test_decisions_are_learned_on_rows_of_their_own(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path)
    run = atp._Atp(session)
    assert run.decider.batches.windows is session.splits.decision
    assert run.tuner.batches.windows is session.splits.train
    tokenizer = load_tokenizer(session.recipe.model)
    texts = {}
    for name in ("train", "decision", "valid", "test"):
        ids = getattr(session.splits, name).ids.tolist()
        texts[name] = set(tokenizer.decode(ids).split("</s>")[:-1])
    names = list(texts)
    for one in names:
        for other in names[names.index(one) + 1 :]:
            shared = texts[one] & texts[other]
            assert not shared, (one, other)
    assert sum(map(len, texts.values())) >= 290  # less what stands at the borders of splits and windows


# --- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("semantics", "weights"), [("hard", "none"), ("hard", "decide"), ("lora_aware", "none"), ("lora_aware", "adapt")]
)
def test_masked_before_the_cut_is_cut_after_it(bench: Bench, tmp_path: Path, semantics: str, weights: str) -> None:
    """No recovery: what the search left, masked in memory, is what the export computes."""
    keys = {"recover__steps": 0, "search__steps": 8, "lora__semantics": semantics, "compensate__weights": weights}
    session = session_of(bench, tmp_path / "a", **keys)
    run = atp._Atp(session)
    seen: dict[str, float] = {}
    real = run._cut

    def measured_cut() -> None:
        run.bank.close(run.masks, "consumer")
        seen.update(perplexity(run.model, session.splits.test, 32, 32, CPU))
        real()

    run._cut = measured_cut  # type: ignore[method-assign]
    run.run()
    out = tmp_path / "b"
    summary = tune(bench.recipe(out, **keys))
    assert run.plan is not None
    assert summary["plan"] == run.plan.digest
    assert summary["result"]["ppl"] == pytest.approx(seen["ppl"], rel=1e-3)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out / "model", local_files_only=True, dtype=torch.float32)
    assert perplexity(loaded, session.splits.test, 32, 32, CPU)["ppl"] == pytest.approx(seen["ppl"], rel=1e-5)


def test_the_plan_replays_on_the_base(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path)
    tune(recipe)
    structure, plan = structure_of(load_config(recipe.model)), plan_of(tmp_path)
    base: Any = load_model(recipe.model, "cpu", torch.float32)
    cut(base, structure, plan)
    assert {name: tuple(parameter.shape) for name, parameter in base.named_parameters()} == stored_shapes(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for layer, written in config["per_layer_config"].items():  # which leaves out what is as in the whole model
        widths = plan.widths(int(layer))
        assert {key: written.get(key, config[key]) for key in widths} == widths
    assert plan.notes["seed"] == 0


def test_the_plan_is_the_generators_ranking(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, generator__kind="direct", search__steps=8))
    run.run()
    assert run.plan is not None
    logits = run.decider.generator()
    for (layer, axis), values in logits.items():
        kept = run.plan.kept[layer][axis]
        best = torch.sort(values.detach(), descending=True, stable=True).indices[: len(kept)]
        assert sorted(best.tolist()) == list(kept)
    assert solve(logits, run.structure, run.recipe.budget)[0].digest == run.plan.digest


def test_recovery_has_its_own_peak_learning_rate(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path, train__schedule="constant", train__warmup=0.0, recover__lr=5e-4))
    rates = losses(tmp_path, "adapt_lr")
    assert rates == pytest.approx([2e-3] * 4 + [5e-4] * 4)


def test_figures_on_the_way_are_those_of_the_hard_plan(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path, evaluate__every=4))
    rows = [row for row in metrics(tmp_path) if "valid_ppl" in row]
    assert [(row["phase"], row["step"]) for row in rows] == [("search", 3), ("recover", 3)]
    assert all(math.isfinite(row["valid_ppl"]) for row in rows)
    run = atp._Atp(session_of(bench, tmp_path / "inside", lora__semantics="lora_aware"))
    randomise_lora(run)
    whole = run._figures()
    run.masks = run.decider.masks(100)
    run.bank.close(run.masks, "consumer")
    hard = run.session.valid_figures(run.model)
    run._close_gates()  # as an adapt turn leaves them: LoRA of pruned units still speaks
    aware = run.session.valid_figures(run.model)
    assert run._figures() == hard
    assert len({figures["ppl"] for figures in (whole, hard, aware)}) == 3


def test_figures_are_taken_more_often_while_gates_close(bench: Bench, tmp_path: Path) -> None:
    """A curve of quality against the kept ratio."""
    recipe = bench.recipe(tmp_path, evaluate__every=4, evaluate__search_every=1)
    tune(recipe)
    rows = [row for row in metrics(tmp_path) if "valid_ppl" in row]
    places = [(row["phase"], row["step"]) for row in rows]
    assert places == [*(("search", step) for step in range(recipe.search.steps)), ("recover", 3)]
    kept = [row["kept"] for row in rows]
    assert kept[0] > 0.9
    assert kept[-1] < 0.8


def test_no_figures_on_the_way_where_none_are_wanted(bench: Bench, tmp_path: Path) -> None:
    tune(bench.recipe(tmp_path, evaluate__every=0, evaluate__search_every=1))
    assert not any("valid_ppl" in row for row in metrics(tmp_path))


def test_the_lasso_ramps_up_over_the_search(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = atp.penalties.proximal

    def spy(groups: Any, masks: Any, strength: float, share: float) -> Any:
        seen.append(strength)
        return real(groups, masks, strength, share)

    monkeypatch.setattr(atp.penalties, "proximal", spy)
    aware = {**AWARE, "search__steps": 4, "recover__steps": 4, "lora__lasso_weight": 2.0}
    tune(bench.recipe(tmp_path, **aware))
    assert seen == pytest.approx([0.2 * part for part in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lora_is_merged_in_fp32_and_rounded_once(
    dtype: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, torch.Tensor] = {}
    real = delivery.merge_lora

    def spy(model: Any, *rest: Any) -> Any:
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = (side["default"].weight.float() for side in (module.lora_A, module.lora_B))
                expected[f"{name}.weight"] = module.base_layer.weight.float() + module.scaling["default"] * (b @ a)
        return real(model, *rest)

    monkeypatch.setattr(delivery, "merge_lora", spy)
    base = {"path": bench.base, "dtype": "bfloat16"}
    tune(bench.recipe(tmp_path, model=base, export__dtype=dtype, train__lr=2e-2))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert len(expected) == 3 * 7
    for name, weight in expected.items():
        once = weight.to(getattr(torch, dtype)).float()
        assert written[name].dtype == getattr(torch, dtype)
        # as near as what is rounded once; another processor's products differ in the last bit, which decides between equals
        far = (written[name].float() - weight).abs()
        assert (far <= (once - weight).abs() + 1e-6 * weight.abs() + 1e-8).all(), name


def test_another_teacher_teaches_in_every_phase(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tmp_path / "dense"
    tune(bench.recipe(teacher, method="finetune", train__steps=6, train__lr=1e-2))

    def refused(config: Any) -> Any:
        raise UserError("a teacher may be of a family that cannot be cut")

    monkeypatch.setattr("slimtune.methods.teacher.structure_of", refused)
    given = {"distill__weight": 1.0, "distill__teacher": str(teacher / "model")}
    tune(bench.recipe(tmp_path / "taught", **given))
    tune(bench.recipe(tmp_path / "alone"))
    taught, alone = losses(tmp_path / "taught"), losses(tmp_path / "alone")
    assert len(taught) == len(alone)
    assert all(one != other for one, other in zip(taught, alone, strict=True))
    saved = torch.load(tmp_path / "taught" / "checkpoint-main.pt", weights_only=True)
    assert saved["teacher"] is None


def test_a_joint_turn_teaches_the_generator_by_the_gradients_of_a_decide_turn_on_its_rows(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, search__update="joint", compensate__weights="none"))
    randomise_lora(run)
    sampled = run.decider.sample(0)
    _, alone = run.decider._backward_to_gates(run.tuner.batches.at(0), sampled)
    seen: list[Any] = []
    learn = run.decider.learn

    def spy(step: int, drawn: Any, leaves: Any) -> Any:
        seen.extend([drawn, leaves])
        return learn(step, drawn, leaves)

    run.decider.learn = spy
    before = {name: weight.clone() for name, weight in run.decider.generator.state_dict().items()}
    lora = {name: weight.clone() for name, weight in run.model.named_parameters() if "lora_B" in name}
    figures = run._joint(0)
    drawn, leaves = seen
    expected, found = mean_over_ranks(*alone), mean_over_ranks(*leaves)
    for site, mask in sampled.items():
        assert torch.equal(drawn[site], mask)
        torch.testing.assert_close(found[site], expected[site])
    assert any(not torch.equal(before[name], weight) for name, weight in run.decider.generator.state_dict().items())
    assert any(not torch.equal(lora[name], weight) for name, weight in run.model.named_parameters() if name in lora)
    assert figures["generator_target"] == run.decider.target(0)
    assert run.decider.tokens["decide"] == 0


@pytest.mark.parametrize(
    "overrides", [{"distill__weight": 1.0}, {"lora__semantics": "lora_aware"}, {"search__decide_every": 2}]
)
def test_a_joint_update_that_cannot_be_is_an_error(bench: Bench, tmp_path: Path, overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"search\.update=joint needs lora\.semantics=hard, distill\.weight=0"):
        bench.recipe(tmp_path, search__update="joint", **overrides)


def test_a_joint_update_is_no_rivals(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.update=joint is for method=atp"):
        bench.recipe(tmp_path, method="twostage", twostage__scores="generator", search__update="joint")


def test_an_earlier_state_that_teaches_shares_the_frozen_weights_and_outlives_the_cut(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, distill__weight=1.0, distill__recover=True))
    randomise_lora(run)
    run._freeze()
    batch = run.tuner.batches.at(0)[0]
    run.bank.open()
    with torch.no_grad():
        before = forward(run.model.eval(), batch)
    run._cut()
    teacher = run.teacher.model
    assert teacher is not None
    assert torch.equal(run.teacher.logits(batch), before)
    assert not torch.equal(forward(run.model, batch), before)
    frozen = {id(weight) for name, weight in run.model.named_parameters() if "lora_" not in name}
    kept = [name for name, weight in teacher.named_parameters() if id(weight) in frozen]
    assert any("embed_tokens" in name for name in kept)  # what no cut replaces is not held twice
    assert not any(weight.requires_grad for weight in teacher.parameters())


@pytest.mark.parametrize("kind", ["decision", "train"])
def test_decide_turns_read_the_rows_they_are_told_to(bench: Bench, tmp_path: Path, kind: str) -> None:
    run = atp._Atp(session_of(bench, tmp_path, search__decide_on=kind))
    assert run.decider.batches.windows is getattr(run.session.splits, kind)
    assert run.tuner.batches.windows is run.session.splits.train


def test_a_teacher_that_is_not_there_or_speaks_otherwise_is_told_before_anything_is_trained(
    bench: Bench, tmp_path: Path
) -> None:
    given = {"distill__weight": 1.0, "evaluate__dense_lora": True}
    with pytest.raises(UserError, match=r"distill\.teacher='nowhere/at/all' does not exist"):
        tune(bench.recipe(tmp_path / "a", distill__teacher="nowhere/at/all", **given))
    with pytest.raises(UserError, match=r"distill\.teacher='builtin:base-10m' has a vocabulary of 6,144 tokens and the model"):
        tune(bench.recipe(tmp_path / "b", distill__teacher="builtin:base-10m", **given))
    assert not list(tmp_path.glob("*/metrics.jsonl"))


def test_a_teacher_that_would_not_teach_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.teacher=x has no effect without distill\.weight"):
        bench.recipe(tmp_path, distill__teacher="x")

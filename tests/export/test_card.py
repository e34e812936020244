"""The card says what is known, and nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml

import slimtune
from cuts import UNEVEN, cut_model, even
from runs import experts_of
from slimtune.export.card import render, write
from slimtune.export.card_facts import facts, licence_of
from slimtune.export.huggingface import save
from slimtune.recipe import parse

FACTS = {
    "base": "org/base-1b",
    "license": "apache-2.0",
    "method": "atp",
    "budget": "0.6 of total parameters",
    "parameters_before": 1_000_000,
    "parameters_after": 601_234,
    "figures": {"base": {"perplexity": 21.532}, "this model": {"perplexity": 9.1, "accuracy": 0.625}},
    "data": ["builtin:python-docs", "notes | pipes.jsonl"],
    "reload_difference": 1.2e-6,
    "seed": 3,
    "tokens": None,
}


def test_random_weights_are_no_version_of_a_model() -> None:
    drawn = {"path": "builtin:base-10m", "init": "config"}
    known = facts(parse({"model": drawn, "method": "finetune"}), 10, 10, {}, None)
    assert (known["base"], known["license"]) == ("random weights of the shape of builtin:base-10m", None)
    assert facts(parse({"model": {"path": "builtin:base-10m"}}), 10, 6, {}, None)["base"] == "builtin:base-10m"


def plan_of(kept: object) -> object:
    return cut_model("llama", kept)[1]  # type: ignore[arg-type]


def test_every_given_fact_is_shown() -> None:
    text = render(FACTS, plan_of(UNEVEN), {"per_layer_config": {}, "dtype": "bfloat16"})
    for part in (
        "org/base-1b",
        "1,000,000",
        "601,234",
        "| | base | this model |\n",
        "| perplexity | 21.53 | 9.1 |\n",
        "| accuracy |  | 0.625 |\n",
        "builtin:python-docs",
        "1.2e-06",
        "| seed | 3 |",
    ):
        assert part in text
    assert "| 0 | 2 of 4 | 1 of 2 | 40 of 96 |" in text
    assert f"slimtune {slimtune.__version__}" in text
    assert "trust_remote_code=True" in text
    assert "import slimtune" in text
    meta = yaml.safe_load(text.split("---")[1])
    assert (meta["base_model"], meta["license"]) == ("org/base-1b", "apache-2.0")
    assert "tokens" not in text.split("## Figures")[0].replace("tokenizer", "")


def test_nothing_is_invented() -> None:
    text = render({}, plan_of(even([0], 40)), {"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    assert "licence of the base is not known" in text
    meta = yaml.safe_load(text.split("---")[1])
    assert not {"license", "base_model"} & set(meta)
    for absent in ("## Figures", "## Data", "budget", "parameters", "None", "trust_remote_code", "difference"):
        assert absent not in text
    assert "LlamaForCausalLM" in text


def test_figures_of_tasks_have_interval_and_baseline() -> None:
    figures = {"rqe.rows": 302.0, "rqe.accuracy": 0.579, "rqe.accuracy_low": 0.53, "rqe.accuracy_high": 0.636}
    given = {"base": {"ppl": 3.0}, "result": {"ppl": 2.0, **figures, "rqe.accuracy_majority": 0.573, "a_b.rouge1": 0.1}}
    text = render(facts(parse({}), 10, 6, given, None), plan_of(UNEVEN), {})
    assert "| rqe, accuracy (baseline 0.573) |  | 0.579 (0.530 to 0.636) |\n" in text
    assert "| a b, rouge1 |  | 0.100 |\n" in text
    assert "302" not in text


def test_a_model_of_experts_says_what_a_token_uses() -> None:
    config = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "dtype": "float32"}
    known = facts(parse({"method": "tomoe"}), 1_000_000, 950_000, {"result": {"active_parameters": 620_000}}, None)
    text = render(known, experts_of(), config)
    assert "# Model of experts\n\nA tuned mixture-of-experts version of " in text
    for row in (
        "| budget | 0.6 of total, used by a token |\n",
        "| parameters after | 950,000 |\n",
        "| parameters that a token uses | 620,000 |\n",
        "| experts of a layer | 4 |\n| of which a token uses | 2 |\n| channels of an expert | 128 |\n",
        "| channels of the shared expert, which every token uses | 256 |\n",
        "| 0 | 24 of 32 | 6 of 8 | 256 of 1024 | 768 of 1024 | 512 of 1024 |\n",
    ):
        assert row in text
    assert "A stock transformers class (`Glm4MoeForCausalLM`) holds this model" in text
    assert "For `slimtune convert`;" in text
    assert "lists which channels of the base each expert has" in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["slimtune", "moe"]
    text = render({}, experts_of(overlap=True), {**config, "model_type": "mixtral"})
    assert "| experts of a layer | 3 |" in text
    assert "shared expert" not in text
    dense = render(facts(parse({}), 10, 6, {}, None), plan_of(UNEVEN), {})
    assert "For `slimtune tune`;" in dense
    assert "expert" not in dense


def test_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    text = render({"base": str(tmp_path)}, plan_of(UNEVEN), {})
    assert "base_model" not in text


def test_paths_of_the_author_s_machine_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "base").mkdir()
    data = {"train": [str(tmp_path / "rows.jsonl"), "org/rows", "builtin:python-docs"]}
    recipe = parse({"model": {"path": str(tmp_path / "base")}, "data": data})
    known = facts(recipe, 10, 6, {"result": {"ppl": 3.0, "majority": 0.5}, "base": {}}, None)
    assert known["base"] == "base"
    assert known["data"] == ["rows.jsonl", "org/rows", "builtin:python-docs"]
    assert known["figures"] == {"this model": {"perplexity": 3.0, "accuracy of the most frequent answer": 0.5}}
    assert str(tmp_path) not in render(known, plan_of(UNEVEN), {})


def test_the_card_can_be_written_again_with_more_facts(tmp_path: Path) -> None:
    model, plan = cut_model("llama", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {"base": "org/base"})
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" in (folder / "README.md").read_text()
    write(folder, {"base": "org/base", "reload_difference": 2.5e-7}, plan)
    assert "2.5e-07" in (folder / "README.md").read_text()


def test_the_recipe_is_told_without_places(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "notes.jsonl").write_text("{}")
    raw = {"out": str(tmp_path / "run"), "data": {"train": str(tmp_path / "secret" / "notes.jsonl")}, "budget": {"keep": 0.7}}
    known = facts(parse(raw), 10, 6, {"result": {"bytes": 12_200_000}}, None)
    assert known["size"] == "12.2 MB"
    text = render(known, plan_of(UNEVEN), {"dtype": "float32"})
    assert "## Recipe" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["budget"] == {"keep": 0.7}
    assert "notes.jsonl" in text
    assert str(tmp_path) not in text


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    assert licence_of("builtin:base-10m") == "apache-2.0"
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "mit"
    for broken in ("# no metadata\n", "---\n- a\n---\n", "---\nlicense: [a\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert licence_of(str(tmp_path)) is None
    assert licence_of("org/never-fetched") is None

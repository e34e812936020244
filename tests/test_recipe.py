"""Recipes: what is accepted, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slimtune.errors import UserError
from slimtune.recipe import Recipe, load, parse
from slimtune.sections import ModelConfig, SearchConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: some/model}\nbudget: {keep: 0.7}\ndata: {train: rows.jsonl, valid: held.jsonl}\n")
    return path


def test_a_file_with_overrides(file: Path) -> None:
    data = ["data.test=[a.jsonl, b.csv]", "data.valid=null"]
    recipe = load(file, ["budget.keep=0.5", "train.lr=1e-4", *data, "seed=3", "lora.alpha=null"])
    assert (recipe.budget.keep, recipe.train.lr, recipe.seed, recipe.lora.alpha) == (0.5, 1e-4, 3, None)
    assert [source.path for source in recipe.data.train] == ["rows.jsonl"]
    assert [source.path for source in recipe.data.test] == ["a.jsonl", "b.csv"]
    assert recipe.data.valid == ()
    assert load(file).budget.keep == 0.7


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert load(empty) == Recipe()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bugdet": {}}, r"unknown key 'bugdet'. Did you mean 'budget'\?"),
        ({"budget": {"kep": 0.5}}, r"unknown key 'budget.kep'. Did you mean 'budget.keep'\?"),
        (
            {"data": {"train": [{"path": "x", "promt": "y"}]}},
            r"unknown key 'data.train.0.promt'. Did you mean 'data.train.0.prompt'\?",
        ),
        ({"keep": 0.5}, r"unknown key 'keep'. Did you mean 'budget.keep'\?"),
        ({"data": {"train": [{"path": "x", "zzz": 1}]}}, r"unknown key 'data.train.0.zzz'. Known: path, name, split, "),
        ({"zzz": 1}, r"unknown key 'zzz'. Known: method, out, "),
        ({"out": ""}, r"out='' is not valid"),
        ({"model": {"config": {"hidden_size": 8}}}, r"add model.init=config"),
        ({"distill": {"recover": True}}, r"no effect without distill.weight"),
        ({"twostage": {"refit_rounds": 2}}, r"^recipe: twostage.refit_rounds=2 repeats fits of .*; set it true$"),
        ({"budget": {"keep": 0}}, r"budget.keep=0 is not valid: .*greater than 0"),
        ({"budget": {"keep": 1.5}}, r"budget.keep=1.5 is not valid"),
        (
            {"budget": {"ffn_multiple": "foo"}},
            r"recipe: budget\.ffn_multiple='foo' is not valid: Input should be a valid integer.* or .*'auto'$",
        ),
        ({"data": {"train": [{"path": "x", "rows": 0}]}}, r"recipe: data\.train\.0\.rows=0 is not valid"),
        ({"budget": 0.6}, r"budget=0\.6 is not valid: it is a section with keys keep, of, "),
        ({"data": {"train": [["x"]]}}, r"data\.train\.0=\['x'\] is not valid: it is a section with keys path, "),
        ({"track": [{}]}, r"recipe: track\.0=\{\} is not valid"),
        ({"trackers": [{}]}, r"recipe: track\.0=\{\} is not valid"),
        ({"track": [], "trackers": ["wandb"]}, r"^recipe: trackers is the earlier name of track; give one of the two$"),
        ({"train": {"batch": 2.5}}, r"train.batch=2.5 is not valid"),
        ({"lora": {"semantics": "soft"}}, r"lora.semantics='soft' is not valid: .*'hard' or 'lora_aware'"),
        ({"generator": {"heads": 3}}, r"generator.heads=3 must divide generator.width=64"),
        ({"seed": 2**63}, r"seed=9223372036854775808 is not valid: Input should be less than"),
        ({"model": {"init": "config"}}, r"needs model.config or model.path"),
        ({"data": {"train": [{"text": "no path"}]}}, r"data.train.0.path"),
    ],
)
def test_what_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(raw)


@pytest.mark.parametrize(
    ("raw", "steps"),
    [
        ({"method": "tomoe"}, 0),
        ({"method": "tomoe", "search": {"ramp": 0.5}}, 0),
        ({"method": "tomoe", "search": {"steps": 20}}, 20),
        ({"method": "tomoe", "moe": {"prior": "none", "experts": "overlap"}}, 20),
        ({"method": "atp"}, 20),
        ({}, 20),
    ],
)
def test_experts_of_a_split_are_not_searched_for_unless_that_is_asked(raw: dict[str, Any], steps: int) -> None:
    recipe = parse(raw)
    assert recipe.search.steps == Recipe(**raw).search.steps == steps
    assert recipe.search.ramp == raw.get("search", {}).get("ramp", SearchConfig().ramp)


def test_an_earlier_name_of_a_key_is_read(tmp_path: Path) -> None:
    assert parse({"trackers": "wandb"}) == parse({"track": ["wandb"]})
    assert list(Recipe(trackers=["wandb"]).track) == ["wandb"]  # type: ignore[call-arg]
    (tmp_path / "recipe.yaml").write_text("trackers: [wandb]\n")
    assert load(tmp_path / "recipe.yaml").track == ("wandb",)
    assert "trackers" not in load(tmp_path / "recipe.yaml").to_yaml()
    with pytest.raises(UserError, match="trackers is the earlier name of track"):
        load(tmp_path / "recipe.yaml", ["track=[mlflow]"])
    for recipe in (parse({"moe": {"tokens": 60}}), load(tmp_path / "recipe.yaml", ["moe.tokens=60"])):
        assert recipe.moe.prior_tokens == 60
    with pytest.raises(UserError, match=r"^recipe: tokens is the earlier name of prior_tokens; give one of the two$"):
        parse({"moe": {"tokens": 60, "prior_tokens": 60}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.keep", r"'budget.keep' is not of the form section.key=value"),
        ("=1", r"not of the form"),
        ("budget.keep=[", r"not valid YAML"),
        ("seed.x=1", r"'seed' is not a section of the recipe; give seed itself a value"),
        (
            "data.train.rows=5",
            r"'train' is not a section .*; give the whole source, .*path: \.\.\., rows: 5",
        ),
        ("data.train.path=x", r"'train' is not a section .*; give data\.train=x$"),
        ("budget={keep: 0.5, keep: 0.6}", r"key 'keep' stands there twice"),
        ("budget.kepp=0.5", r"Did you mean 'budget.keep'\?"),
    ],
)
def test_what_an_override_cannot_be(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(file, ["seed=1", override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping.*list"),
        ("seed: 1\nmodel: {path: a}\nseed: 2\n", r"key 'seed' stands there twice\s+.*line 3"),
    ],
)
def test_what_a_file_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml' does not exist; give the path"):
        load(tmp_path / "nowhere.yaml")


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_TEST_FOLDER", "/data")
    raw = {"data": {"train": ["${SLIM_TEST_FOLDER}/a.jsonl"]}, "model": {"path": "${SLIM_TEST_FOLDER}"}}
    recipe = parse(raw)
    assert (recipe.data.train[0].path, recipe.model.path) == ("/data/a.jsonl", "/data")
    monkeypatch.delenv("SLIM_TEST_FOLDER")
    with pytest.raises(UserError, match=r"SLIM_TEST_FOLDER is not set; export SLIM_TEST_FOLDER="):
        parse(raw)


def test_a_recipe_made_in_python_keeps_the_promises_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/somewhere")
    data: Any = {"train": [Path("${FOLDER}/rows.jsonl"), {"path": "${FOLDER}/more.jsonl"}]}
    recipe = Recipe(out=Path("runs/x"), data=data, model=ModelConfig(path=Path("${FOLDER}/base")))  # type: ignore[arg-type]
    assert [source.path for source in recipe.data.train] == ["/somewhere/rows.jsonl", "/somewhere/more.jsonl"]
    assert (recipe.out, recipe.model.path) == ("runs/x", "/somewhere/base")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"bugdet": {}}, "unknown key 'bugdet'. Did you mean 'budget'?"),
        ({"budget": {"keep": 2}}, "budget.keep=2 is not valid: Input should be less than or equal to 1"),
        ({"search": {"steps": 0}, "generator": {"prior": "none"}}, "nothing to decide by; set generator.prior=taylor"),
        ({"out": "${NO_SUCH}/x"}, "NO_SUCH is not set"),
    ]
    for keys, message in wrong:
        with pytest.raises(UserError) as caught:
            Recipe(**keys)
        assert message in str(caught.value)


def test_one_override_may_stand_alone(file: Path) -> None:
    assert load(file, "budget.keep=0.5").budget.keep == 0.5


def test_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.budget.keep = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_defaults_are_valid_when_written_out() -> None:
    assert parse(yaml.safe_load(Recipe().to_yaml())) == Recipe()


# --- guards --------------------------------------------------------------------------------------------------------------


def test_guards_from_a_file_and_from_the_command_line(file: Path) -> None:
    file.write_text("guard: {general.bits_per_byte: '<= dense + 0.05', ppl: < 30, healthcare: {rqe: {accuracy: '> 0.5'}}}")
    flat = {"general.bits_per_byte": "<= dense + 0.05", "ppl": "< 30", "healthcare.rqe.accuracy": "> 0.5"}
    assert load(file).guard == flat
    words = ["guard.ppl=>= 0.95 x dense", "guard.general.bits_per_byte=> 2", "guard.speed.decode_ms@8=<= 0.7 x dense"]
    changed = {"ppl": ">= 0.95 x dense", "general.bits_per_byte": "> 2", "speed.decode_ms@8": "<= 0.7 x dense"}
    assert load(file, words).guard == flat | changed
    assert load(file, ["guard.ppl= >=3", "guard.loss='>= 1'", "guard.bytes=≤ 5"]).guard == flat | {
        "ppl": ">=3",
        "loss": ">= 1",
        "bytes": "≤ 5",
    }
    assert load(file, ["guard={ppl: < 3}"]).guard == {"ppl": "< 3"}
    assert load(file, ["guard={}"]).guard == {}
    recipe = load(file, words)
    assert parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"ppl": "0.95 x dense"}, r"^guard\.ppl: '0\.95 x dense' does not begin with <=, >=, < or >; write e\.g\."),
        ({"ppl": 30}, r"^guard\.ppl: '30' does not begin with"),
        ({"ppl": None}, r"^guard\.ppl: '' does not begin with"),
        ({"a": {"b": "> dens"}}, r"^guard\.a\.b: 'dens' in '> dens' is unknown\. Did you mean 'dense'\?"),
        ({"ppl": "<= baseline"}, r"^guard\.ppl: a run does not know 'baseline'; it knows dense \(its base\) and dense_lora"),
        ({"ppl": ">= dense - noise"}, r"^guard\.ppl: a run does not know 'noise'"),
        ({"ppl": ["< 3"]}, r"guard=\['< 3'\] is not valid: Input should be a valid string"),
        ({"ppl": {}}, r"guard=\{\} is not valid"),
        (["ppl < 3"], r"^guard=\['ppl < 3'\] is no mapping of figures to conditions, e\.g\. guard: {ppl: '<= 1\.2 x dense'}"),
    ],
)
def test_what_is_no_guard_says_so(guard: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse({"guard": guard})


@pytest.mark.parametrize("text", ["guard:\n  ppl: >= 0.9 x dense\n", "guard:\n  ppl: > 30\n", "guard: {ppl: >= 3}\n"])
def test_a_condition_without_quotes_is_told_how_to_mend_it(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=r"a condition that begins with > needs quotes: '>= 0.95 x dense'"):
        load(file)
    file.write_text("guard: {ppl: [}\n")
    with pytest.raises(UserError) as caught:
        load(file)
    assert "quotes" not in str(caught.value)


def test_a_bare_condition_inside_an_override_is_told_too(file: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)not valid YAML: .* needs quotes"):
        load(file, ["guard={ppl: >= 3}"])


def test_secrets_of_an_alarm_stay_variables(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    monkeypatch.setenv("HOW", "stop")
    file.write_text(
        "alarm: {webhook: 'https://x/${TOKEN}', command: 'curl -H ${TOKEN} x', then: '${HOW}'}\nout: runs/${TOKEN}\n"
    )
    recipe = load(file)
    assert (recipe.alarm.webhook, recipe.alarm.command) == ("https://x/${TOKEN}", ("curl", "-H", "${TOKEN}", "x"))
    assert (recipe.alarm.then, recipe.out) == ("stop", "runs/hunter2")  # all else is read as ever
    assert parse(yaml.safe_load(recipe.to_yaml())) == recipe
    monkeypatch.delenv("TOKEN")
    assert load(file, ["out=x"]).alarm == recipe.alarm  # asked for when the run begins
    monkeypatch.delenv("HOW")
    with pytest.raises(UserError, match="HOW is not set"):
        load(file, ["out=x"])


def test_an_alarm_that_cannot_be_read(file: Path) -> None:
    for word, message in {
        "alarm.then=halt": "alarm.then='halt' is not valid",
        "alarm.command='a \"b'": "alarm.command='a \"b' is not valid: .*No closing quotation",
        "alarm.timeout=0": "alarm.timeout=0 is not valid: .*greater than 0",
        "alarm.webhok=x": r"unknown key 'alarm.webhok'. Did you mean 'alarm.webhook'\?",
        "speed.batches=[]": "speed.batches=.* is not valid",
        "speed.measure=maybe": "speed.measure='maybe' is not valid",
    }.items():
        with pytest.raises(UserError, match=message):
            load(file, [word])


@given(
    keep=st.floats(0.01, 1.0),
    lr=st.floats(1e-9, 1.0),
    multiple=st.integers(1, 512) | st.just("auto"),
    template=st.text(st.characters(exclude_characters="$", exclude_categories=["Cs"]), max_size=30),
    seed=st.integers(0, 2**31),
)
def test_the_resolved_recipe_reads_back_equal(keep: float, lr: float, multiple: int | str, template: str, seed: int) -> None:
    recipe = parse(
        {
            "seed": seed,
            "budget": {"keep": keep, "ffn_multiple": multiple},
            "train": {"lr": lr},
            "data": {"train": {"path": "x.jsonl", "prompt": template, "completion": "{answer}"}},
        }
    )
    assert parse(yaml.safe_load(recipe.to_yaml())) == recipe

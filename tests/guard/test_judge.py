"""Figures held to bounds: what is told, when, and what follows."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from slimtune.condition import Condition
from slimtune.errors import UserError
from slimtune.guard.judge import Judge
from slimtune.guard.ruling import Ruling, rule
from slimtune.recipe import parse

TASKS = {"tasks": ["rqe", "pubmedqa"], "every": 2, "dense_lora": True}
DENSE = {"dense": {"ppl": 20.0, "rqe.accuracy": 0.8, "pubmedqa.accuracy": 0.5}}


class Heard(Judge):
    """Keeps what the alarm tells."""

    def __init__(self, guard: dict[str, str], alarm: dict[str, Any] | None = None, **evaluate: Any):
        self.lines: list[str] = []
        super().__init__(parse({"guard": guard, "alarm": alarm or {}, "evaluate": TASKS | evaluate}), self.lines.append)
        self.references = DENSE

    def told(self) -> list[str]:
        lines = [line.removeprefix("[yellow]").removesuffix("[/yellow]") for line in self.lines]
        self.lines.clear()
        return lines


def held(text: str, value: float, dense: float = math.nan) -> Ruling:
    return rule("ppl", "ppl", Condition.of(text), {"ppl": value}, {"dense": {"ppl": dense}})


def test_a_ruling_in_words() -> None:
    assert held("<= 1.5 x dense", 33.333, 20.0).told == "ppl is 33.33, to be <= 1.5 x dense = 30"
    assert held("<= 30", 33.333).told == "ppl is 33.33, to be <= 30"
    one = rule("general.bits_per_byte", "wikitext2.bits_per_byte", Condition.of("< 1"), {"wikitext2.bits_per_byte": 1.0}, {})
    assert one.told == "general.bits_per_byte (wikitext2.bits_per_byte) is 1, to be < 1"
    assert rule("healthcare.rqe.accuracy", "rqe.accuracy", Condition.of("> 1"), {}, {}).told.startswith(
        "healthcare.rqe.accuracy has"
    )


@pytest.mark.parametrize(
    ("value", "dense", "told"),
    [
        (0.95, 0.95, "is 0.95, to be < dense = 0.95"),  # when they are the same they may look it
        (0.94999, 0.95, "is 0.94999, to be < dense = 0.95"),
        (6087360.0, 6087361.0, "is 6,087,360, to be < dense = 6,087,361"),
        (17834.4, 17834.2, "is 17834.4, to be < dense = 17834.2"),
        (0.00012346, 20.0, "is 0.0001235, to be < dense = 20"),
        (1e304, 20.0, "is 1e+304, to be < dense = 20"),
    ],
)
def test_numbers_show_that_they_differ(value: float, dense: float, told: str) -> None:
    assert held("< dense", value, dense).told == f"ppl {told}"


@pytest.mark.parametrize(
    ("value", "dense"), [(math.nan, 20.0), (math.inf, 20.0), (5.0, math.nan), (5.0, math.inf), (-math.inf, 20.0)]
)
@pytest.mark.parametrize("sign", ["<=", ">="])
def test_what_is_not_finite_is_not_within_and_is_no_json_number(sign: str, value: float, dense: float) -> None:
    ruling = held(f"{sign} dense", value, dense)
    assert not ruling.holds
    written = json.loads(json.dumps(ruling.to_dict(), allow_nan=False))
    assert Ruling(**written) == ruling
    assert (ruling.value is None) is not math.isfinite(value)
    assert ruling.words == ({"dense": dense} if math.isfinite(dense) else {})
    if ruling.value is None:
        assert ruling.told == f"ppl has no finite value, to be {sign} dense = 20"
    else:
        assert ruling.told == f"ppl is 5, to be {sign} dense"


def test_a_breach_is_told_once_and_so_is_its_end() -> None:
    judge = Heard({"ppl": "<= 1.5 x dense"})
    for ppl in (25.0, 30.0):
        assert judge.at_step({"ppl": ppl}, "search", 1).breached == ()
    assert judge.told() == []
    for ppl in (31.0, 40.0, math.nan):
        judged = judge.at_step({"ppl": ppl}, "search", 3)
        assert (judged.breached, judged.stop) == (("ppl",), None)
    assert judge.told() == ["guard: ppl is 31, to be <= 1.5 x dense = 30"]
    for _ in range(2):
        assert judge.at_step({"ppl": 29.0}, "recover", 1).breached == ()
    assert judge.told() == ["guard, within its bound again: ppl is 29, to be <= 1.5 x dense = 30"]
    assert judge.at_step({"ppl": 31.0}, "recover", 3).breached == ("ppl",)
    assert len(judge.told()) == 1


def test_each_task_of_a_suite_is_held_and_told_by_itself() -> None:
    judge = Heard({"healthcare.accuracy": ">= 0.9 x dense"})
    assert judge.at_step({"rqe.accuracy": 0.7, "pubmedqa.accuracy": 0.5}, "search", 1).breached == ("healthcare.accuracy",)
    assert judge.told() == ["guard: healthcare.accuracy (rqe.accuracy) is 0.7, to be >= 0.9 x dense = 0.72"]
    assert judge.at_step({"rqe.accuracy": 0.7, "pubmedqa.accuracy": 0.4}, "search", 3).breached == ("healthcare.accuracy",)
    assert judge.told() == ["guard: healthcare.accuracy (pubmedqa.accuracy) is 0.4, to be >= 0.9 x dense = 0.45"]


def test_a_figure_of_a_task_that_is_gone_is_out_of_its_bound() -> None:
    """Of tasks only finite figures are kept: one that ran to infinity is not there."""
    judge = Heard({"rqe.accuracy": "> 0.1"})
    assert judge.at_step({"ppl": 1.0}, "search", 1).breached == ("rqe.accuracy",)
    assert judge.told() == ["guard: rqe.accuracy has no finite value, to be > 0.1"]


def test_figures_of_the_end_are_not_looked_for_at_steps() -> None:
    judge = Heard({"bytes": "< 1", "valid_ppl": "< 1", "speed.decode_ms": "< 1", "block_ratio": "<= dense", "loss": "< 1"})
    assert list(judge.followed) == ["loss"]
    assert judge.needed == []  # nothing at steps is relative to the base, which is then not measured on validation rows
    assert judge.at_step({"loss": 0.5}, "search", 1).breached == ()
    _, judged = judge.at_end({"loss": 0.5, "block_ratio": 0.5}, {"dense": {"block_ratio": 1.0}})
    assert judged.breached == ("bytes", "speed.decode_ms", "valid_ppl")


@pytest.mark.parametrize(
    ("begin", "held"),
    [("search", ["search", "settle", "decide", "recover", "tune"]), ("recover", ["recover", "tune"]), ("end", [])],
)
def test_from_which_phase_on(begin: str, held: list[str]) -> None:
    judge = Heard({"ppl": "< 1"}, {"begin": begin})
    phases = ("search", "settle", "decide", "recover", "tune")
    assert [phase for phase in phases if judge.at_step({"ppl": 9.0}, phase, 1).breached] == held
    assert judge.at_end({"ppl": 9.0}, {})[1].breached == ("ppl",)
    assert Heard({"ppl": "< dense"}, {"begin": begin}).needed == (["dense"] if begin != "end" else [])


def test_without_evaluations_the_end_is_all() -> None:
    judge = Heard({"ppl": "<= dense_lora"}, every=0)
    assert (judge.followed, judge.needed) == ({}, [])
    assert judge.at_end({"ppl": 9.0}, {"dense_lora": {"ppl": 8.0}})[1].breached == ("ppl",)


def test_at_the_end_what_is_out_is_told_anew_and_what_came_back_too() -> None:
    judge = Heard({"ppl": "<= dense", "rqe.accuracy": "> 0.5", "pubmedqa.accuracy": "> 0.1"})
    judge.at_step({"ppl": 21.0, "rqe.accuracy": 0.4, "pubmedqa.accuracy": 0.2}, "recover", 3)
    assert len(judge.told()) == 2
    rulings, judged = judge.at_end({"ppl": 31.0, "rqe.accuracy": 0.6, "pubmedqa.accuracy": 0.2}, {"dense": {"ppl": 30.0}})
    assert judge.told() == [
        "guard: ppl is 31, to be <= dense = 30",
        "guard, within its bound again: rqe.accuracy is 0.6, to be > 0.5",
    ]
    assert [(ruling.guard, ruling.holds) for ruling in rulings] == [
        ("ppl", False),
        ("rqe.accuracy", True),
        ("pubmedqa.accuracy", True),
    ]
    assert (judged.breached, judged.stop) == (("ppl",), None)


def test_stop_says_what_where_and_how_to_go_on() -> None:
    judge = Heard({"ppl": "<= dense", "rqe.accuracy": "> 0.5"}, {"then": "stop"})
    assert judge.at_step({"ppl": 20.0, "rqe.accuracy": 0.6}, "search", 3).stop is None
    stop = judge.at_step({"ppl": 21.0, "rqe.accuracy": 0.4}, "search", 5).stop
    assert stop is not None
    assert stop.exit_code == 1
    assert str(stop).startswith(
        "guard: ppl is 21, to be <= dense = 20; rqe.accuracy is 0.4, to be > 0.5, at step 6 of search. The run stopped"
    )
    assert "--resume alarm.then=warn" in str(stop)
    _, judged = judge.at_end({"ppl": 20.0, "rqe.accuracy": 0.4}, DENSE)
    assert str(judged.stop) == (
        "guard: rqe.accuracy is 0.4, to be > 0.5. The model is written; the run ends with exit code 1 (alarm.then=stop)"
    )


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("memory", "this run will not have 'memory': memory is counted on a GPU alone"),
        ("speed.memory_bytes", "this run will not have 'speed.memory_bytes': memory is counted on a GPU alone"),
        ("accuracy", "no row of data.test has choices and a label; drop the guard"),
        ("valid_ppl", "data.valid has no token; drop the guard"),
        ("healthcare.rqe.accuracy", "task 'rqe' has no 'accuracy'. Did you mean 'acuracy'? Its figures: acuracy, x"),
    ],
)
def test_figures_that_a_run_will_not_have(guard: str, message: str) -> None:
    judge, taken = Heard({guard: "> 1"}), ["ppl", "loss", "rqe.acuracy", "rqe.x", "other.accuracy"]
    with pytest.raises(UserError) as caught:
        judge.check_names(taken, cuda=False)
    assert str(caught.value).startswith(f"guard.{guard}: ")
    assert message in str(caught.value)


def test_figures_that_it_will_have() -> None:
    wanted = ("ppl", "accuracy", "rqe.accuracy", "parameters", "block_ratio", "bytes", "seconds", "speed.decode_ms", "memory")
    judge = Heard(dict.fromkeys((*wanted, "speed.memory_bytes"), "> 1"))
    judge.check_names(["ppl", "accuracy", "rqe.accuracy"], cuda=True)


def test_a_model_must_have_the_figure_that_a_condition_is_relative_to() -> None:
    judge = Heard({"ppl": "<= dense", "bytes": "<= 0.6 x dense", "loss": "< 3", "speed.decode_ms": "<= dense"})
    judge.check_references({"dense": {"ppl": 3.0, "bytes": 7.0}}, judge.bounds, "test rows")  # speed is timed at the end
    judge.check_references({"dense": {"ppl": 3.0}}, judge.followed, "validation rows")
    with pytest.raises(UserError, match=r"guard\.bytes: '<= 0\.6 x dense' cannot be held: .* no finite 'bytes' on test rows"):
        judge.check_references({"dense": {"ppl": 3.0}}, judge.bounds, "test rows")
    with pytest.raises(UserError, match=r"guard\.ppl: .* no finite 'ppl' on validation rows"):
        judge.check_references({"dense": {"ppl": math.inf}}, judge.followed, "validation rows")

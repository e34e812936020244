"""What trackers are told, read back from them; what a resume, an error and a tracker that fails do."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker

from bases import Bench
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.recipe import parse
from slimtune.train import loop, trackers
from slimtune.train.session import Session
from slimtune.train.tracker_kinds import KINDS, Tracker, config_of, figures_in, flat
from slimtune.train.trackers import PAUSE_S, PAUSE_SHARE, Trackers

AWARE: dict[str, Any] = {"lora__semantics": "lora_aware", "lora__settle": 0.5}
"""Search 4, settle 2, recover 2."""
SECRET = "hooks.example/Zx81q"

Curves = dict[str, dict[int, float]]


class Killed(Exception):
    """Not a user's error."""


def rows(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "step" in row]


def curves_of(out: Path) -> Curves:
    """All that trackers are to be told of steps, from metrics.jsonl: steps of a stage's phases follow one another."""
    curves: Curves = {}
    for stage in ("dense_lora", "main"):
        for step, row in enumerate(row for row in rows(out) if row["stage"] == stage):
            for name, value in row.items():
                if isinstance(value, float):
                    curves.setdefault(name if stage == "main" else f"{stage}/{name}", {})[step] = value
    return curves


def finals_in(curves: Curves) -> Curves:
    return {name: curve for name, curve in curves.items() if name.startswith("final/")}


def steps_in(curves: Curves) -> Curves:
    return {name: curve for name, curve in curves.items() if not name.startswith("final/")}


def in_tensorboard(folder: Path) -> tuple[Curves, dict[str, Any]]:
    """Curves and hyperparameters, as TensorBoard's own reader has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    assert not [path for path in folder.iterdir() if path.is_dir()]  # which it would show as other runs
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}
    begun = parse_session_start_info_plugin_data(read.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    return curves, {key: getattr(value, value.WhichOneof("kind")) for key, value in begun.hparams.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """trackio's folder, which it asks the environment for when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        from trackio import utils

        assert folder == utils.TRACKIO_DIR
        yield folder


def in_trackio(store: Path, name: str) -> list[tuple[Curves, dict[str, Any]]]:
    """Curves and config of every run of that name, in the order in which they began."""
    found: dict[str, tuple[Curves, dict[str, Any]]] = {}
    with sqlite3.connect(store / "slimtune.db") as db:
        for run, step, text in db.execute("SELECT run_id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)):
            for figure, value in json.loads(text).items():
                found.setdefault(run, ({}, {}))[0].setdefault(figure, {})[step] = value
        for run, text in db.execute("SELECT run_id, config FROM configs WHERE run_name = ?", (name,)):
            found[run][1].update(json.loads(text))
    db.close()
    return list(found.values())


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    real = loop._run_step

    def run_step(session: Session, phase: loop.Phase, at: int) -> None:
        if session.stage == "main" and phase.before + at == step:
            raise error
        real(session, phase, at)

    monkeypatch.setattr(loop, "_run_step", run_step)


@pytest.fixture(scope="module")
def told(bench: Bench, store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with a reference, started in an empty folder, that was told to two trackers."""
    here = tmp_path_factory.mktemp("told")
    (here / "cwd").mkdir()
    watched = {"guard": {"ppl": "<= 9 x dense"}, "alarm": {"webhook": f"https://{SECRET}"}}
    keys = {"evaluate__every": 2, "evaluate__dense_lora": True, **watched, **AWARE}
    recipe = bench.recipe(here / "told", track=["trackio", "tensorboard"], **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "cwd")
        summary = tune(recipe)
    return SimpleNamespace(out=here / "told", cwd=here / "cwd", summary=summary, recipe=recipe)


def test_tensorboard_has_every_figure_at_its_step(told: SimpleNamespace) -> None:
    curves, _ = in_tensorboard(told.out / "tensorboard")
    expected = curves_of(told.out)
    assert sorted(expected["adapt_loss"]) == sorted(expected["dense_lora/adapt_loss"]) == list(range(8))
    assert {"kept", "decide_target", "valid_ppl", "dense_lora/valid_ppl"} <= set(expected)
    assert set(steps_in(curves)) == set(expected)
    for name, curve in expected.items():
        assert curves[name] == pytest.approx(curve, rel=1e-6)  # it keeps single precision


def test_trackio_has_every_figure_at_its_step(told: SimpleNamespace, store: Path) -> None:
    ((curves, _),) = in_trackio(store, "told")
    assert steps_in(curves) == curves_of(told.out)


def test_the_summary_is_told_after_the_last_step(told: SimpleNamespace, store: Path) -> None:
    ((curves, _),) = in_trackio(store, "told")
    finals = finals_in(curves)
    assert {step for curve in finals.values() for step in curve} == {8}
    for model in ("base", "dense_lora", "result"):
        numbers = {key: value for key, value in told.summary[model].items() if isinstance(value, (int, float))}
        assert {"ppl", "parameters"} <= set(numbers)
        assert {key: finals[f"final/{model}/{key}"][8] for key in numbers} == numbers
    assert finals["final/tokens/adapt"][8] == told.summary["tokens"]["adapt"]
    guard = {key: finals[f"final/guard/ppl/{key}"][8] for key in ("value", "limit", "holds")}
    assert guard == {"value": told.summary["result"]["ppl"], "limit": 9 * told.summary["base"]["ppl"], "holds": 1.0}
    assert not {"final/seed", "final/keep", "final/compiled"} & set(finals)  # asked for, or no number
    in_files, _ = in_tensorboard(told.out / "tensorboard")
    assert {name: curve[8] for name, curve in finals_in(in_files).items()} == pytest.approx(
        {name: curve[8] for name, curve in finals.items()}, rel=1e-6
    )


def test_each_is_told_the_recipe_key_by_key_but_no_address_of_an_alarm(told: SimpleNamespace, store: Path) -> None:
    _, hparams = in_tensorboard(told.out / "tensorboard")
    ((_, config),) = in_trackio(store, "told")
    for found in (hparams, config):
        assert {key: found[key] for key in ("budget.keep", "lora.rank", "lora.semantics", "evaluate.dense_lora")} == {
            "budget.keep": 0.7,
            "lora.rank": 4,
            "lora.semantics": "lora_aware",
            "evaluate.dense_lora": True,
        }
        assert found["data.train.0.path"].endswith("texts.jsonl")
        assert not [key for key in found if key.startswith("alarm")]
    assert {key for key in config if not key.startswith("_")} == set(hparams)
    files = [*(told.out / "tensorboard").iterdir(), *store.rglob("*.db*")]
    assert files
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_nothing_lands_where_the_user_stands(told: SimpleNamespace) -> None:
    assert not list(told.cwd.iterdir())


def test_a_resumed_run_goes_on_in_the_same_runs_of_its_trackers(
    bench: Bench, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"track": ["tensorboard", "trackio"], "train__checkpoint_every": 2}
    out, other = tmp_path / "resumed", tmp_path / "elsewhere" / "resumed"
    with monkeypatch.context() as patch:
        kill_before(patch, 5, Killed())
        with pytest.raises(Killed):
            tune(bench.recipe(out, **keys))
    assert len(in_trackio(store, "resumed")[0][0]["adapt_loss"]) == 5  # it was ended, so that nothing is still under way
    tune(bench.recipe(other, track=["trackio"]))  # a later run of that name, which trackio would go on with
    capsys.readouterr()
    tune(bench.recipe(out, **keys), resume=True)
    assert "Resumed existing run: resumed" in capsys.readouterr().out
    first, second = in_trackio(store, "resumed")
    assert steps_in(second[0]) == curves_of(other)
    assert [path.name for path in out.glob("tensorboard*")] == ["tensorboard"]
    for curves, config in (first, in_tensorboard(out / "tensorboard")):
        assert {name: sorted(curve) for name, curve in steps_in(curves).items()} == {
            name: sorted(curve) for name, curve in curves_of(out).items()
        }
        assert curves["adapt_loss"] == pytest.approx(curves_of(out)["adapt_loss"], rel=1e-6)
        assert sorted(finals_in(curves)["final/result/ppl"]) == [8]
        assert config["budget.keep"] == 0.7


def test_an_overwritten_run_is_a_new_run_of_its_trackers(bench: Bench, store: Path, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "twice", track=["tensorboard", "trackio"], search__steps=2, recover__steps=2)
    tune(recipe)
    before, _ = in_tensorboard(tmp_path / "twice" / "tensorboard")
    tune(recipe.model_copy(update={"seed": 1}), overwrite=True)
    assert in_tensorboard(tmp_path / "twice" / "tensorboard")[0] == before
    after, hparams = in_tensorboard(tmp_path / "twice" / "tensorboard-2")
    assert after["adapt_loss"] == pytest.approx(curves_of(tmp_path / "twice")["adapt_loss"], rel=1e-6) != before["adapt_loss"]
    assert hparams["seed"] == 1
    assert [config["seed"] for _, config in in_trackio(store, "twice")] == [0, 1]
    tune(recipe.model_copy(update={"seed": 1}), resume=True)
    assert len(list((tmp_path / "twice" / "tensorboard-2").iterdir())) == 2
    assert len(list((tmp_path / "twice").glob("tensorboard*"))) == 2


def test_a_tracker_that_fails_costs_the_run_nothing_and_is_told_of_once(
    bench: Bench, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(self: TensorBoardTracker, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        raise OSError(28, "No space [left] on device")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    out = tmp_path / "costs"
    summary = tune(bench.recipe(out, track=["tensorboard", "trackio"]))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("track: tensorboard was not told") == 1
    assert "No space [left] on device" in said
    assert "track: trackio" not in said
    assert len(rows(out)) == 8
    ((curves, _),) = in_trackio(store, "costs")
    assert steps_in(curves) == curves_of(out)
    assert curves["final/result/ppl"][8] == summary["result"]["ppl"]


def test_a_tracker_that_cannot_start_is_one_error_that_touches_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = bench.recipe(tmp_path / "run", search__steps=2, recover__steps=2)
    tune(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def start(self: TensorBoardTracker) -> None:
        raise ConnectionError("no route to it\nat all")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    message = r"^track: 'tensorboard' cannot start: no route to it; leave it out$"
    with pytest.raises(UserError, match=message):
        tune(recipe.model_copy(update={"track": ("tensorboard",)}), overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=message):
        tune(bench.recipe(tmp_path / "new", track=["tensorboard"]))
    assert not (tmp_path / "new").exists()


def test_no_event_file_is_left_where_another_tracker_cannot_start(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"tensorboard": KINDS["tensorboard"], "wandb": type("Bad", (Fake,), {"start": failing("start")})}
    made_of(monkeypatch, **kinds)
    with pytest.raises(UserError, match="'wandb' cannot start"):
        tune(bench.recipe(tmp_path / "new", track=["tensorboard", "wandb"]))
    assert not (tmp_path / "new").exists()


class Fake(Tracker):
    """Notes what is done with it."""

    calls: list[str]

    def start(self, recipe: Any) -> None:
        self.calls = ["start"]

    @property
    def id(self) -> str:
        return f"{self.earlier or 'new'} {self.name}"

    def log(self, figures: Any, step: int) -> None:
        self.calls.append(f"log {step}")

    def end(self, failed: bool) -> None:
        self.calls.append("end failed" if failed else "end")


def failing(what: str) -> Any:
    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(what)

    return fail


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Every fake that is made, by its name."""
    found: dict[str, Fake] = {}
    real = Fake.__init__

    def init(self: Fake, name: str, *rest: Any) -> None:
        real(self, name, *rest)
        found[name] = self

    monkeypatch.setattr(Fake, "__init__", init)
    return found


def made_of(monkeypatch: pytest.MonkeyPatch, **kinds: type[Tracker]) -> None:
    monkeypatch.setattr(trackers, "KINDS", kinds)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: list(kinds))


def recipe(out: Path, *track: str) -> Any:
    return parse({"out": str(out), "track": list(track)})


def test_what_has_started_ends_where_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Fake]
) -> None:
    class Half(Fake):
        def start(self, recipe: Any) -> None:
            super().start(recipe)
            raise RuntimeError("half way.")

    made_of(monkeypatch, wandb=Fake, mlflow=Half)
    with (
        pytest.raises(UserError, match="'mlflow' cannot start: half way; leave"),
        Trackers(recipe(tmp_path, "all"), print) as all_,
    ):
        all_.start({})
    assert made["wandb"].calls == made["mlflow"].calls == ["start", "end failed"]


def test_trackers_end_as_failed_where_an_error_comes_through_and_do_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Fake]
) -> None:
    made_of(monkeypatch, wandb=Fake, mlflow=type("Bad", (Fake,), {"end": failing("end")}))
    said: list[str] = []

    def interrupted() -> None:
        with Trackers(recipe(tmp_path, "mlflow", "wandb"), said.append) as all_:
            all_.start({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made["wandb"].calls == ["start", "end failed"]
    assert len(said) == 1
    assert "mlflow did not end well (end)" in said[0]
    with Trackers(recipe(tmp_path, "wandb"), said.append) as all_:
        all_.start({})
    assert made["wandb"].calls == ["start", "end"]
    assert not all_.running
    assert len(said) == 1


def test_a_tracker_that_failed_is_left_alone_for_longer_the_longer_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Fake]
) -> None:
    now = [0.0]

    class Slow(Fake):
        def log(self, figures: Any, step: int) -> None:
            super().log(figures, step)
            now[0] += 10
            if step != 6:
                raise TimeoutError

    made_of(monkeypatch, mlflow=Slow)
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    said: list[str] = []
    (tmp_path / "metrics.jsonl").write_text('{"stage": "main", "step": 0}\n{"stage": "dense_lora", "step": 0}\n')
    with Trackers(recipe(tmp_path, "mlflow"), said.append) as all_:
        all_.start({})
        row = {"stage": "main", "loss": 1.0}
        all_.step(row, 0)
        pause = max(PAUSE_S, PAUSE_SHARE * 10)
        for step, at in ((1, 10.0), (2, 10 + pause - 1), (3, 10 + pause), (4, 20.0 + pause), (5, 20 + 2 * pause - 1)):
            now[0] = at
            all_.step(row, step)
        now[0] = 20 + 2 * pause
        all_.step(row, 6)
        all_.step(row, 7)
        all_.step(row, 8)
        all_.final({"seconds": 3.0}, tmp_path / "metrics.jsonl")
    assert made["mlflow"].calls == ["start", "log 0", "log 3", "log 6", "log 7", "log 1", "end"]
    assert [line for line in said if "mlflow was not told a step (TimeoutError)" in line] == said
    assert len(said) == 1


def test_only_rank_0_tells_and_the_names_of_the_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Fake]
) -> None:
    made_of(monkeypatch, wandb=Fake, mlflow=Fake)
    all_ = Trackers(recipe(tmp_path, "mlflow", "wandb", "mlflow"), print)
    earlier = {"wandb": "begun", "aim": "left out of this resume"}
    assert all_.start(earlier) == {**earlier, "wandb": "begun wandb", "mlflow": "new mlflow"}
    assert len(all_.running) == 2
    made_of(monkeypatch, wandb=Fake, aim=type("Forgets", (Fake,), {"id": Tracker.id}))
    assert Trackers(recipe(tmp_path, "aim"), print).start({}) == {}  # nothing to find its run by: the next one is new
    monkeypatch.setenv("RANK", "1")
    all_ = Trackers(recipe(tmp_path, "wandb"), print)
    assert all_.start(earlier) == earlier
    assert not all_.running
    monkeypatch.delenv("RANK")
    all_ = Trackers(recipe(tmp_path, "all"), print)
    all_.start({})
    assert [one.name for one in all_.running] == ["wandb", "aim"]


def test_a_recipe_and_a_summary_lie_flat() -> None:
    nested = {"a": 1, "b": {"c": None, "d": [1, 2], "e": []}, "f": [{"g": True}, {"g": "x"}], "h": {}, "i": 0.5}
    assert flat(nested) == {"a": 1, "b.c": "null", "b.d": "[1, 2]", "b.e": "[]", "f.0.g": True, "f.1.g": "x", "i": 0.5}
    assert figures_in(flat(nested, "/")) == {"a": 1.0, "i": 0.5}
    assert figures_in({"my@task.accuracy": 1, "b/c d-e": 2.0}) == {"my_task.accuracy": 1.0, "b/c d-e": 2.0}
    assert "alarm" not in config_of(parse({"alarm": {"webhook": SECRET}}))


def test_an_unknown_tracker_names_the_known(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"track: 'wandbb' is unknown\. Did you mean 'wandb'\? .*mlflow, .*tensorboard"):
        tune(bench.recipe(tmp_path, track=["wandbb"]))


def test_a_tracker_that_is_not_installed_names_its_package(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(UserError, match="track: 'comet_ml' needs the package comet-ml: pip install comet-ml"):
        tune(bench.recipe(tmp_path, track=["mlflow", "comet_ml"]))


def in_wandb(out: Path) -> list[SimpleNamespace]:
    """What was logged offline, folder by folder: wandb has no reader but its server."""
    from wandb.proto import wandb_internal_pb2

    def records(data: bytes) -> Iterator[Any]:
        at, whole = 7, b""  # blocks of 32 KiB, records in parts: LevelDB's format behind a header
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            whole = data[at + 7 : at + 7 + length] if kind in (1, 2) else whole + data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield wandb_internal_pb2.Record.FromString(whole)

    found = []
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        run = SimpleNamespace(curves={}, config={})
        for record in records(file.read_bytes()):
            if record.HasField("run"):
                run.id, run.name, run.project = record.run.run_id, record.run.display_name, record.run.project
            elif record.HasField("config"):
                run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif record.HasField("exit"):
                run.exit = record.exit.exit_code
            elif record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                for name in values.keys() - {"step", "_step", "_runtime", "_timestamp"}:
                    run.curves.setdefault(name, {})[json.loads(values["step"])] = json.loads(values[name])
        found.append(run)
    return found


def test_wandb_has_every_figure_at_its_step_and_a_resume_the_same_id(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not among the dev packages: 130 MB with its own")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "resumed"
    keys: dict[str, Any] = {
        "track": ["wandb"],
        "train__checkpoint_every": 2,
        "evaluate__dense_lora": True,
        "evaluate__every": 2,
    }
    with monkeypatch.context() as patch:
        kill_before(patch, 5, Killed())
        with pytest.raises(Killed):
            tune(bench.recipe(out, **keys))
    tune(bench.recipe(out, **keys), resume=True)
    assert not list(tmp_path.glob("wandb"))
    first, second = in_wandb(out)
    assert (first.id, first.name, first.project, first.exit) == (second.id, "resumed", "mine", 1)
    assert second.exit == 0
    expected = curves_of(out)
    curves = {name: first.curves.get(name, {}) | second.curves.get(name, {}) for name in first.curves | second.curves}
    assert {name: set(curve) for name, curve in steps_in(curves).items()} == {n: set(curve) for n, curve in expected.items()}
    for name in ("adapt_loss", "kept", "valid_ppl", "dense_lora/adapt_loss", "dense_lora/valid_ppl"):
        assert curves[name] == expected[name]
    assert set(second.curves["adapt_loss"]) == {4, 5, 6, 7}
    assert set(curves["final/result/ppl"]) == {8}
    assert first.config["budget"]["keep"] == 0.7
    assert first.config["data"]["train"][0]["path"] == bench.texts


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's use of SQLAlchemy
def test_mlflow_has_every_figure_at_its_step_beside_the_run_and_a_resume_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not among the dev packages: 360 MB")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "resumed"
    keys: dict[str, Any] = {"track": ["mlflow"], "evaluate__dense_lora": True, "evaluate__every": 2}
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")

    def only(name: str = "slimtune") -> Any:
        (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        return run

    with monkeypatch.context() as patch:
        kill_before(patch, 5, Killed())
        with pytest.raises(Killed):
            tune(bench.recipe(out, train__checkpoint_every=2, **keys))
    assert (only().info.status, only().info.run_name) == ("FAILED", "resumed")
    tune(bench.recipe(out, train__checkpoint_every=3, **keys), resume=True)  # MLflow lets no parameter change
    run = only()
    assert run.info.status == "FINISHED"
    assert (run.data.params["budget.keep"], run.data.params["train.checkpoint_every"]) == ("0.7", "2")
    curves = {n: {each.step: each.value for each in client.get_metric_history(run.info.run_id, n)} for n in run.data.metrics}
    expected = curves_of(out)
    assert {name: set(curve) for name, curve in steps_in(curves).items()} == {n: set(curve) for n, curve in expected.items()}
    for name in ("adapt_loss", "kept", "valid_ppl", "dense_lora/adapt_loss", "dense_lora/valid_ppl"):
        assert curves[name] == expected[name]
    assert set(curves["final/result/ppl"]) == {8}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tune(bench.recipe(tmp_path / "others" / "short", track=["mlflow"], search__steps=2, recover__steps=2))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'others' / 'mlflow.db'}")
    assert only("mine").info.run_name == "short"
    assert not mlflow.is_tracking_uri_set()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'others' / 'mlflow.db'}")
    with mlflow.start_run(experiment_id=client.get_experiment_by_name("mine").experiment_id) as caller:
        with pytest.raises(UserError, match=r"'mlflow' cannot start: Run with UUID .* already active"):
            tune(bench.recipe(tmp_path / "others" / "inside", track=["mlflow"]))
        assert mlflow.active_run().info.run_id == caller.info.run_id
    mlflow.set_tracking_uri(None)

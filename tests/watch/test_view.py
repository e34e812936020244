"""The command: its exit codes, its errors, a terminal, a run that goes on."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bases import Bench
from runs import write_run
from slimtune.cli import app
from slimtune.pipeline import tune
from slimtune.recipe import parse
from slimtune.train.claim import place
from slimtune.watch import pace
from slimtune.watch.follow import Watched
from slimtune.watch.view import BREACHED, BROKEN_OFF, FINE, watch
from watched import RECOVERY, SEARCH, Folder, closing, finished, guarded, text


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "health").stages()


def test_exit_codes_of_one_look(run: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run.held():
        assert watch(run.path) == FINE
    assert watch(run.path, once=True) == BROKEN_OFF
    assert watch(finished(tmp_path / "well")) == FINE
    assert watch(finished(tmp_path / "ill", holds=False), wait=True) == BREACHED
    shown = capsys.readouterr().out
    assert shown.count("MLP width") == 2
    assert not re.search(r" +$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{out}/absent"], "absent' does not exist; give the folder of a run (its recipe's out), or --wait for it"),
        (["{out}/empty"], "empty' holds no run; give the folder of a run (its recipe's out), or --wait for one in it"),
        (["{out}/file"], "file' is no folder; give the folder of a run (its recipe's out)"),
        (["{out}/file", "--wait"], "file' is no folder; give the folder of a run (its recipe's out)"),
        (["{out}/run/model"], "run/model' is a run's model: give '"),
        (["{out}/run", "--every", "0"], "--every 0 is no time between looks; give seconds from 0.05 to 3600, e.g. --every 5"),
        (["{out}/run", "--every", "nan"], "--every nan is no time between looks"),
        (["{out}/run", "--once", "--wait"], "--once and --wait exclude each other"),
        (["{out}/damaged"], "damaged/summary.json' cannot be read"),
        (["{out}/damaged"], "; the run writes it anew with --resume"),
        (["{out}/planless"], "planless/plan.json' cannot be read (this is not a plan.json"),
    ],
)
def test_bad_input_is_told_in_a_line(tmp_path: Path, words: list[str], told: str) -> None:
    for name in ("empty", "run/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "recipe.yaml").write_text(parse({"out": "x"}).to_yaml())
    (write_run(tmp_path / "damaged") / "summary.json").write_text('{"result": ')
    (write_run(tmp_path / "planless") / "plan.json").write_text("{}")
    result = CliRunner().invoke(app, ["watch", *(word.replace("{out}", str(tmp_path)) for word in words)])
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_summary_or_recipe_stand_for_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "run")
    for name in ("summary.json", "recipe.yaml"):
        assert watch(folder / name) == FINE
        assert capsys.readouterr().out.startswith("run  finished")


def test_a_summary_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "run", holds=False)
    for path in folder.iterdir():
        if path.name != "summary.json":
            path.unlink()
    assert watch(folder) == BREACHED
    assert "BREACHED    ppl is 20" in capsys.readouterr().out


def test_watching_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from slimtune.cli import app; import slimtune.cli_watch; assert 'rich' not in sys.modules\n"
        "from slimtune.watch.view import watch; code = watch(sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'jinja2'} & set(sys.modules); assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    folder = guarded(tmp_path / "run").rows(*SEARCH, closing(4, valid_ppl=25.0)).path
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == BROKEN_OFF, done.stderr
    assert "BREACHED" in done.stdout


def on_terminal(folder: Path, *words: str, rows: int = 40) -> tuple[subprocess.Popen[bytes], int]:
    """``slimtune watch`` on a terminal of 80 columns, and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": str(rows), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "slimtune", "watch", str(folder), "--every", "0.1", *words]
    how: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment, "preexec_fn": _listening}
    child = subprocess.Popen(command, **how)
    os.close(theirs)
    return child, ours


def _listening() -> None:
    """As a shell starts what it runs in the foreground: where these tests run in the background they ignore some signals."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


def until(terminal: int, wanted: bytes | None, seconds: float = 20.0) -> bytes:
    """What comes until ``wanted`` has come, or to the end."""
    found, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and (wanted is None or wanted not in found):
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                found += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return found
    assert wanted is None or wanted in found, found
    return found


def test_on_a_terminal_it_follows_the_run_to_its_end(tmp_path: Path) -> None:
    """It waits for the folder, follows what is appended, and leaves the last frame below what was there."""
    done = finished(tmp_path / "done", holds=False)
    child, terminal = on_terminal(tmp_path / "run", "--wait")
    try:
        until(terminal, b"no run yet")
        run = Folder(tmp_path / "run").stages()
        with run.held():
            until(terminal, b"starting")
            run.rows(*SEARCH[:2])
            until(terminal, b"Search, step 2 of 5.")
            run.rows(*SEARCH[2:], *RECOVERY[:7])
            until(terminal, b"Recover, step 7 of 10.")
            for name in ("plan.json", "summary.json"):
                (run.path / name).write_text((done / name).read_text())
        rest = until(terminal, None)
        assert child.wait(10) == BREACHED
        left = rest[rest.index(b"\x1b[?1049l") :]  # the other screen is left
        assert b"finished" in left
        assert b"BREACHED" in left
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_ctrl_c_and_other_signals_end_it_without_a_word(run: Folder, name: str, code: int) -> None:
    run.rows(*SEARCH[:2])
    with run.held():
        child, terminal = on_terminal(run.path)
        try:
            until(terminal, b"Search, step 2 of 5.")
            child.send_signal(getattr(signal, name))  # not as a key: the terminal would throw away what waits to be read
            rest = until(terminal, None)
            assert child.wait(10) == code
            assert rest.rpartition(b"\x1b[?25h")[2] == b"\x1b[?1049l"  # cursor and screen are as before; no word follows
        finally:
            child.kill()
            child.wait()
            os.close(terminal)


WATCHER = """
import json, sys, time
from pathlib import Path
from rich.console import Console
from slimtune.watch.follow import Watched
from slimtune.watch.frame import frame

watched, seen = Watched(Path(sys.argv[1])), {}
print("ready", flush=True)
while not watched.over:
    time.sleep(0.005)
    watched.look()
    name = watched.state if watched.seen.last is None or watched.over else str(watched.seen.last["phase"])
    if name not in seen:
        console = Console(width=60)
        with console.capture() as captured:
            console.print(frame(watched, console))
        seen[name] = captured.get()
print(json.dumps(seen))
"""


def test_a_run_that_goes_on_is_watched_from_another_process(tmp_path: Path) -> None:
    """Frames of a real run are whole at any moment, come forward, and it ends as it is said to."""
    out = tmp_path / "run"
    recipe = Bench(tmp_path).recipe(out, evaluate__every=2, evaluate__dense_lora=True, guard={"ppl": "<= 1e9"})
    with subprocess.Popen([sys.executable, "-c", WATCHER, str(out)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        try:
            tune(recipe)
            seen = json.loads(child.communicate(timeout=20)[0])
        finally:
            child.kill()
    order = ["absent", "starting", "tune", "search", "recover", "finished"]
    assert list(seen) == [name for name in order if name in seen]  # a watcher that has to wait for a processor may miss some
    assert {"starting", "tune", "search", "recover"} & seen.keys()
    assert "to be <= 1e9" in seen.get("tune", "to be <= 1e9")
    assert seen["finished"].startswith("run  finished")
    watched = Watched(out)
    watched.look()
    assert [(phase.name, phase.done, phase.steps) for phase in pace.phases(watched)] == [
        ("tune", 8, 8),
        ("search", 4, 4),
        ("recover", 4, 4),
    ]
    assert "holds       ppl is" in text(watched)
    assert watched.stages["place"] == place()
    assert set(watched.stages["costs"]) == {"tune", "search", "recover"}
    assert watched.stages["units"] == {"kv_group": [2, 2, 2], "ffn": [96, 96, 96]}
    assert all(stretch.evaluations for stretch in watched.seen.stretches.values())
    assert watch(out, wait=True) == FINE

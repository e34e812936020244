"""What is told, to whom, with what in it; and that no alarm ends the run that it watches."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from guard.loopback import nobody, silent, webhook
from slimtune.condition import Condition
from slimtune.errors import UserError
from slimtune.guard.alarm import Alarm
from slimtune.guard.ruling import Ruling, rule
from slimtune.sections import AlarmConfig
from slimtune.version import __version__

SECRET = "hunter2-4711"
STEP = {"phase": "recover", "step": 39}


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("ALARM_SECRET", SECRET)
    monkeypatch.delenv("RANK", raising=False)


def alarm(lines: list[str], **config: Any) -> Alarm:
    return Alarm(AlarmConfig(**config), "runs/[x]", lines.append)


def ruling(value: float = 0.5) -> Ruling:
    bound = Condition.of(">= 0.95 x dense")
    return rule("healthcare.rqe.accuracy", "rqe.accuracy", bound, {"rqe.accuracy": value}, {"dense": {"rqe.accuracy": 0.8}})


def sounded(*, event: str = "breach", value: float = 0.5, **config: Any) -> list[str]:
    """The lines of one alarm, the first of which is the guard's own."""
    lines: list[str] = []
    alarm(lines, **config).sound(event, ruling(value), STEP)
    assert lines[0].startswith("[yellow]guard")
    return [line.removeprefix("[yellow]").removesuffix("[/yellow]") for line in lines[1:]]


def test_the_payload_as_documented() -> None:
    with webhook() as server:
        lines: list[str] = []
        alarm(lines, webhook=f"{server.address}/hook?token=${{ALARM_SECRET}}").sound("breach", ruling(), STEP)
    assert lines == ["[yellow]guard: healthcare.rqe.accuracy is 0.5, to be >= 0.95 x dense = 0.76[/yellow]"]
    ((method, path, headers, payload),) = server.heard
    assert (method, path) == ("POST", f"/hook?token={SECRET}")
    assert (headers["content-type"], headers["user-agent"]) == ("application/json", f"slimtune/{__version__}")
    told = datetime.fromisoformat(payload.pop("time"))
    assert timedelta(0) <= datetime.now(UTC) - told < timedelta(minutes=1)
    assert payload == {
        "version": 1,
        "event": "breach",
        "run": "[x]",
        "guard": "healthcare.rqe.accuracy",
        "figure": "rqe.accuracy",
        "condition": ">= 0.95 x dense",
        "value": 0.5,
        "limit": pytest.approx(0.76),
        "holds": False,
        "relative_to": {"dense": 0.8},
        "phase": "recover",
        "step": 39,
        "slimtune": __version__,
        "text": "slimtune [x]: out of its bound: healthcare.rqe.accuracy is 0.5, to be >= 0.95 x dense = 0.76",
    }


def test_the_example_of_the_documentation_has_these_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")
    example = json.loads(page.partition("```json\n")[2].partition("```")[0])
    made = Alarm(AlarmConfig(), "runs/x", print).event("breach", ruling(), STEP)
    assert list(example) == list(made)
    assert {key: type(value) for key, value in example.items()} == {key: type(value) for key, value in made.items()}
    assert example["version"] == made["version"]


def test_what_came_back_is_an_event_of_its_own() -> None:
    with webhook() as server:
        assert sounded(event="recovered", value=0.9, webhook=server.address) == []
    payload = server.heard[0][3]
    assert (payload["event"], payload["holds"], payload["value"]) == ("recovered", True, 0.9)
    assert payload["text"].startswith("slimtune [x]: within its bound again: healthcare.rqe.accuracy is 0.9")


def test_what_is_not_finite_is_null() -> None:
    with webhook() as server:
        assert sounded(value=float("inf"), webhook=server.address) == []
    assert server.heard[0][3]["value"] is None


FAILURES = {500: "HTTP 500", 404: "HTTP 404", 302: "HTTP 302", 307: "HTTP 307", 0: "BadStatusLine"}


@pytest.mark.parametrize("status", FAILURES)
def test_a_server_that_does_not_take_it_is_told(status: int) -> None:
    with webhook(status) as server:
        assert sounded(webhook=f"{server.address}/${{ALARM_SECRET}}") == [
            f"alarm.webhook failed: {FAILURES[status]}; the run goes on"
        ]
    assert [method for method, *_ in server.heard] == ["POST"]  # a redirect is not followed: that would lose the event


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_never_answers_is_waited_for_no_longer_than_asked(drips: bool) -> None:
    begun = time.perf_counter()
    if drips:  # each byte would start a socket's time anew
        with webhook(-1) as server:
            lines = sounded(webhook=server.address, timeout=0.5)
    else:
        before = threading.active_count()
        with silent() as address:
            lines = sounded(webhook=address, timeout=0.5)
            while threading.active_count() > before:  # the one that waited does not stay
                assert time.perf_counter() - begun < 5
                time.sleep(0.02)
    assert lines == ["alarm.webhook failed: no answer in 0.5 s (alarm.timeout); the run goes on"]
    assert 0.4 < time.perf_counter() - begun < 5


def test_a_server_that_is_gone_is_told() -> None:
    assert sounded(webhook=nobody()) == ["alarm.webhook failed: Connection refused; the run goes on"]


def test_a_host_that_there_is_not_is_told_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert sounded(webhook="http://${ALARM_SECRET}.invalid/") == [
        "alarm.webhook failed: no host of that name is found; the run goes on"
    ]


def test_whatever_goes_wrong_in_it_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(*_: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("urllib.request.build_opener", opener)
    assert sounded(webhook="https://x.example") == ["alarm.webhook failed: RuntimeError; the run goes on"]


NO_ADDRESS = (
    *("x.example/hook", "ftp://x.example", "https://", "https:///path", "http://[::1", "http://x.example:99999", "http://x:y/"),
    *("http://x.example/a b", "http://x.example/\n", "http://me:${ALARM_SECRET}@x.example/", "http://x.example/ü", "${EMPTY}"),
)


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_what_is_no_address_is_refused_without_its_secret(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=r"alarm\.webhook=.* is no address") as caught:
        alarm([], webhook=address)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", ["https://x.example", "http://127.0.0.1:8080/a?b=c#d", "http://[::1]:80/", "HTTPS://X"])
def test_addresses(address: str) -> None:
    assert alarm([], webhook=address).webhook == address


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_a_command_gets_the_event_and_its_arguments(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2] + '\\n' + sys.stdin.read())"
    assert sounded(command=python(code, str(tmp_path / "event"), "${ALARM_SECRET} and more")) == []
    argument, payload = (tmp_path / "event").read_text().split("\n")
    assert argument == f"{SECRET} and more"  # one argument, whatever is in it
    assert json.loads(payload)["guard"] == "healthcare.rqe.accuracy"
    assert SECRET not in payload


def test_a_command_as_one_text_and_one_that_reads_nothing() -> None:
    assert AlarmConfig(command="notify --to 'me and you' ${X}").command == ("notify", "--to", "me and you", "${X}")
    assert AlarmConfig(command=[Path("a") / "b", "c"]).command == (str(Path("a") / "b"), "c")
    assert sounded(command="true") == []


def test_commands_that_fail_are_told(tmp_path: Path) -> None:
    assert sounded(command=python(f"raise SystemExit({3})", "${ALARM_SECRET}")) == [
        "alarm.command failed: exit code 3; the run goes on"
    ]
    assert sounded(command=python("import time; time.sleep(60)"), timeout=0.3) == [
        "alarm.command failed: no answer in 0.3 s (alarm.timeout); the run goes on"
    ]
    program = tmp_path / "notify"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    lines: list[str] = []
    made = alarm(lines, command=[str(program), "${ALARM_SECRET}"])
    program.chmod(0o644)
    made.sound("breach", ruling(), STEP)
    program.unlink()
    made.sound("breach", ruling(), STEP)
    assert [line for line in lines if "alarm.command" in line] == [
        "[yellow]alarm.command failed: Permission denied; the run goes on[/yellow]",
        "[yellow]alarm.command failed: No such file or directory; the run goes on[/yellow]",
    ]


def test_a_program_that_there_is_not_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"alarm\.command=\['\$\{ALARM_SECRET\}', 'x'\]: no program '\$\{ALARM_SECRET\}'"
    ) as caught:
        alarm([], command="${ALARM_SECRET} x")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("RANK", "1")  # which calls nothing
    assert alarm([], command="no-such-program-here").command == ["no-such-program-here"]


def test_both_are_told_and_one_that_fails_does_not_keep_the_other(tmp_path: Path) -> None:
    with webhook() as server:
        assert len(sounded(command=python("raise SystemExit(1)"), webhook=server.address)) == 1
    assert len(server.heard) == 1


def test_only_the_first_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook() as server:
        monkeypatch.setenv("RANK", "1")
        assert sounded(webhook=server.address) == []
    assert server.heard == []


@pytest.mark.parametrize("key", ["webhook", "command"])
def test_a_variable_that_is_not_set_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALARM_SECRET")
    with pytest.raises(UserError, match=r"the recipe uses \$\{ALARM_SECRET\} but the environment variable .* is not set"):
        alarm([], **{key: "https://${ALARM_SECRET}"})

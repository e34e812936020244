"""Tell of a figure that left its bound, or came back: a line, a command's standard input, a webhook."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slimtune.errors import UserError
from slimtune.guard.ruling import Ruling
from slimtune.runtime import rank
from slimtune.section import expand
from slimtune.sections import AlarmConfig
from slimtune.version import __version__

VERSION = 1
"""Of the event's form (docs/guard.md)."""


class Alarm:
    """Sounds on rank 0. What fails in it is told and stops nothing: an alarm must not end the run that it watches.

    Raises:
        UserError: a variable is not set, the webhook is no address, or there is no such program as the command's.
    """

    def __init__(self, config: AlarmConfig, out: str, say: Callable[[str], None]):
        self.config, self.run, self.say = config, Path(out).resolve().name, say
        self.command: list[str] = expand(list(config.command))
        self.webhook: str = expand(config.webhook)
        # as the recipe has them: what a variable holds may be a secret
        if config.webhook and not _is_address(self.webhook):
            raise UserError(
                f"alarm.webhook={config.webhook!r} is no address; it begins with https:// or http:// and a host, and has no "
                "name and password in it and no space (alarm.command can call curl)"
            )
        if self.command and rank() == 0 and not shutil.which(self.command[0]):
            raise UserError(
                f"alarm.command={list(config.command)!r}: no program {config.command[0]!r} is there; give one of the PATH, or "
                "the path of a file that may be executed"
            )

    def sound(self, event: str, ruling: Ruling, when: dict[str, Any]) -> None:
        """Tell of ``event`` (``breach`` or ``recovered``)."""
        told = "guard" if event == "breach" else "guard, within its bound again"
        self.say(f"[yellow]{told}: {_plain(ruling.told)}[/yellow]")
        if rank() != 0:
            return
        payload = json.dumps(self.event(event, ruling, when)).encode()
        if self.command:
            self._attempt("alarm.command", lambda: self._run(payload))
        if self.webhook:
            self._attempt("alarm.webhook", lambda: self._post(payload))

    def event(self, event: str, ruling: Ruling, when: dict[str, Any]) -> dict[str, Any]:
        """The event as it is sent: nothing of the recipe, the environment, the data or paths is in it."""
        state = "out of its bound" if event == "breach" else "within its bound again"
        return {
            "version": VERSION,
            "event": event,
            "run": self.run,
            **{key: value for key, value in ruling.to_dict().items() if key != "words"},
            "relative_to": ruling.words,
            **when,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "slimtune": __version__,
            "text": f"slimtune {self.run}: {state}: {ruling.told}",
        }

    def _attempt(self, what: str, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # whatever it is
            reason = _reason(error) or f"no answer in {self.config.timeout:g} s (alarm.timeout)"
            self.say(f"[yellow]{what} failed: {_plain(reason)}; the run goes on[/yellow]")

    def _run(self, payload: bytes) -> None:
        subprocess.run(self.command, input=payload, timeout=self.config.timeout, check=True, stdout=subprocess.DEVNULL)

    def _post(self, payload: bytes) -> None:
        """In a thread: a socket's own time begins anew with every byte, and looking up a name takes what it takes."""
        failed: list[Exception] = []

        def send() -> None:
            headers = {"Content-Type": "application/json", "User-Agent": f"slimtune/{__version__}"}
            request = urllib.request.Request(self.webhook, payload, headers, method="POST")
            try:
                with urllib.request.build_opener(_Stay).open(request, timeout=self.config.timeout):
                    pass
            except Exception as error:  # for the thread that waits
                failed.append(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(self.config.timeout)
        if thread.is_alive():
            raise TimeoutError
        if failed:
            raise failed[0]


class _Stay(urllib.request.HTTPRedirectHandler):
    """An address that has moved is told: to follow it urllib would ask for a page, without the event."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_address(text: str) -> bool:
    try:
        address = urllib.parse.urlsplit(text)
        port = address.port  # raises where it is no number of a port
    except ValueError:
        return False
    printable = text.isascii() and text.isprintable() and " " not in text
    known = address.scheme in ("http", "https") and bool(address.hostname) and port != 0
    return known and printable and "@" not in address.netloc


def _reason(error: Exception) -> str:
    """Why, without the address or the command line, which may hold a secret; empty: out of time."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
        return ""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    if isinstance(error, socket.gaierror):
        return "no host of that name is found"
    if isinstance(error, ssl.SSLError):  # its text names the host
        return f"{type(error).__name__} {error.reason or ''}".strip()
    # errno's own words: a file's name stands elsewhere
    words = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else ""
    return words or type(error).__name__


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)

"""Tell of a figure that left its bound, or came back: a line, a command's standard input, a webhook."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import UserError
from slimtune.runtime import rank
from slimtune.section import expand
from slimtune.sections import AlarmConfig
from slimtune.version import __version__

if TYPE_CHECKING:
    from slimtune.guard.judge import Ruling

VERSION = 1
"""Of the event's form (docs/guard.md)."""


class Alarm:
    """Sounds on rank 0. What fails in it is told and stops nothing: an alarm must not end the run that it watches.

    Raises:
        UserError: a variable is not set, or the webhook is no address.
    """

    def __init__(self, config: AlarmConfig, out: str, say: Callable[[str], None]):
        self.config, self.run, self.say = config, Path(out).resolve().name, say
        self.command: list[str] = expand(list(config.command))
        self.webhook: str = expand(config.webhook)
        address = urllib.parse.urlsplit(self.webhook)
        if self.webhook and (address.scheme not in ("http", "https") or not address.hostname):
            raise UserError(f"alarm.webhook={config.webhook!r} is no address; it begins with https:// or http:// and a host")

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
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            # of an address or a command line nothing is told: they may hold a secret
            reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if isinstance(error, subprocess.CalledProcessError):
                reason = f"exit code {error.returncode}"
            elif isinstance(error, (TimeoutError, subprocess.TimeoutExpired)):
                reason = f"no answer in {self.config.timeout:g} s (alarm.timeout)"
            elif isinstance(error, FileNotFoundError):
                reason = "no such program"
            self.say(f"[yellow]{what} failed: {_plain(reason)}; the run goes on[/yellow]")

    def _run(self, payload: bytes) -> None:
        subprocess.run(self.command, input=payload, timeout=self.config.timeout, check=True, stdout=subprocess.DEVNULL)

    def _post(self, payload: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": f"slimtune/{__version__}"}
        request = urllib.request.Request(self.webhook, payload, headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.config.timeout):
            pass


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)

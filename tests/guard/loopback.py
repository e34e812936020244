"""A server on this machine that keeps what is posted to it, and answers as it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Webhook(ThreadingHTTPServer):
    """Answers with ``status``; 0: nothing that HTTP knows; -1: one byte every tenth of a second, without an end."""

    daemon_threads = True

    def __init__(self, status: int = 200):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.heard: list[tuple[str, str, dict[str, str], Any]] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.heard.append((self.command, self.path, headers, json.loads(body)))
        if self.server.status == 0:
            self.wfile.write(b"hello\r\n")
            return
        while self.server.status == -1 and not self.server.closing.is_set():
            self.wfile.write(b"H")
            time.sleep(0.1)
        if self.server.status > 0:
            self.send_response(self.server.status)
            self.send_header("Location", f"{self.server.address}/elsewhere")
            self.end_headers()

    def do_GET(self) -> None:
        self.server.heard.append((self.command, self.path, {}, None))
        self.send_response(200)
        self.end_headers()

    def handle(self) -> None:
        with suppress(OSError):  # who asked is gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def webhook(status: int = 200) -> Iterator[Webhook]:
    """A running server."""
    server = Webhook(status)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent() -> Iterator[str]:
    """The address of one that takes a call and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"

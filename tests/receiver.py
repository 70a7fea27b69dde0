"""Somebody who takes webhooks, over a real socket."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from streamsink.tls import SelfSigned
from tests.peer import PATIENCE
from tests.stores import served


class Request(NamedTuple):
    headers: Message
    body: bytes


class Receiver:
    """What came, and what is answered: ``statuses`` first, one each, then ``status``."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.statuses: list[int] = []
        self.headers = headers
        self.requests: list[Request] = []
        self.url = ""
        self._came = threading.Condition()

    def take(self, request: Request) -> int:
        with self._came:
            self.requests.append(request)
            self._came.notify_all()
            return self.statuses.pop(0) if self.statuses else self.status

    def wait(self, count: int = 1) -> list[dict[str, Any]]:
        """The bodies, once there are so many."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, PATIENCE), f"{len(self.requests)} came"
            return [json.loads(request.body) for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        receiver: Receiver = self.server.receiver  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(receiver.take(Request(self.headers, body)))
        for key, value in receiver.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def receiving(
    status: int = 204, headers: Mapping[str, str] | None = None, certificate: SelfSigned | None = None
) -> Iterator[Receiver]:
    """Take webhooks, over HTTPS with a certificate, else over HTTP."""
    receiver = Receiver(status, headers or {})
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
    with served(_Handler, context, receiver=receiver) as port:
        receiver.url = f"http{'s' if context else ''}://localhost:{port}/hooks/s3cr3t"
        yield receiver

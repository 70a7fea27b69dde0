"""Servers that speak S3 and Google Cloud Storage, and a way to them on which things go wrong."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from streamsink.delivery.upload import ObjectStore, parse_target

BUCKET = "calls"


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Who hangs up is no error of the test's."""


@contextmanager
def served(
    handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None, **attributes: Any
) -> Iterator[int]:
    """Serve HTTP in threads; gives the port."""
    with _Quiet(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        vars(server).update(attributes)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Faults:
    """What happens to the next uploads, one each; afterwards all is well.

    ``cut`` ends the connection within the request, ``lost`` after it was done, ``500`` refuses it, ``damaged`` flips
    bits of what is sent, ``short`` leaves out its end, ``held`` keeps it for good.
    """

    def __init__(self, to: int, *faults: str) -> None:
        self.to = to
        self.left = list(faults)
        self.requests: list[str] = []
        self.holding = threading.Event()
        self.released = threading.Event()

    def next(self) -> str:
        # Parts of a file come side by side.
        try:
            return self.left.pop(0)
        except IndexError:
            return ""


class FaultyProxy(BaseHTTPRequestHandler):
    """Passes requests on, but for the faults of its server's ``faults``."""

    protocol_version = "HTTP/1.1"

    def uploads(self) -> bool:
        """Whether this request sends (a part of) a file."""
        return self.command == "PUT"

    def refuses(self, to: int, body: bytes) -> bool:
        """Whether a condition of the request is not met that the server does not know of."""
        return False

    def handle_any(self) -> None:
        faults: Faults = self.server.faults  # type: ignore[attr-defined]
        faults.requests.append(f"{self.command} {self.path}")
        fault = faults.next() if self.uploads() else ""
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut":
            self.rfile.read(min(length, 1000))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault == "held":
            faults.holding.set()
            faults.released.wait()
            self.close_connection = True
            return
        if fault == "damaged":
            middle = body.index(b"RIFF") + 500
            body = body[:middle] + bytes(byte ^ 0x55 for byte in body[middle : middle + 8]) + body[middle + 8 :]
        if fault == "500":
            self._answer(500, [], b"")
            return
        if self.refuses(faults.to, body):
            self._answer(412, [], b"")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", faults.to, timeout=20)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() != "expect":
                    upstream.putheader(key, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            answer = response.read()
        finally:
            upstream.close()
        if fault == "lost":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self._answer(response.status, response.getheaders(), answer, response.getheader("Content-Length"))

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(key, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        pass


class _GoogleProxy(FaultyProxy):
    """The same for Google Cloud Storage, with ``ifGenerationMatch=0``: the emulator knows no conditions."""

    def uploads(self) -> bool:
        return self.command == "POST" and self.path.startswith("/upload/")

    def refuses(self, to: int, body: bytes) -> bool:
        target = urlsplit(self.path)
        query = parse_qs(target.query)
        if query.get("ifGenerationMatch") != ["0"]:
            return False
        # It stands in the URL of an upload in parts, else in the first part of the body, which is JSON on one line.
        name = query["name"][0] if "name" in query else json.loads(body.split(b"\n", 4)[3])["name"]
        upstream = http.client.HTTPConnection("127.0.0.1", to, timeout=20)
        try:
            upstream.request("GET", f"{target.path.removeprefix('/upload')}/{quote(name, safe='')}")
            return upstream.getresponse().status == http.HTTPStatus.OK
        finally:
            upstream.close()


class Bucket(Protocol):
    """A bucket of a kind, as an endpoint's environment names it."""

    scheme: str

    def store(self, prefix: str) -> ObjectStore: ...

    def failing(self, *faults: str) -> AbstractContextManager[Faults]: ...


class S3:
    """An S3-compatible server with one bucket, by the environment's ``AWS_ENDPOINT_URL``."""

    scheme = "s3"

    def __init__(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = port
        self._monkeypatch = monkeypatch
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        self.at(port)
        for name, value in {
            "ACCESS_KEY_ID": "key",
            "SECRET_ACCESS_KEY": "hunter2",
            "DEFAULT_REGION": "eu-west-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        # Nobody's own settings.
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)

    def at(self, port: int) -> None:
        self._monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        parse_target.cache_clear()

    def store(self, prefix: str) -> ObjectStore:
        return ObjectStore("s3", f"{BUCKET}/{prefix}")

    @contextmanager
    def failing(self, *faults: str) -> Iterator[Faults]:
        """Put a way in front on which the next uploads have these faults; for stores made from now on."""
        made = Faults(self.port, *faults)
        with served(FaultyProxy, faults=made) as port:
            self.at(port)
            try:
                yield made
            finally:
                made.released.set()
        self.at(self.port)


class GoogleStorage:
    """A server as Google's with one bucket, by the environment's ``STORAGE_EMULATOR_HOST``."""

    scheme = "gs"

    def __init__(self, port: int, way: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = port
        self._way = way
        self._monkeypatch = monkeypatch
        # Nobody's own account, and no question to the machine's metadata server.
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        self.at(way)

    def at(self, port: int) -> None:
        self._monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        parse_target.cache_clear()

    def store(self, prefix: str) -> ObjectStore:
        return ObjectStore("gs", f"{BUCKET}/{prefix}")

    @contextmanager
    def failing(self, *faults: str) -> Iterator[Faults]:
        """The way there has these faults for the next uploads; for stores made from now on."""
        made = Faults(self.port, *faults)
        with served(_GoogleProxy, faults=made) as port:
            self.at(port)
            try:
                yield made
            finally:
                made.released.set()
        self.at(self._way)


@contextmanager
def google_storage(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleStorage]:
    """That server, over a way without faults."""
    with served(_GoogleProxy, faults=Faults(port)) as way:
        yield GoogleStorage(port, way, monkeypatch)

"""What the tests of the whole endpoint share: its event loop, its log, and a server in the test's own loop."""

from __future__ import annotations

import asyncio
import http.client
import io
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest
import structlog

from streamsink import log
from streamsink.config import Pipeline, Settings
from streamsink.loop import new_event_loop
from streamsink.processors import record, transcribe
from streamsink.server import Server
from streamsink.speech.stt import pool
from tests.peer import ADMIN_TOKEN, LISTENER, PATIENCE, TOKEN, Running
from tests.stores import BUCKET, S3, GoogleStorage, google_storage

LOGGERS = (None, "asyncio", "uvicorn", "uvicorn.error", "uvicorn.access", "websockets", "aiofastnet")

# Nothing here may depend on how busy the machine is, or on luck.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "endpoint_loop: runs on the event loop that the endpoint runs on")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("endpoint_loop"):
        return {"endpoint": new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk, or another process, keeps nobody from reading what was recorded."""
    monkeypatch.setattr(record, "START_WAITS", PATIENCE)
    monkeypatch.setattr(record, "STOP_WAITS", PATIENCE)
    # What transcribes may take its time, too.
    monkeypatch.setattr(pool, "STUCK", PATIENCE)
    monkeypatch.setattr(pool.PooledEngine, "stuck", PATIENCE)
    monkeypatch.setattr(transcribe, "LOADING", PATIENCE)
    monkeypatch.setattr(transcribe, "PATIENCE", PATIENCE)
    # Two of them end a processor's hooks.
    monkeypatch.setattr(sys.modules["streamsink.processor"], "HOOK_TIMEOUT", 2 * PATIENCE)


@pytest.fixture
def read_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """All that is logged, from debug on, as people see it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    stderr = io.StringIO()
    with monkeypatch.context() as patch:
        # Only while the handler is made: it keeps the stream it was made with.
        patch.setattr(sys, "stderr", stderr)
        log.configure("text", "debug")
    yield stderr.getvalue
    structlog.reset_defaults()
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class Serve(Protocol):
    """Starts a server; with settings that differ from the tests' own."""

    async def __call__(self, **settings: Any) -> Running: ...


@pytest.fixture
async def serve(tmp_path: Path, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serve]:
    """Servers that run in the test's event loop, end with the test, and log no traceback."""
    # Who loses the core for a moment is not slow.
    monkeypatch.setattr(sys.modules["streamsink.processor"], "SLOW_CALL", PATIENCE)
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Running:
            options: dict[str, Any] = {
                "host": "127.0.0.1",
                "port": 0,
                "state": tmp_path / "state",
                "recordings": tmp_path / "recordings",
                "tokens": [f"crew:{TOKEN}"],
                "admin_token": ADMIN_TOKEN,
                "processors": ["record", LISTENER],
                "pipelines": {"healthy": Pipeline(processors=[LISTENER])},
            }
            server = Server(Settings(**{**options, **settings}))
            await stack.enter_async_context(server)
            running = Running(server, read_log)
            stack.push_async_callback(running.disconnect)
            return running

        yield start
    assert "Traceback" not in read_log()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """A real S3-compatible server with one bucket."""
    moto = pytest.importorskip("moto.server", reason="needs moto's server")
    pytest.importorskip("s3fs", reason="needs the extra s3")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    yield port
    server.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> S3:
    """That server, as an endpoint's environment names it."""
    return S3(s3_port, monkeypatch)


@pytest.fixture(scope="session")
def gs_port() -> Iterator[int]:
    """A server that speaks Google Cloud Storage and has one bucket, but without its conditions and accounts."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs the extra test-gcs")
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    yield server._api._httpd.server_port
    server.stop()


@pytest.fixture
def gs(gs_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleStorage]:
    """That server, as an endpoint's environment names it."""
    with google_storage(gs_port, monkeypatch) as made:
        yield made

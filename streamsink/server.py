"""The endpoint as a whole: one port, its sessions, and the way it ends.

uvicorn listens and speaks HTTP; upgrades go to :class:`~streamsink.connection.Connection`. SIGTERM only marks
draining: the listener stays open for 503s, a failing readyz and late webhooks until the last stream has ended or the
deadline has come; then uvicorn's own shutdown runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import linecache
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import structlog
import uvicorn
from starlette.types import ASGIApp

from streamsink import tls
from streamsink.auth import (
    ADMIN_TOKEN_FILE,
    STATUS_SECRET_FILE,
    STREAM_TOKEN_FILE,
    TokenBook,
    make_or_load_token,
)
from streamsink.bus import Bus, open_bus
from streamsink.config import Settings, Token
from streamsink.connection import Connection
from streamsink.disk import DiskSpace
from streamsink.endpoint import Endpoint
from streamsink.errors import ConfigError, SpeechError
from streamsink.loop import SWITCH_INTERVAL, new_event_loop, raise_open_file_limit
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin, find
from streamsink.processors.repair import repair_all
from streamsink.processors.writer import failures, writer
from streamsink.siblings import Siblings
from streamsink.speech.transcription_counts import counts
from streamsink.watchdog import Watchdog
from streamsink.web.app import Web
from streamsink.web.http import HEAD_LIMIT, HttpProtocol

log = structlog.get_logger(__name__)

BACKLOG = 2048
HOUSEKEEPING = 1.0
"""Seconds between looks at the certificate's files and at silent streams."""
STOP_SECONDS = 22.0
"""Seconds for processors to finish once their streams are closed: on_start may take ten, on_stop ten more."""

DELIVERY_SECONDS = 10.0
"""Seconds for a first try of what is still to be uploaded or told; what does not make it is for the next start."""


class Access(NamedTuple):
    """The secrets of an endpoint, and where those lie that it made itself."""

    tokens: TokenBook | None
    """None: no token is asked for."""
    made_token: str | None
    """The stream token, where none was given and it may be shown."""
    token_file: Path | None
    admin: TokenBook
    admin_file: Path | None
    status_secret: str


def access(settings: Settings) -> Access:
    """Collect the secrets, making those that are not given.

    Raises:
        ConfigError: A kept one cannot be read or written.
    """
    made_token = token_file = admin_file = None
    tokens = None
    if not settings.no_auth:
        given = list(settings.tokens)
        if not given:
            made_token, token_file, _ = make_or_load_token(settings.state, STREAM_TOKEN_FILE)
            given = [Token(name="default", value=made_token)]  # type: ignore[arg-type]
        tokens = TokenBook(given)
    admin_token = settings.admin_token
    if admin_token is None:
        value, admin_file, _ = make_or_load_token(settings.state, ADMIN_TOKEN_FILE)
        admin = TokenBook([Token(name="admin", value=value)])  # type: ignore[arg-type]
    else:
        admin = TokenBook([Token(name="admin", value=admin_token)])
    secret, _, _ = make_or_load_token(settings.state, STATUS_SECRET_FILE)
    return Access(tokens, made_token, token_file, admin, admin_file, secret)


class Server:
    """A streamsink endpoint.

    Args:
        settings: What to serve and how; the defaults when left out.
        listener: The port, where another process has taken it.
        siblings: The endpoint's other processes; None where there is but this one.

    Raises:
        ConfigError: A certificate, token file or setting cannot be used.
        ProcessorError: A pipeline names a processor that cannot be found or built.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        listener: socket.socket | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.settings = settings if settings is not None else Settings()
        self.access = access(self.settings)
        DiskSpace(self.settings.min_free).check(self.settings.recordings)
        self.metrics = Metrics()
        self.metrics.register(counts)
        self.metrics.register(failures)
        self.pipelines: dict[str, list[Plugin]] = {
            name: [find(spec) for spec in pipeline.processors] for name, pipeline in self.settings.pipelines.items()
        }
        # Whether a processor is no use without what speaks, and whether one may use it.
        self._must_speak = self._may_speak = False
        # What those are told to speak with, who are no use without.
        self._voices: set[str] = set()
        self.room_processors: dict[str, list[Plugin]] = {
            pattern: [find(spec) for spec in room.processors] for pattern, room in self.settings.rooms.items()
        }
        for plugins in [*self.pipelines.values(), *self.room_processors.values()]:
            for plugin in plugins:
                # Options that do not fit are told now, not by every stream.
                says = plugin.build().says
                self._must_speak |= says is True
                voice = plugin.options.get("voice")
                if says is True and isinstance(voice, str):
                    self._voices.add(voice)
                self._may_speak |= says is None and plugin.calls_say
        if self.settings.workers > 1 and self.settings.bus is None:
            _refuse_mix(self.pipelines)
        if self.settings.bus is not None:
            # A URL that cannot be used is told now.
            open_bus(self.settings.bus)
        self.certificate: Path | None = None
        self._context: ssl.SSLContext | None = None
        self._reloader: tls.CertificateReloader | None = None
        if not self.settings.no_tls:
            self._load_certificate()
        self._socket = listener
        self.siblings = siblings
        self._bus: Bus | None = None
        self._endpoint: Endpoint | None = None
        self._uvicorn: _Uvicorn | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watchdog: Watchdog | None = None
        self._warming: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        # The process's and the event loop's, to be put back.
        self._switch_interval = sys.getswitchinterval()
        self._handler_before: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = None

    def _load_certificate(self) -> None:
        cert, key = self.settings.cert, self.settings.key
        if cert is None or key is None:
            host = urlsplit(self.settings.public_url).hostname if self.settings.public_url else None
            made = tls.self_signed(self.settings.state, [host] if host else [])
            cert, key = made.cert, made.key
        self.certificate = cert
        self._context = tls.server_context(cert, key)
        self._reloader = tls.CertificateReloader(self._context, cert, key)

    # --- Where it is -------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> Endpoint:
        """What the sessions share; there once the server has started."""
        assert self._endpoint is not None, "the server has not been started"
        return self._endpoint

    @property
    def listener(self) -> socket.socket:
        """The port, once it is bound."""
        assert self._socket is not None, "the port has not been bound"
        return self._socket

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        """The URL that reaches it on this machine."""
        scheme = "ws" if self.settings.no_tls else "wss"
        host = self.settings.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def public_url(self) -> str:
        """The URL a platform is told: the setting, or this machine's name and the port."""
        if self.settings.public_url:
            return self.settings.public_url
        host = self.settings.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        scheme = "ws" if self.settings.no_tls else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/"

    # --- Start -------------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Take the port.

        Raises:
            ConfigError: It cannot be had.
        """
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            # The address is told once; what the resolver says has numbers below zero and words of its own.
            cause = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise ConfigError(
                f"cannot listen on {host} port {port}: {cause}; choose another with --host and --port"
            ) from None
        self._socket.setblocking(False)

    async def start(self) -> None:
        """Listen. Streams are taken from here on.

        Raises:
            ConfigError: The port cannot be had.
            SpeechError: A processor says texts, and there is nothing that could speak.
        """
        if self._socket is None:
            self.bind()
        loop = asyncio.get_running_loop()
        endpoint = self._endpoint = Endpoint(self.settings, self.pipelines, self.metrics, loop, self.room_processors)
        if self._must_speak:
            await self._get_ready_to_speak(endpoint)
        self._handler_before = loop.get_exception_handler()
        loop.set_exception_handler(_on_loop_exception)
        self.metrics.register(endpoint.disk)
        self.metrics.register(endpoint.rooms)
        self.metrics.register(endpoint.delivery)
        endpoint.delivery.start()
        self.metrics.watch(endpoint.sessions)
        folders = self._folders()
        writer.encode(lambda: repair_all(folders))
        if self.settings.bus is not None:
            endpoint.rooms.bus = self._bus = open_bus(self.settings.bus)
            await self._bus.open()
        if self.siblings is not None:
            self.siblings.on("metrics", lambda sender, body: self.metrics.render()[0])
            endpoint.join(self.siblings)
        web = Web(endpoint, self.access.admin, self.access.status_secret)
        self._uvicorn = _Uvicorn(self._uvicorn_config(web.app(), endpoint))
        self._tasks = [
            asyncio.create_task(self._uvicorn.serve(sockets=[self.listener])),
            asyncio.create_task(self._housekeeping()),
        ]
        listening = asyncio.ensure_future(self._uvicorn.listening.wait())
        await asyncio.wait({listening, self._tasks[0]}, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            listening.cancel()
            await self._tasks[0]
        # What is imported and made by now stays: a full collection would walk it, 7 ms, again and again.
        gc.collect()
        gc.freeze()
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        if self._may_speak and not self._must_speak:
            self._warming = asyncio.create_task(self._warm(endpoint))
        self._watchdog = Watchdog(loop, self.metrics.observe_lag)
        self._watchdog.start()

    async def _get_ready_to_speak(self, endpoint: Endpoint) -> None:
        try:
            await endpoint.synthesizer.open()
            for voice in sorted(self._voices):
                await endpoint.synthesizer.try_voice(voice)
        except SpeechError:
            await endpoint.synthesizer.close()
            if self._socket is not None:
                self._socket.close()
            raise

    async def _warm(self, endpoint: Endpoint) -> None:
        """Start what speaks before it is asked to: the first text would wait for it for a quarter of a second."""
        try:
            await endpoint.synthesizer.open()
        except SpeechError as error:
            log.warning("a processor that wants to say something cannot", cause=str(error))

    def _folders(self) -> list[Path]:
        """Where recordings may lie: the endpoint's folder, and those of processors that have one of their own."""
        own = [plugin.options.get("directory") for plugins in self.pipelines.values() for plugin in plugins]
        return list(dict.fromkeys([self.settings.recordings, *(path for path in own if isinstance(path, Path))]))

    def _uvicorn_config(self, app: ASGIApp, endpoint: Endpoint) -> uvicorn.Config:
        # uvicorn builds these classes itself, so what they need beyond its own arguments hangs on the class.
        ws = type("EndpointConnection", (Connection,), {"endpoint": endpoint, "tokens": self.access.tokens})
        http = type(
            "EndpointHttp",
            (HttpProtocol,),
            {"deadline": self.settings.head_deadline, "refused": staticmethod(self.metrics.handshake_refused)},
        )
        context = self._context
        return uvicorn.Config(
            app,
            http=http,
            ws=ws,
            ssl_context_factory=None if context is None else lambda config, default: context,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=HEAD_LIMIT,
        )

    async def _housekeeping(self) -> None:
        trimmed_at = 0
        while True:
            before = self.endpoint.clock()
            await asyncio.sleep(HOUSEKEEPING)
            if self._reloader is not None:
                self._reloader.check()
            now = self.endpoint.clock()
            # After a standstill of our own what came meanwhile has yet to be read.
            if now - before < HOUSEKEEPING + 1:
                for session in list(self.endpoint.sessions):
                    session.check_silence(now)
            ended = self.metrics.streams_ended
            if ended != trimmed_at and not self.endpoint.sessions:
                # Ended streams leave cycles of objects, and the allocator keeps what it has: give both back when idle.
                trimmed_at = ended
                # Sources that tracebacks showed: small, but enough to hold on to pages all over the heap.
                linecache.clearcache()
                gc.collect()
                _trim()

    # --- End ---------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Take no more streams and wait until the live ones have ended, ``drain_seconds`` at most."""
        self.endpoint.draining = True
        log.info("draining", streams=len(self.endpoint.sessions), seconds=self.settings.drain_seconds)
        waiting = [asyncio.ensure_future(self._streams_ended()), asyncio.ensure_future(self._hurry.wait())]
        await asyncio.wait(waiting, timeout=self.settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    async def _streams_ended(self) -> None:
        while self.endpoint.sessions:
            await next(iter(self.endpoint.sessions)).done.wait()

    async def stop(self) -> None:
        """End: close what is still open with 1001, let processors finish, close the port."""
        self.endpoint.draining = True
        for session in list(self.endpoint.sessions):
            session.close(1001, "the endpoint is shutting down", "shutdown")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._streams_ended()
                await self.endpoint.rooms.close("shutdown")
        if self._bus is not None:
            await self._bus.close()
        assert self._uvicorn is not None
        self._uvicorn.should_exit = True
        serving, housekeeping = self._tasks
        housekeeping.cancel()
        await serving
        with contextlib.suppress(asyncio.CancelledError):
            await housekeeping
        if self._watchdog is not None:
            self._watchdog.stop()
        await asyncio.to_thread(self.endpoint.detectors.close)
        await self.endpoint.synthesizer.close()
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait({self._warming})
        await asyncio.to_thread(self.endpoint.delivery.close, DELIVERY_SECONDS)
        asyncio.get_running_loop().set_exception_handler(self._handler_before)
        # The program this ran in may go on.
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()
        log.info("stopped")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def serve(self) -> None:
        """Start, run until SIGTERM or SIGINT, drain and stop. A second signal ends the draining."""
        loop = asyncio.get_running_loop()
        told = asyncio.Event()

        def on_signal() -> None:
            if told.is_set():
                self._hurry.set()
            told.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        if self.siblings is not None:
            self.siblings.open(on_signal)
        try:
            await self.start()
            self.started()
            await told.wait()
            await self.drain()
            await self.stop()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            if self.siblings is not None:
                self.siblings.close()

    def started(self) -> None:
        """Called by :meth:`serve` once the port is open; a program may override it to say so."""

    def run(self) -> None:
        """Serve on an event loop of its own until SIGTERM or SIGINT.

        Raises:
            ConfigError: The port cannot be had.
        """
        raise_open_file_limit()
        # Not asyncio.Runner: it waits without end for a hook that swallows its cancellation.
        loop = new_event_loop()
        try:
            loop.run_until_complete(self.serve())
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        finally:
            loop.close()


def _refuse_mix(pipelines: Mapping[str, list[Plugin]]) -> None:
    for name, plugins in pipelines.items():
        if any(plugin.name == "mix" for plugin in plugins):
            raise ConfigError(
                f"--workers is above 1 and the pipeline {name} has mix: members of a room may land in different "
                "processes, which hear each other over a bus; start one (`nats-server -a 127.0.0.1`) and name it with "
                "--bus nats://127.0.0.1:4222, or serve with one worker"
            )


def _trim() -> None:
    """Give freed memory back to the system, where the C library has a call for that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _on_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the event loop reports; a TLS handshake that fails is a stranger's affair and no error of ours."""
    if str(context.get("message", "")).startswith("SSL handshake failed"):
        log.debug("TLS handshake failed", cause=str(context.get("exception")))
    else:
        loop.default_exception_handler(context)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process by the signal instead of with status 0."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

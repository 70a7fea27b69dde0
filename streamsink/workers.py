"""Several processes on one port: each serves streams on an event loop of its own, the supervisor only keeps them.

The supervisor takes the port and hands the listening socket to every worker, so that a connection goes to whoever
accepts it first. A worker that dies is started again: its streams are lost, nobody else's are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import structlog

from streamsink import log as logs
from streamsink.config import Settings
from streamsink.errors import StreamsinkError
from streamsink.server import Server
from streamsink.siblings import Hub, Siblings

log = structlog.get_logger(__name__)

RESTART_WAIT = 1.0
"""Seconds between the death of a worker and the start of its successor: one that cannot start does not spin."""
_spawn = multiprocessing.get_context("spawn")


class Supervisor:
    """Runs the workers of an endpoint.

    Args:
        server: Checked and bound in this process, served in the workers; its ``started`` is called here, once all of
            them listen.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._count = server.settings.workers
        self._hub = Hub()
        self._workers: dict[int, BaseProcess] = {}
        # When each dead worker is started again, monotonic.
        self._restarts: dict[int, float] = {}
        # Those that listened at least once.
        self._ready: set[int] = set()
        self._failed: int | None = None
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; all workers drain then, and a second signal ends the draining.

        Raises:
            ConfigError: The port cannot be had.
            StreamsinkError: A worker could not start.
        """
        self._server.bind()
        with self._server.listener, _waking_on_signals(self._on_signal) as woken:
            for number in range(self._count):
                self._start(number)
            announced = False
            while self._workers or self._restarts:
                self._wait(woken)
                self._reap()
                self._restart()
                if not announced and len(self._ready) == self._count:
                    announced = True
                    self._server.started()
        if self._failed is not None:
            raise StreamsinkError(f"worker {self._failed} could not start; what it said stands above")
        log.info("stopped", workers=self._count)

    def _on_signal(self) -> None:
        self._stopping = True
        self._restarts.clear()
        for worker in self._workers.values():
            # The first makes it drain, the second ends the draining: what it does with a signal of its own.
            worker.terminate()

    def _start(self, number: int) -> None:
        theirs = self._hub.add(number)
        worker = _spawn.Process(
            target=work,
            args=(self._server.settings, self._server.listener, theirs, number),
            name=f"streamsink-{number}",
        )
        worker.start()
        theirs.close()
        self._workers[number] = worker

    def _wait(self, woken: socket.socket) -> None:
        """Wait for whatever comes first and pass messages on."""
        ends = self._hub.ends
        sentinels = [worker.sentinel for worker in self._workers.values()]
        timeout = max(0.0, min(self._restarts.values()) - time.monotonic()) if self._restarts else None
        for item in wait([woken, *ends, *sentinels], timeout):
            if item is woken:
                woken.recv(64)
            elif isinstance(item, socket.socket):
                ready = self._hub.relay(item)
                if ready is not None:
                    self._ready.add(ready)

    def _reap(self) -> None:
        for number, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[number]
            self._hub.remove(number)
            if self._stopping:
                continue
            if number not in self._ready:
                self._failed = number
                self._on_signal()
            else:
                log.error("a worker died and is started again", worker=number, status=worker.exitcode)
                self._restarts[number] = time.monotonic() + RESTART_WAIT

    def _restart(self) -> None:
        now = time.monotonic()
        for number, due in list(self._restarts.items()):
            if due <= now:
                del self._restarts[number]
                self._start(number)


@contextlib.contextmanager
def _waking_on_signals(call: Callable[[], None]) -> Iterator[socket.socket]:
    """Call something on SIGTERM and SIGINT; what is yielded has then something to read."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    before = {number: signal.signal(number, lambda number, frame: call()) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        woken.close()
        waker.close()


def work(settings: Settings, listener: socket.socket, end: socket.socket, number: int) -> None:
    """Be one worker."""
    # A session of its own: Ctrl-C is for the supervisor, which passes it on.
    os.setsid()
    logs.configure(settings.log_format, settings.log_level, worker=number)
    try:
        _Worker(settings, listener=listener, siblings=Siblings(end, number, settings.workers)).run()
    except StreamsinkError as error:
        sys.exit(f"streamsink: worker {number}: {error}")


class _Worker(Server):
    def started(self) -> None:
        """Tell the supervisor, not the user."""
        assert self.siblings is not None
        self.siblings.ready()

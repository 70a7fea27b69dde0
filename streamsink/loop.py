"""The event loop: uvloop with aiofastnet's TLS where they can be had, and the deadlines uvicorn does not set."""

from __future__ import annotations

import asyncio
import errno
import importlib
import math
import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import structlog

log = structlog.get_logger()

TLS_HANDSHAKE_DEADLINE = 10.0
"""Seconds a client has for its TLS handshake; the event loops allow 60."""
TLS_SHUTDOWN_DEADLINE = 5.0
"""Seconds a client has to answer our closing of TLS; the event loops allow 30, which draining would wait for."""

TLS_BUFFER = 17 * 1024
"""Bytes of each of aiofastnet's two buffers a connection: one whole TLS record, which is more than any frame.

Measured: a connection takes 40 kB of memory, handshake done; one that has sent a burst of 60 kB takes 10 kB more with
this size, and 110 kB more with aiofastnet's own, which grows to 526 kB under larger bursts.
"""

KEEPALIVE_IDLE = 30
"""Seconds of silence before the first keepalive probe."""
KEEPALIVE_INTERVAL = 10
"""Seconds between probes."""
KEEPALIVE_PROBES = 3
"""Probes without an answer that end a connection: a dead peer is gone after a minute."""
USER_TIMEOUT_MS = 60_000
"""Milliseconds that sent data may stay unacknowledged (TCP_USER_TIMEOUT, RFC 5482); keepalive does not probe then."""

SWITCH_INTERVAL = 0.0005
"""Seconds a thread may keep the interpreter from the loop (`sys.setswitchinterval`); Python's own 5 ms are long.

Measured with 300 streams recorded on one core: the writing thread then keeps the loop waiting 1.2 ms at p99.9, one of
them the timer's own, instead of 2.2.
"""

# Seconds between two log lines about the same shortage.
_TELL_AGAIN = 10.0


def new_event_loop(
    *,
    tls_handshake_deadline: float = TLS_HANDSHAKE_DEADLINE,
    tls_shutdown_deadline: float = TLS_SHUTDOWN_DEADLINE,
) -> asyncio.AbstractEventLoop:
    """Make the fastest event loop to be had here: uvloop, else asyncio's; under it aiofastnet, if it is there.

    It is also set as the thread's current loop, as `asyncio.Runner` expects of a factory.

    Args:
        tls_handshake_deadline: For every TLS server on it that names none; s.
        tls_shutdown_deadline: Likewise.
    """
    uvloop = _import("uvloop")
    loop: asyncio.AbstractEventLoop = asyncio.new_event_loop() if uvloop is None else uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    aiofastnet = _import("aiofastnet")
    tls = {"ssl_handshake_timeout": tls_handshake_deadline, "ssl_shutdown_timeout": tls_shutdown_deadline}
    if aiofastnet is not None:
        aiofastnet.patch_loop(loop)
        tls |= {"ssl_incoming_bio_size": TLS_BUFFER, "ssl_outgoing_bio_size": TLS_BUFFER}
    wrap = _Listener.over if aiofastnet is not None else None
    # setattr: to a type checker a method is not there to be replaced.
    setattr(loop, "create_server", partial(_create_server, loop.create_server, tls, wrap))  # noqa: B010
    return loop


async def _create_server(
    create_server: Callable[..., Any],
    tls: dict[str, float],
    wrap: Callable[[socket.socket], socket.socket] | None,
    *args: Any,
    ssl: Any = None,
    sock: socket.socket | None = None,
    **options: Any,
) -> asyncio.Server:
    # All of these are errors for a server without TLS.
    if ssl is not None:
        options = {**tls, **options}
    if sock is not None and wrap is not None:
        sock = wrap(sock)
    server: asyncio.Server = await create_server(*args, ssl=ssl, sock=sock, **options)
    return server


class _Listener(socket.socket):
    """A listening socket that turns connections away when the process has no file descriptor left for them.

    aiofastnet 1.2 trips over itself there: it asks the socket, not the loop, to stop watching. The loop would spin on a
    connection it cannot take, and log it 100,000 times a second.
    """

    _listening: socket.socket
    _spare: int
    _told_at: float

    @classmethod
    def over(cls, listening: socket.socket) -> _Listener:
        """Take over a socket, which can still be asked for its address, and is closed with this one."""
        listener = cls(fileno=os.dup(listening.fileno()))
        listener._listening = listening
        listener._spare = os.open(os.devnull, os.O_RDONLY)
        listener._told_at = -math.inf
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """Take a connection, or close it at once and say that it was aborted, which loops pass over."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            cause = error
        # One descriptor is held back, so that the waiting connection can be taken off the queue.
        os.close(self._spare)
        try:
            super().accept()[0].close()
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        if time.monotonic() - self._told_at > _TELL_AGAIN:
            self._told_at = time.monotonic()
            log.error("turned connections away: no file descriptor left; raise the limit of open files (ulimit -n)")
        raise ConnectionAbortedError from cause

    def close(self) -> None:
        """Close it, what it took over and what was held back."""
        if self.fileno() >= 0:
            os.close(self._spare)
            self._listening.close()
        super().close()


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def tune(sock: socket.socket) -> None:
    """Set up an accepted connection: frames leave at once, and a peer that has vanished is found out within a minute.

    Pings cannot do that: the platform answers none of them.

    Args:
        sock: A TCP socket, or asyncio's view of one.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        # Each is Linux's name; other systems lack one or the other.
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def raise_open_file_limit() -> int:
    """Allow this process as many open files as it may have: the usual 1,024 would end at a thousand streams.

    Returns:
        The limit now in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard

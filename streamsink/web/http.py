"""HTTP/1.1 as uvicorn speaks it, with deadlines and limits on what a stranger may send."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY_LIMIT = 64 * 1024
"""Bytes of a request's body."""
HEAD_LIMIT = 16 * 1024
"""Bytes of a request's head; for uvicorn's ``h11_max_incomplete_event_size``."""


class HttpProtocol(H11Protocol):
    """uvicorn's protocol; a request's head and its body must each be whole within ``deadline`` seconds.

    An upgrade leaves this class: what came behind its head goes along.
    """

    deadline: float = 10.0
    """Seconds; the server's subclass sets it."""

    _timer: asyncio.TimerHandle | None = None
    _timer_for: object = None
    _body_octets = 0
    _upgraded = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The event loop tells nobody of a TLS handshake that fails.
        self._timer = self.loop.call_later(self.deadline, self.refused, "tls")

    @staticmethod
    def refused(reason: str) -> None:
        """Called with a fixed word for each connection that never became a request; the server's subclass counts it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection, TLS done: its first request's head is awaited."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._unwatch()
        self._watch()

    def handle_events(self) -> None:
        """Take what the bytes amount to: those that arrive, and those of a pipelined request when its turn has come."""
        cycle, before = self.cycle, len(self.cycle.body) if self.cycle is not None else 0
        super().handle_events()
        if self._upgraded or self.transport.is_closing():
            return
        if self.cycle is not None:
            # The application takes nothing out meanwhile: by what the body has grown, so much came.
            self._body_octets = (
                self._body_octets + len(self.cycle.body) - before if self.cycle is cycle else len(self.cycle.body)
            )
            if self._announced() > BODY_LIMIT or self._body_octets > BODY_LIMIT:
                self._refuse(b"413 Content Too Large", b"a request's body may have 65536 bytes\n")
                return
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in a body too, whatever became of its request meanwhile."""
        self.refused("invalid")
        self._refuse(b"400 Bad Request", msg.encode("ascii") + b"\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._unwatch()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection to the WebSocket class, and what came behind the head too."""
        self._upgraded = True
        self._unwatch()
        behind, _ = self.conn.trailing_data
        super().handle_websocket_upgrade(event)
        if behind and not self.transport.is_closing():
            self.transport.get_protocol().data_received(behind)  # type: ignore[attr-defined]

    def _announced(self) -> int:
        if self.conn.their_state is not h11.SEND_BODY:
            return 0
        lengths = [value for name, value in self.headers if name == b"content-length"]
        return int(lengths[0]) if lengths else 0

    def _watch(self) -> None:
        """Run one timer for each head and each body, from its first moment on."""
        state = self.conn.their_state
        # Between two requests of one connection uvicorn's own keep-alive timer runs until bytes come.
        waiting_for = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if waiting_for is not self._timer_for:
            self._unwatch()
            if waiting_for is not None:
                self._timer_for = waiting_for
                self._timer = self.loop.call_later(self.deadline, self._too_late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._timer_for = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            if self._timer_for is h11.IDLE:
                self.refused("timeout")
            self._refuse(b"408 Request Timeout", b"the request was not whole in time\n")

    def _refuse(self, status: bytes, text: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n"
                b"content-length: " + str(len(text)).encode("ascii") + b"\r\n\r\n" + text
            )
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # A body that nobody takes any more stops the reading, and TLS ends only once the peer's goodbye is read.
        self.flow.resume_reading()
        self.transport.close()

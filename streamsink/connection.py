"""Bytes ⇄ Session: the WebSocket over one connection.

uvicorn hands an upgrade request to :class:`Connection`. It checks the token and the path before anything else, then
takes frames. The common frame, a whole masked text message, is cut out and unmasked here and goes straight to the
session; every other frame goes whole to websockets' sans-I/O engine, which so always stands at a frame's border and
judges the rest of RFC 6455.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import structlog
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.speedups import apply_mask

from streamsink.auth import REFUSAL_BODY, Refusal
from streamsink.capture import Capture
from streamsink.endpoint import Endpoint
from streamsink.errors import BinaryMessage, InvalidText, MessageTooBig, ProtocolError
from streamsink.loop import tune
from streamsink.session import Session

if TYPE_CHECKING:
    from uvicorn import Config
    from uvicorn.server import ServerState

    from streamsink.auth import TokenBook

log = structlog.get_logger(__name__)

CLOSE_TIMEOUT = 5.0
"""Seconds a peer has to answer our close frame."""
LINGER = 1.0
"""Seconds a failed connection is still read, so that the close frame is not lost to a TCP reset."""
WRITE_HIGH_WATER = 256 * 1024
"""Bytes unsent at which a peer is held back until its stream tells how much is two seconds of its audio; four times
as many end the connection."""
STALL_LIMIT = 10.0
"""Seconds a peer may leave so much unread that its audio waits: what is played meanwhile is not sent."""
MAX_FRAGMENTS = 1024
"""Fragments of one message; empty ones cost nothing against the size limit."""
PING_INTERVAL = 20.0
"""Seconds; pings keep proxies awake. A missing pong closes nothing: the platform's own library sends none."""
RETRY_AFTER = "5"
"""Seconds, told to a peer that is refused for now."""

_TEXT = 0x81
_MASKED_TEXT = b"\x81\xfe"
"""A final, masked text frame of 126 to 65,535 bytes: what media messages are."""
# The engine's own logger tells heads, tokens and payloads at debug level.
_SILENT = logging.Logger("streamsink.websockets", logging.CRITICAL + 1)
_PLAIN_OPCODES = frozenset({0x0, 0x1, 0x2, 0x8, 0x9, 0xA})


class Connection(asyncio.Protocol):
    """One peer's connection from the upgrade on.

    uvicorn makes it with its own arguments; ``endpoint`` and ``tokens`` come from a subclass that the server makes.
    """

    endpoint: Endpoint
    tokens: TokenBook | None
    """None: no token is asked for."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        self._connections = server_state.connections
        self._transport: asyncio.Transport
        self._client = "?"
        self._engine = ServerProtocol(max_size=self.endpoint.settings.max_message_bytes, logger=_SILENT)
        self._limit = self.endpoint.settings.max_message_bytes
        self._session: Session | None = None
        self._capture: Capture | None = None
        # Bytes of a frame that is not whole yet.
        self._rest = b""
        # Of a message that comes in fragments; None between messages.
        self._fragments: list[bytes] | None = None
        # Frames to send when the bytes of one read are through; None outside of that.
        self._corked: list[bytes] | None = None
        self._closing = False
        # While more is unsent than the transport is told to hold.
        self._stalled = False
        self._timers: list[asyncio.TimerHandle] = []
        self._ping_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- asyncio's side ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is ours now."""
        self._connections.add(self)  # type: ignore[arg-type]
        # A transport of aiofastnet is none of asyncio's by class, only by what it does.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        peer = transport.get_extra_info("peername")
        self._client = f"{peer[0]}:{peer[1]}" if peer else "?"
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            tune(sock)

    def data_received(self, data: bytes) -> None:
        """Bytes arrived: first the upgrade request, then frames."""
        if self._session is None:
            if self._engine.state is State.CONNECTING and not self._closing:
                self._handshake(data)
            return
        if self._engine.eof_sent:
            return
        length = len(data) - 8
        try:
            # Nearly every read is one whole media message, alone: nothing to split, nothing to cork.
            if (
                data[:2] == _MASKED_TEXT
                and int.from_bytes(data[2:4], "big") == length
                and length <= self._limit
                and not self._rest
                and self._fragments is None
                and not self._closing
            ):
                self._text(apply_mask(data[8:], data[4:8]), self.endpoint.clock())
            else:
                self._take_corked(data)
        except Exception:
            log.exception("a message could not be taken", client=self._client)
            self._session.close(1011, "internal error", "error")

    def eof_received(self) -> None:
        """The peer sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._connections.discard(self)
        for timer in self._timers:
            timer.cancel()
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._session is not None:
            self._session.end(1006, "the connection was lost", "lost")
        if self._capture is not None:
            self._capture.close()

    def pause_writing(self) -> None:
        """The peer does not read: audio waits."""
        self._stalled = True
        self._stall_timer = self.endpoint.loop.call_later(STALL_LIMIT, self._drop)
        if self._session is not None:
            self._session.writable(False)

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._stalled = False
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._session is not None:
            self._session.writable(True)

    def shutdown(self) -> None:
        """The server ends for good: the time of draining is over."""
        if self._session is not None:
            self._session.close(1001, "the endpoint is shutting down", "shutdown")
        self._transport.close()

    # --- The upgrade -------------------------------------------------------------------------------------------------

    def _handshake(self, head: bytes) -> None:
        self._engine.receive_data(head)
        events = self._engine.events_received()
        if not events or not isinstance(events[0], Request):
            self._count_refusal("invalid")
            log.warning("handshake refused", client=self._client, reason="invalid", cause="not a valid HTTP request")
            self._flush_engine()
            self._transport.close()
            return
        request = events[0]
        path = unquote(request.path.partition("?")[0])
        response, token_name, pipeline = self._admit(request, path)
        if response is None:
            response = self._engine.accept(request)
            if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
                self._refused("invalid", path, f"not a WebSocket upgrade: {self._engine.handshake_exc}")
        self._engine.send_response(response)
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            self._open(request, path, token_name, pipeline)
            self._flush_engine()
        else:
            self._closing = True
            self._flush_engine()
            self._transport.close()

    def _admit(self, request: Request, path: str) -> tuple[Response | None, str, str | None]:
        """Check token, path and room, in this order: who has no token learns nothing of the paths."""
        token_name = "no-auth"
        if self.tokens is not None:
            match = self.tokens.match(request.headers.get_all("Authorization"))
            if isinstance(match, Refusal):
                self._refused(match.reason, path, match.explanation)
                response = self._engine.reject(HTTPStatus.UNAUTHORIZED, REFUSAL_BODY.decode("ascii"))
                response.headers["WWW-Authenticate"] = "Bearer"
                return response, "", None
            token_name = match
        try:
            pipeline = self.endpoint.pipeline_of(path)
        except KeyError:
            known = ", ".join("/" + name for name in sorted(self.endpoint.pipelines))
            self._refused("path", path, f"the path names no pipeline: expected / or one of {known}")
            return self._engine.reject(HTTPStatus.NOT_FOUND, "no pipeline has this name\n"), "", None
        if self.endpoint.draining or self.endpoint.full:
            if self.endpoint.full:
                limit = self.endpoint.settings.max_streams
                self._refused("full", path, f"{limit} streams are open: raise --max-streams or add an endpoint")
            else:
                self._refused("draining", path, "this endpoint is shutting down: another one must take the stream")
            response = self._engine.reject(HTTPStatus.SERVICE_UNAVAILABLE, "no room for a new stream now\n")
            response.headers["Retry-After"] = RETRY_AFTER
            return response, "", None
        return None, token_name, pipeline

    def _refused(self, reason: str, path: str, cause: str) -> None:
        self._count_refusal(reason)
        log.warning("handshake refused", client=self._client, path=path, reason=reason, cause=cause)

    def _count_refusal(self, reason: str) -> None:
        self.endpoint.metrics.handshake_refused(reason)

    def _open(self, request: Request, path: str, token_name: str, pipeline: str | None) -> None:
        loop = self.endpoint.loop
        now = self.endpoint.clock()
        self._session = Session(
            self.endpoint,
            self,
            path=path,
            pipeline=pipeline,
            client=self._client,
            token_name=token_name,
            now=now,
        )
        settings = self.endpoint.settings
        if settings.capture is not None:
            self._capture = Capture.open(settings.capture, request, now)
        self._timers.append(loop.call_later(settings.start_deadline, self._session.start_deadline))
        self._ping_later()

    # --- In: bytes to messages ---------------------------------------------------------------------------------------

    def _take_corked(self, data: bytes) -> None:
        """Take what was read; what is sent meanwhile leaves in one write."""
        self._corked = []
        try:
            self._split(data)
        finally:
            frames, self._corked = self._corked, None
            if frames:
                self._write(b"".join(frames) if len(frames) > 1 else frames[0])

    def _split(self, data: bytes) -> None:
        """Cut whole frames out of the stream; the common one goes straight to the session."""
        session = self._session
        assert session is not None
        if self._rest:
            data = self._rest + data
            self._rest = b""
        now = self.endpoint.clock()
        size = len(data)
        position = 0
        while size - position >= 2 and not self._engine.eof_sent:
            first, second = data[position], data[position + 1]
            length = second & 0x7F
            body = position + 6
            if length == 126:
                body = position + 8
                length = int.from_bytes(data[position + 2 : position + 4], "big")
            elif length == 127:
                body = position + 14
                length = int.from_bytes(data[position + 2 : position + 10], "big")
            if second < 0x80 or first & 0x0F not in _PLAIN_OPCODES or length > self._limit:
                # The engine refuses such a frame by its header alone.
                self._to_engine(data[position:], now)
                return
            end = body + length
            if end > size:
                break
            if first == _TEXT and self._fragments is None and not self._closing:
                text = apply_mask(data[body:end], data[body - 4 : body])
                self._text(text, now)
            else:
                self._to_engine(data[position:end], now)
            position = end
        self._rest = data[position:]

    def _text(self, text: bytes, now: float) -> None:
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError:
                self._fail(InvalidText("a text message is not UTF-8"))
                return
        if self._capture is not None:
            self._capture.write(text, now)
        self._session.receive(text, now)  # type: ignore[union-attr]

    def _to_engine(self, data: bytes, now: float) -> None:
        """Let the engine judge a frame that is not the common one."""
        self._engine.receive_data(data)
        try:
            for event in self._engine.events_received():
                assert isinstance(event, Frame)
                self._event(event, now)
        except ProtocolError as error:
            self._fail(error)
        self._flush_engine()
        exc = self._engine.parser_exc
        close = self._engine.close_sent
        if exc is not None and close is not None and not self._closing:
            self._session.end(close.code, close.reason, "policy")  # type: ignore[union-attr]
            self._linger(LINGER)
        elif self._engine.close_rcvd is not None and close is not None:
            # The peer closed, or answered our close.
            self._session.end(close.code, close.reason, "closed")  # type: ignore[union-attr]
            self._closing = True
            self._hang_up()

    def _event(self, frame: Frame, now: float) -> None:
        if frame.opcode is Opcode.BINARY:
            raise BinaryMessage("a binary message: this protocol is JSON text")
        if frame.opcode is Opcode.TEXT:
            self._fragments = []
        elif frame.opcode is not Opcode.CONT:
            return
        assert self._fragments is not None
        self._fragments.append(bytes(frame.data))
        if len(self._fragments) > MAX_FRAGMENTS:
            raise MessageTooBig(f"a message in more than {MAX_FRAGMENTS} fragments")
        if frame.fin:
            text = b"".join(self._fragments)
            self._fragments = None
            if not self._closing:
                self._text(text, now)

    def _fail(self, error: ProtocolError) -> None:
        self._session.close(error.close_code, str(error), "policy")  # type: ignore[union-attr]

    # --- Out: messages to bytes --------------------------------------------------------------------------------------

    def send(self, text: bytes) -> None:
        """Send one text message (RFC 6455 §5.2: a server's frames are not masked)."""
        length = len(text)
        if self._closing:
            return
        if length < 126:
            frame = bytes((_TEXT, length)) + text
        elif length < 65536:
            frame = b"\x81\x7e" + length.to_bytes(2, "big") + text
        else:
            frame = b"\x81\x7f" + length.to_bytes(8, "big") + text
        if self._corked is not None:
            self._corked.append(frame)
        else:
            self._write(frame)

    def limit_unsent(self, octets: int) -> None:
        """Let audio wait while more than that is unsent: it would only come late.

        Left alone, the kernel takes up to 4 MB, which is minutes of audio.
        """
        self._transport.set_write_buffer_limits(high=min(octets // 2, WRITE_HIGH_WATER))
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            # Linux doubles it, to have room for what it needs itself.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, octets // 4)

    def close(self, code: int, reason: str) -> None:
        """Close the WebSocket; what was sent before still leaves."""
        if self._closing:
            return
        self._closing = True
        if self._engine.state is State.OPEN:
            self._engine.send_close(code, _close_reason(reason))
            self._flush_engine()
        self._linger(CLOSE_TIMEOUT)

    def _flush_engine(self) -> None:
        for data in self._engine.data_to_send():
            # The empty one asks for a half-close, which TLS has not: the transport is closed instead, in time.
            if not data:
                continue
            if self._corked is not None:
                self._corked.append(data)
            else:
                self._write(data)

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._stalled and self._transport.get_write_buffer_size() > 4 * WRITE_HIGH_WATER:
            self._drop()

    def _drop(self) -> None:
        log.warning("peer does not read: connection dropped", client=self._client)
        self._closing = True
        self._transport.abort()

    def _linger(self, seconds: float) -> None:
        self._closing = True
        self._timers.append(self.endpoint.loop.call_later(seconds, self._transport.close))

    def _hang_up(self) -> None:
        """Close once what is corked has left."""
        self.endpoint.loop.call_soon(self._transport.close)

    def _ping_later(self) -> None:
        self._ping_timer = self.endpoint.loop.call_later(PING_INTERVAL, self._ping)

    def _ping(self) -> None:
        if not self._closing:
            self._engine.send_ping(b"")
            self._flush_engine()
            self._ping_later()


def _close_reason(text: str) -> str:
    """A close frame's reason: 123 bytes of UTF-8 at most (RFC 6455 §5.5)."""
    return text.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")

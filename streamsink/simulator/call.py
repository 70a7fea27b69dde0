"""One call: a stream's socket, from the upgrade to the close."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections import Counter
from typing import cast

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.uri import WebSocketURI

from streamsink import wire
from streamsink.codec import CodecSpec
from streamsink.errors import BadMessage, CallRefused
from streamsink.log import escape
from streamsink.simulator.far_end import Durations, EchoMatch, FarEnd
from streamsink.simulator.script import Step

OPEN_TIMEOUT = 10.0
"""Seconds for TCP, TLS and the upgrade of one call."""

_GOOD = frozenset({CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY, CloseCode.NO_STATUS_RCVD})


class Call(asyncio.Protocol):
    """One stream's socket: the upgrade, the script's messages out, the endpoint's messages in.

    `websockets` judges the WebSocket side; times are taken where bytes leave and arrive, by ``time.perf_counter``.

    Args:
        uri: The endpoint.
        turnaround: Takes the time from each frame to its reply.
        token: The bearer token; none is sent without.
        codec: How returned audio is encoded; None where a capture does not tell.
        writer: Writes this stream's messages; None in a replay, whose capture holds them all, echoes of marks included.
        keep: Keep returned audio.
        pong: Answer pings.

    Attributes:
        match: Pairs frames sent and returned.
        far_end: What the platform does with returned audio; None where the codec is not known.
        over: The script has been played, or cannot be played on.
        settled: It is over, and as many frames have come back as were sent, or none can come any more.
        closed: The connection has ended after an upgrade.
        opened_at: When the upgrade was done; 0 before.
        active_at: When a media message last left or arrived.
        close_code: The endpoint's close code, 1006 where it sent none.
        failure: Why the call failed, None while it has not.
        events: What else happened; see `Report`.
    """

    def __init__(
        self,
        uri: WebSocketURI,
        turnaround: Durations,
        *,
        token: str | None,
        codec: CodecSpec | None,
        writer: wire.PlatformWriter | None,
        keep: bool,
        pong: bool,
    ) -> None:
        self.match = EchoMatch(turnaround)
        self.far_end = FarEnd(codec, keep=keep) if codec is not None else None
        self.writer = writer
        self.over = asyncio.Event()
        self.settled = asyncio.Event()
        self.closed = asyncio.Event()
        self.opened_at = 0.0
        self.active_at = 0.0
        self.close_code: int | None = None
        self.failure: str | None = None
        self.events: Counter[str] = Counter()
        self._uri = uri
        self._token = token
        self._pong = pong
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        # SignalWire's Host is without the port; the engine leaves the usual one out.
        self._protocol = ClientProtocol(dataclasses.replace(uri, port=443 if uri.secure else 80))
        self._transport: asyncio.Transport | None = None
        self._text: bytes | None = None  # of a message whose last frame has not come
        self._mark_timer: asyncio.TimerHandle | None = None

    async def open(self, trust: ssl.SSLContext | None) -> None:
        """Connect and upgrade.

        Raises:
            CallRefused: It did not come about; the message says how to mend it.
        """
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._loop.create_connection(lambda: self, self._uri.host, self._uri.port, ssl=trust)
                await self._opened
        except OSError as error:
            raise CallRefused(_connect_failure(self._uri, error)) from None

    def perform(self, step: Step) -> None:
        """Do one step of the script; nothing once the call is over or closing."""
        if self.over.is_set() or self._protocol.state is not State.OPEN:
            return
        if step.text is None:
            self.events["skipped"] += step.media
            return
        if step.media:
            self.active_at = time.perf_counter()
            self.match.send(self.active_at)
        self.send(step.text)

    def send(self, text: bytes) -> None:
        """Send one text message; nothing where the stream is closing."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(text)
            self._flush()

    def finish(self) -> None:
        """Play no more of the script."""
        self.over.set()
        self._settle()

    def hang_up(self) -> None:
        """Stop and close, as the platform does."""
        if self._protocol.state is State.OPEN:
            if self.writer is not None:
                self._protocol.send_text(self.writer.stop())
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            self._flush()

    def abort(self, failure: str | None = None) -> None:
        """End the connection at once."""
        self.failure = self.failure or failure
        if self._transport is not None:
            self._transport.abort()

    # From the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade with exactly the headers SignalWire sends."""
        self._transport = cast(asyncio.Transport, transport)
        request = self._protocol.connect()
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        self._protocol.send_request(request)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what the endpoint sent."""
        now = time.perf_counter()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event, now)
            elif self._protocol.handshake_exc is None and not self._opened.done():
                self.opened_at = now
                self._opened.set_result(None)
        self._flush()
        if self._protocol.close_rcvd or self._protocol.handshake_exc or self._protocol.parser_exc:
            # Nothing more comes: both closes are exchanged, the upgrade was refused, or the peer broke the protocol.
            assert self._transport is not None
            self._transport.close()

    def eof_received(self) -> None:
        """Take the endpoint's end of the connection."""
        self._protocol.receive_eof()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell what became of the call."""
        if self._mark_timer is not None:
            self._mark_timer.cancel()
        if not self.opened_at:
            if not self._opened.done():
                self._opened.set_exception(CallRefused(_refusal(self._protocol.handshake_exc or exc)))
            return
        close = self._protocol.close_rcvd
        self.close_code = int(CloseCode.ABNORMAL_CLOSURE) if close is None else close.code
        self.failure = self.failure or self._ending(exc)
        self.over.set()
        self.settled.set()
        self.closed.set()

    def _ending(self, exc: Exception | None) -> str | None:
        """The sentence for an ending that is not the agreed one."""
        close, broken = self._protocol.close_rcvd, self._protocol.parser_exc
        if close is not None:
            why = f"{close.code} ({escape(close.reason)})" if close.reason else str(close.code)
            if not self.over.is_set():
                return f"the endpoint cut the call off with {why}; its log tells more"
            return f"the endpoint ended the stream with {why}; its log tells more" if close.code not in _GOOD else None
        if self.over.is_set():
            return "the endpoint ended the connection without answering the close; its log tells why"
        if broken is not None and not isinstance(broken, EOFError):
            return f"the endpoint broke the WebSocket protocol: {escape(str(broken))}"
        cause = f" ({exc})" if exc is not None else ""
        return f"the connection was lost in the middle of the call{cause}; is the endpoint still running?"

    def _flush(self) -> None:
        assert self._transport is not None
        for data in self._protocol.data_to_send():
            # An empty item asks for a half-close, which TLS does not have; the transport is closed instead. The low
            # half of a frame's first byte is its opcode (RFC 6455 §5.2).
            if data and (self._pong or data[0] & 0x0F != Opcode.PONG or not self.opened_at):
                self._transport.write(data)

    # From the endpoint.

    def _frame(self, frame: Frame, now: float) -> None:
        """Put messages together: the engine hands over frames, and a message may have many."""
        if frame.opcode is Opcode.TEXT:
            self._text = b""
        elif frame.opcode is Opcode.BINARY:
            self.events["bad"] += 1
        if frame.opcode in (Opcode.TEXT, Opcode.CONT) and self._text is not None:
            self._text += frame.data
            if frame.fin:
                self._message(self._text, now)
                self._text = None

    def _message(self, text: bytes, now: float) -> None:
        try:
            message = wire.decode_endpoint(text)
        except BadMessage:
            message = wire.EndpointMessage(event="unreadable")
        match message:
            case wire.EndpointMessage(event="media", media=wire.EndpointMedia(payload=payload)) if payload:
                self.active_at = now
                self.match.come_back(now)
                if self.far_end is not None:
                    self.far_end.media(payload, now - self.opened_at)
                self._settle()
            case wire.EndpointMessage(event="mark", mark=wire.MarkBody(name=name)):
                self.events["mark"] += 1
                if self.far_end is not None:
                    self.far_end.mark(name)
                    self._return_marks()
            case wire.EndpointMessage(event="clear"):
                self.events["clear"] += 1
                if self.far_end is not None:
                    self.far_end.clear(now - self.opened_at)
                    self._return_marks()
            case wire.EndpointMessage(event="dtmf", dtmf=wire.DtmfBody()):
                self.events["dtmf"] += 1
            case _:
                self.events["bad"] += 1

    def _settle(self) -> None:
        if self.over.is_set() and not self.match.missing:
            self.settled.set()

    def _return_marks(self) -> None:
        """Send back the marks whose audio has been played, and come again when the next one's has."""
        if self.far_end is None or self.writer is None:
            return
        if self._mark_timer is not None:
            self._mark_timer.cancel()
            self._mark_timer = None
        now = time.perf_counter() - self.opened_at
        for name in self.far_end.played(now):
            self.send(self.writer.mark(name))
        due = self.far_end.next_mark()
        if due is not None:
            self._mark_timer = self._loop.call_later(max(0.0, due - now), self._return_marks)


_MENDING = {
    401: "the endpoint did not accept the token. Give the one it was started with by --token; "
    "`streamsink serve` says at its start where it keeps one it has made",
    404: "the endpoint has no pipeline at this path. Use / or a path that its streamsink.toml names",
    503: "the endpoint is full or about to stop. Try again later, or raise its --max-streams",
}


def _refusal(error: Exception | None) -> str:
    """Why an upgrade failed, and how to mend it."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        body = escape(bytes(error.response.body).decode("utf-8", "replace").strip())
        answer = f"HTTP {status} {escape(error.response.reason_phrase)}".rstrip()
        mending = _MENDING.get(status, "no WebSocket endpoint answers there. Check host, port and path of --url")
        return f"refused with {answer}{f': {body}' if body else ''}: {mending}"
    cause = error.__cause__ if error is not None else None
    if error is None or isinstance(error, OSError) or isinstance(cause, EOFError):
        return (
            "the endpoint closed the connection without answering the upgrade. "
            "Does the port speak TLS? Then --url begins with wss://"
        )
    return f"what answers is no WebSocket endpoint: {escape(str(cause or error))}. Check host and port of --url"


def _connect_failure(uri: WebSocketURI, error: OSError) -> str:
    """Why no connection came about, and how to mend it."""
    where = f"{uri.host}:{uri.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {where} is not trusted: {error.verify_message.rstrip('.')}. "
            "Name the certificate to trust by --cafile, or accept any with --insecure"
        )
    if isinstance(error, ssl.SSLError) or (uri.secure and isinstance(error, ConnectionResetError)):
        cause = f": {error.reason}" if isinstance(error, ssl.SSLError) else ""
        return f"no TLS with {where}{cause}. Does the port speak plain WebSocket? Then --url begins with ws://"
    if isinstance(error, TimeoutError):
        return f"{where} did not answer within {OPEN_TIMEOUT:g} s. Check host and port of --url, and firewalls"
    return f"no connection to {where}: {error}. Is the endpoint running there? Start it with `streamsink serve`"

"""The platform's side by hand, over real sockets: what a test writes is what leaves, byte for byte."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import ssl
import struct
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from websockets.speedups import apply_mask

from streamsink.audio import Frame
from streamsink.codec import CodecSpec
from streamsink.processor import Processor
from streamsink.server import Server
from streamsink.status import StatusEvent
from streamsink.stream import Stream
from streamsink.tls import CERTIFICATE_FILE
from streamsink.web.http import HttpProtocol
from streamsink.wire import PlatformWriter

PATIENCE = 50.0
"""Seconds a test waits for what must come; only a test that fails gets there."""
TOKEN = "correct-horse-battery-staple"
ADMIN_TOKEN = "admin-horse-battery-staple"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
"""The key of RFC 6455 §1.3."""

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def upgrade(path: str = "/", token: str | None = TOKEN, *extra: str) -> bytes:
    """The upgrade request exactly as SignalWire's library sends it: Host without the port and nothing to spare."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        *([] if token is None else [f"Authorization: Bearer {token}"]),
        *extra,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def masked(
    data: bytes, opcode: int = TEXT, *, fin: bool = True, rsv: int = 0, mask: bytes = b"\x0b\xad\xca\xfe"
) -> bytes:
    """A client's frame (RFC 6455 §5.2)."""
    first = (128 if fin else 0) | rsv | opcode
    if len(data) < 126:
        head = bytes((first, 128 | len(data)))
    elif len(data) < 65536:
        head = bytes((first, 254)) + len(data).to_bytes(2, "big")
    else:
        head = bytes((first, 255)) + len(data).to_bytes(8, "big")
    return head + mask + apply_mask(data, mask)


def message(body: dict[str, Any]) -> bytes:
    """A text message of the platform's."""
    return masked(json.dumps(body).encode())


def start(sid: str, *, encoding: str = "audio/x-mulaw", rate: int = 8000, channels: int = 1, **body: Any) -> bytes:
    """A start message; what is given in ``body`` replaces what stands there."""
    media_format = {"encoding": encoding, "sampleRate": rate, "channels": channels}
    given = {"streamSid": sid, "accountSid": "account", "callSid": f"call-{sid}", "tracks": ["inbound"]}
    return message({"event": "start", "start": {**given, "mediaFormat": media_format, **body}})


def media(number: int, audio: bytes = bytes(160), /, **body: Any) -> bytes:
    """A media message; what is given in ``body`` replaces what stands there."""
    given = {"track": "inbound", "chunk": str(number), "payload": base64.b64encode(audio).decode()}
    return message({"event": "media", "sequenceNumber": str(number + 1), "media": {**given, **body}})


STOP = message({"event": "stop"})


class Listener(Processor):
    """Keeps what it is told; a test finds it by its stream's sid."""

    speaks = False
    _by_sid: ClassVar[defaultdict[str, list[Listener]]] = defaultdict(list)
    _waiters: ClassVar[list[asyncio.Future[None]]] = []

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.frames: list[Frame] = []
        self.statuses: list[StatusEvent] = []
        self.digits: list[str] = []
        self.stopped: str | None = None

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream
        self._by_sid[stream.sid].append(self)
        self._tell()

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._tell()

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        self.digits.append(digit)
        self._tell()

    def on_status(self, event: StatusEvent) -> None:
        self.statuses.append(event)
        self._tell()

    async def on_stop(self, reason: str) -> None:
        self.stopped = reason
        self._tell()

    @classmethod
    def _tell(cls) -> None:
        waiters, cls._waiters = cls._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    @classmethod
    async def _until(cls, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                waiter = asyncio.get_running_loop().create_future()
                cls._waiters.append(waiter)
                await waiter

    async def until(self, condition: Callable[[Self], bool]) -> None:
        """Wait until something is true of it."""
        await self._until(lambda: condition(self))

    @classmethod
    async def of(cls, sid: str, nth: int = 1) -> Listener:
        """The listener on the nth stream with this sid, once it has started."""
        await cls._until(lambda: len(cls._by_sid[sid]) >= nth)
        return cls._by_sid[sid][nth - 1]


LISTENER = "tests.peer:Listener"


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Received(NamedTuple):
    """A frame of the server's."""

    opcode: int
    data: bytes


class Peer:
    """One connection to an endpoint."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.sid = uuid.uuid4().hex

    @classmethod
    async def connect(cls, port: int, context: ssl.SSLContext | None, *, receive_buffer: int | None = None) -> Self:
        sock = socket.socket()
        try:
            if receive_buffer is not None:
                # Before connecting: the window is agreed on then.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            hostname = None if context is None else "localhost"
            # A small limit, so that what is not read stays in the sockets.
            reader, writer = await asyncio.open_connection(
                sock=sock, ssl=context, server_hostname=hostname, limit=65536
            )
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def response(self) -> Response:
        """Read one HTTP response."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = {}
            for line in lines:
                name, _, value = line.partition(": ")
                assert name.lower() not in headers, f"{name} is there twice"
                headers[name.lower()] = value
            status = int(status_line.split(" ")[1])
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = b"" if status < 200 or status == 204 else await self.reader.read()
        return Response(status, headers, body)

    async def upgraded(self, path: str = "/", token: str | None = TOKEN) -> Self:
        """Ask for a stream and expect to get it."""
        self.send(upgrade(path, token))
        response = await self.response()
        assert response.status == 101, response
        assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        return self

    async def frame(self) -> Received | None:
        """Read one frame; None when the connection ends instead."""
        async with asyncio.timeout(PATIENCE):
            try:
                first, length = await self.reader.readexactly(2)
                if length == 126:
                    (length,) = struct.unpack(">H", await self.reader.readexactly(2))
                elif length == 127:
                    (length,) = struct.unpack(">Q", await self.reader.readexactly(8))
                data = await self.reader.readexactly(length)
            except (asyncio.IncompleteReadError, OSError):
                return None
        assert first & 0x80, "the endpoint never fragments"
        return Received(first & 0x0F, data)

    async def text(self) -> dict[str, Any]:
        """Read one message."""
        frame = await self.frame()
        assert frame is not None
        assert frame.opcode == TEXT, frame
        body: dict[str, Any] = json.loads(frame.data)
        return body

    async def close_code(self) -> int:
        """Read up to the close frame, answer it, and see the connection end; 1006 when there was none."""
        while (frame := await self.frame()) is not None:
            if frame.opcode == CLOSE:
                self.send(masked(frame.data, CLOSE))
                assert await self.frame() is None
                return int.from_bytes(frame.data[:2], "big")
        return 1006

    async def ended(self) -> bytes:
        """All that still comes until the connection ends."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self.reader.read()
            except OSError:
                return b""

    def reset(self) -> None:
        """Vanish: a TCP reset, no TLS goodbye."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class HealthyStream:
    """A call in real time beside whatever else a test does; afterwards it must have been heard whole."""

    PTIME = 0.02

    def __init__(self, peer: Peer, token: str) -> None:
        self.peer = peer
        self._token = token
        self._writer = PlatformWriter(peer.sid)
        self._sent: list[bytes] = []
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._listener: Listener | None = None

    async def begin(self) -> Self:
        await self.peer.upgraded("/healthy", self._token)
        writer = self._writer
        begin = writer.start(account_sid="account", call_sid=self.peer.sid, encoding="audio/x-mulaw", sample_rate=8000)
        self.peer.send(masked(writer.connected()), masked(begin))
        self._due = asyncio.get_running_loop().time()
        self._tick()
        self._listener = await Listener.of(self.peer.sid)
        await self._heard()
        return self

    def _tick(self) -> None:
        self._send()
        # On absolute deadlines, as the platform does.
        self._due += self.PTIME
        self._timer = asyncio.get_running_loop().call_at(self._due, self._tick)

    def _send(self) -> None:
        chunk = len(self._sent) + 1
        payload = bytes((chunk * 7 + index) % 256 for index in range(160))
        self._sent.append(payload)
        self.peer.send(masked(self._writer.media(payload, chunk=chunk, timestamp_ms=20 * (chunk - 1))))

    async def _heard(self) -> None:
        assert self._listener is not None
        await self._listener.until(lambda listener: len(listener.frames) == len(self._sent))

    async def finish(self) -> None:
        """Stop, and assert that every frame was heard in its place."""
        assert self._timer is not None
        self._timer.cancel()
        for _ in range(3):
            self._send()
        self.peer.send(masked(self._writer.stop()))
        assert await self.peer.close_code() == 1000
        listener = self._listener
        assert listener is not None
        await listener.until(lambda listener: listener.stopped is not None)
        assert listener.stopped == "stop"
        count = len(self._sent)
        placed = [(frame.start, frame.lost, frame.sequence) for frame in listener.frames]
        assert placed == [(160 * index, 0, index + 2) for index in range(count)]
        wanted = CodecSpec.parse("PCMU").decoder().decode(b"".join(self._sent))
        assert np.array_equal(np.concatenate([frame.samples for frame in listener.frames]), wanted)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Running:
    """A server that runs in the test's event loop, and the way to it."""

    def __init__(self, server: Server, read_log: Callable[[], str]) -> None:
        self.server = server
        self._read_log = read_log
        self._peers: list[Peer] = []
        self._healthy: list[HealthyStream] = []
        self.context: ssl.SSLContext | None = None
        if not server.settings.no_tls:
            self.context = ssl.create_default_context(cafile=server.settings.state / CERTIFICATE_FILE)

    @property
    def log(self) -> str:
        return self._read_log()

    @property
    def recordings(self) -> Path:
        return self.server.settings.recordings

    async def connect(self, *, receive_buffer: int | None = None) -> Peer:
        peer = await Peer.connect(self.server.port, self.context, receive_buffer=receive_buffer)
        self._peers.append(peer)
        return peer

    async def stream(self, path: str = "/", token: str | None = TOKEN) -> Peer:
        return await (await self.connect()).upgraded(path, token)

    async def healthy(self, token: str = TOKEN) -> HealthyStream:
        stream = HealthyStream(await self.connect(), token)
        self._healthy.append(stream)
        return await stream.begin()

    async def request(self, data: bytes) -> Response:
        """Send one HTTP request on a connection of its own."""
        peer = await self.connect()
        peer.send(data)
        response = await peer.response()
        await peer.close()
        return response

    async def get(self, path: str, *headers: str) -> Response:
        return await self.request(request("GET", path, *headers))

    async def counters(self, *prefixes: str) -> dict[str, float]:
        """The counters that moved and whose names begin so, as /metrics shows them."""
        response = await self.get("/metrics", f"Authorization: Bearer {ADMIN_TOKEN}")
        assert response.status == 200
        lines = re.findall(r"^(streamsink_[^ ]+) ([^ ]+)$", response.body.decode(), re.MULTILINE)
        return {
            name.removeprefix("streamsink_"): float(value)
            for name, value in lines
            if float(value) and name.removeprefix("streamsink_").startswith(prefixes)
        }

    @contextlib.contextmanager
    def head_deadline(self, seconds: float) -> Iterator[None]:
        """Another deadline for the requests that are made meanwhile."""
        assert self.server._uvicorn is not None
        protocol = self.server._uvicorn.config.http_protocol_class
        assert issubclass(protocol, HttpProtocol)
        before, protocol.deadline = protocol.deadline, seconds
        try:
            yield
        finally:
            protocol.deadline = before

    async def streams_over(self, *but: HealthyStream) -> None:
        """Wait until every stream has ended, its files closed."""
        staying = {stream.peer.sid for stream in but}
        for session in list(self.server.endpoint.sessions):
            if session.stream is None or session.stream.sid not in staying:
                async with asyncio.timeout(PATIENCE):
                    await session.done.wait()

    async def disconnect(self) -> None:
        for stream in self._healthy:
            stream.cancel()
        for peer in self._peers:
            await peer.close()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for what no event tells: another process's doing."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body

"""The WebSocket's bytes: the fast path and websockets' engine must tell the same of the same bytes."""

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from streamsink.config import Settings
from streamsink.connection import MAX_FRAGMENTS, STALL_LIMIT, Connection, _close_reason
from streamsink.endpoint import Endpoint
from streamsink.metrics import Metrics
from streamsink.session import Session
from tests.peer import masked

HEAD = (
    b"GET / HTTP/1.1\r\nhost: example.org\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)
LIMIT = 1024


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.aborted = False
        self.unsent = 0
        self.high = 0

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = self.closing = True

    def was_aborted(self) -> bool:
        return self.aborted

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0


class Recorder(Session):
    """A session that keeps the texts it gets."""

    texts: list[bytes]

    def receive(self, text: bytes, now: float) -> None:
        self.texts.append(text)


class ServerState:
    def __init__(self) -> None:
        self.connections: set[Any] = set()


class Opened:
    """A connection that has upgraded, with its transport."""

    def __init__(self, head: bytes = HEAD) -> None:
        loop = asyncio.get_running_loop()
        options = Settings(recordings=Path("/nonexistent"), max_message_bytes=LIMIT)
        endpoint = Endpoint(options, {"default": []}, Metrics(), loop)
        made = type("Made", (Connection,), {"endpoint": endpoint, "tokens": None})
        self.endpoint = endpoint
        self.state = ServerState()
        self.connection: Connection = made(None, self.state, {})
        self.transport = Transport()
        self.connection.connection_made(self.transport)
        self.connection.data_received(head)
        self.response = self.transport.written
        self.transport.written = b""
        session = self.connection._session
        if session is not None:
            session.__class__ = Recorder
            session.texts = []

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.data_received(piece)

    @property
    def texts(self) -> list[bytes]:
        texts: list[bytes] = self.connection._session.texts  # type: ignore[union-attr]
        return texts

    def sent(self) -> list[Frame]:
        """The frames written since the upgrade."""
        frames = []
        data = self.transport.written
        while data:
            first, length = data[0], data[1]
            start = 2
            if length == 126:
                (length,), start = struct.unpack(">H", data[2:4]), 4
            elif length == 127:
                (length,), start = struct.unpack(">Q", data[2:10]), 10
            frames.append(Frame(Opcode(first & 15), data[start : start + length], bool(first & 128)))
            data = data[start + length :]
        return frames

    def close_code(self) -> int | None:
        closes = [Close.parse(frame.data).code for frame in self.sent() if frame.opcode is Opcode.CLOSE]
        assert len(closes) <= 1
        return closes[0] if closes else None

    async def end(self) -> None:
        session = self.connection._session
        self.connection.connection_lost(None)
        if session is not None:
            await session.done.wait()


async def test_the_upgrade_is_answered() -> None:
    opened = Opened()
    assert opened.response.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in opened.response.lower()
    assert b"sec-websocket-extensions" not in opened.response.lower()
    await opened.end()
    assert opened.state.connections == set()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD.replace(b"version: 13", b"version: 12"), b"400"),
        (HEAD.replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"short"), b"400"),
        (HEAD.replace(b"GET", b"POST"), b"405"),
        (HEAD.replace(b"GET / ", b"GET /nowhere "), b"404"),
        (HEAD.replace(b"GET / ", b"GET //nowhere "), b"404"),
        (HEAD.replace(b"GET / ", b"GET //[x "), b"404"),
    ],
)
async def test_an_upgrade_that_is_none_is_refused(head: bytes, status: bytes) -> None:
    opened = Opened(head)
    assert opened.response.split()[1] == status
    assert opened.transport.is_closing()
    opened.feed(b"more")
    await opened.end()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, LIMIT])
async def test_a_text_of_any_size_and_split_anywhere_arrives_whole(size: int) -> None:
    text = bytes(32 + index % 90 for index in range(size))
    data = masked(text) + masked(b"next")
    for step in (1, 7, len(data)):
        opened = Opened()
        opened.feed(*[data[start : start + step] for start in range(0, len(data), step)])
        assert opened.texts == [text, b"next"]
        await opened.end()


async def test_text_beyond_ascii_is_checked() -> None:
    opened = Opened()
    opened.feed(masked("grüße".encode()))
    assert opened.texts == ["grüße".encode()]
    opened.feed(masked(b"gr\xfc\xdfe"))
    assert opened.close_code() == 1007
    await opened.end()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (masked(b"x", opcode=2), 1003),
        (masked(b"x", opcode=2, fin=False) + masked(b"y", opcode=0), 1003),
        (bytes((0x81, 1)) + b"x", 1002),
        (masked(b"x", rsv=0x40), 1002),
        (masked(b"x", opcode=3), 1002),
        (masked(b"x", opcode=0), 1002),
        (masked(b"a", fin=False) + masked(b"b"), 1002),
        (masked(b"x" * 126, opcode=9), 1002),
        (masked(b"x", opcode=9, fin=False), 1002),
        (masked(b"x" * (LIMIT + 1)), 1009),
        (masked(b"x" * (LIMIT + 1))[:8], 1009),
        (bytes((0x81, 0xFF)) + (2**62).to_bytes(8, "big"), 1009),
        (masked(b"x" * LIMIT, fin=False) + masked(b"y", opcode=0), 1009),
        (masked(b"", fin=False) + masked(b"", opcode=0, fin=False) * MAX_FRAGMENTS, 1009),
        (masked(b"\xff", fin=False) + masked(b"", opcode=0), 1007),
    ],
    ids=[
        "binary",
        "binary in fragments",
        "unmasked",
        "a reserved bit",
        "a reserved opcode",
        "a continuation of nothing",
        "a message within a message",
        "a ping too long",
        "a ping in fragments",
        "too big",
        "too big by its head alone",
        "absurdly big",
        "too big in fragments",
        "endless empty fragments",
        "fragments that are not UTF-8",
    ],
)
async def test_what_breaks_the_protocol_is_closed_with_its_code(data: bytes, code: int) -> None:
    opened = Opened()
    opened.feed(masked(b"fine"), data)
    assert opened.texts == [b"fine"]
    assert opened.close_code() == code
    session = opened.connection._session
    assert session is not None
    assert session.ended
    # Nothing behind it is looked at.
    opened.feed(masked(b"late"))
    assert opened.texts == [b"fine"]
    await opened.end()


async def test_fragments_are_joined_and_controls_pass_between_them() -> None:
    opened = Opened()
    opened.feed(masked(b"one ", fin=False) + masked(b"are you there", opcode=9) + masked(b"text", opcode=0))
    assert opened.texts == [b"one text"]
    assert [(f.opcode, f.data) for f in opened.sent()] == [(Opcode.PONG, b"are you there")]
    await opened.end()


async def test_a_peer_that_closes_is_answered_and_let_go() -> None:
    opened = Opened()
    opened.feed(masked(struct.pack(">H", 1001) + b"bye", opcode=8))
    assert opened.close_code() == 1001
    await asyncio.sleep(0)
    assert opened.transport.is_closing()
    await opened.end()


async def test_our_close_waits_for_the_peers() -> None:
    opened = Opened()
    session = opened.connection._session
    assert session is not None
    session.close(1000, "stop", "stop")
    assert opened.close_code() == 1000
    assert not opened.transport.is_closing()
    opened.connection.send(b"nothing leaves any more")
    opened.feed(masked(b"late"), masked(b"in pieces", fin=False), masked(b"", opcode=0))
    assert opened.texts == []
    opened.feed(masked(struct.pack(">H", 1000), opcode=8))
    await asyncio.sleep(0)
    assert opened.transport.is_closing()
    assert len(opened.sent()) == 1
    await opened.end()


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
async def test_what_is_sent_is_framed(size: int) -> None:
    opened = Opened()
    opened.connection.send(b"x" * size)
    assert [(f.opcode, f.fin, f.data) for f in opened.sent()] == [(Opcode.TEXT, True, b"x" * size)]
    await opened.end()


async def test_a_peer_that_does_not_read_is_held_back_and_then_dropped() -> None:
    opened = Opened()
    opened.connection.pause_writing()
    opened.connection.resume_writing()
    opened.connection.pause_writing()
    opened.connection.send(b"x")
    assert not opened.transport.was_aborted()
    opened.transport.unsent = 2 * 1024 * 1024
    opened.connection.send(b"y")
    assert opened.transport.was_aborted()
    await opened.end()


async def test_what_a_transport_holds_is_limited() -> None:
    opened = Opened()
    # Half of it here, half of it where there is a socket.
    opened.connection.limit_unsent(30_000)
    assert opened.transport.high == 15_000
    await opened.end()


async def test_a_peer_that_reads_too_slowly_for_too_long_is_dropped() -> None:
    opened = Opened()
    opened.connection.pause_writing()
    first = opened.connection._stall_timer
    opened.connection.resume_writing()
    assert first is not None
    assert first.cancelled()
    opened.connection.pause_writing()
    last = opened.connection._stall_timer
    assert last is not None
    assert last.when() == pytest.approx(opened.endpoint.loop.time() + STALL_LIMIT, abs=5)
    opened.connection._drop()
    assert opened.transport.was_aborted()
    await opened.end()
    assert last.cancelled()


async def test_nothing_behind_a_broken_frame_is_kept() -> None:
    opened = Opened()
    opened.feed(bytes((0x81, 1)) + b"x")
    assert opened.close_code() == 1002
    opened.feed(*[b"x" * 1000] * 10)
    assert opened.connection._rest == b""
    await opened.end()


async def test_the_engine_logs_no_token_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        opened = Opened(HEAD.replace(b"host:", b"authorization: Bearer sesame\r\nhost:"))
        opened.feed(masked(b"payload"))
        await opened.end()
    assert "sesame" not in caplog.text
    assert "payload" not in caplog.text


async def test_an_error_of_our_own_closes_with_1011() -> None:
    opened = Opened()
    session = opened.connection._session
    assert session is not None

    def fail(text: bytes, now: float) -> None:
        raise ZeroDivisionError

    session.receive = fail  # type: ignore[method-assign]
    opened.feed(masked(b"x"))
    assert opened.close_code() == 1011
    await opened.end()


async def test_pings_go_out_and_no_pong_is_missed() -> None:
    opened = Opened()
    opened.connection._ping()
    opened.connection._ping()
    assert [f.opcode for f in opened.sent()] == [Opcode.PING, Opcode.PING]
    session = opened.connection._session
    assert session is not None
    assert not session.ended
    session.close(1000, "", "stop")
    opened.connection._ping()
    assert [f.opcode for f in opened.sent()] == [Opcode.PING, Opcode.PING, Opcode.CLOSE]
    await opened.end()


@pytest.mark.parametrize(
    ("text", "reason"), [("short", "short"), ("ü" * 100, "ü" * 61), ("\ud800", "?")], ids=["short", "long", "surrogate"]
)
def test_a_close_reason_fits_its_frame(text: str, reason: str) -> None:
    assert _close_reason(text) == reason


async def test_shutdown_closes_what_is_left() -> None:
    opened = Opened()
    opened.connection.shutdown()
    assert opened.close_code() == 1001
    assert opened.transport.is_closing()
    await opened.end()
    refused = Opened(HEAD.replace(b"version: 13", b"version: 12"))
    refused.connection.shutdown()
    await refused.end()


# --- The property ---

payloads = st.one_of(st.binary(max_size=140), st.text(max_size=40).map(str.encode), st.just(b"x" * (LIMIT + 1)))
frames = st.builds(
    masked,
    payloads,
    opcode=st.sampled_from([1, 1, 1, 1, 0, 0, 2, 8, 9, 10, 3]),
    fin=st.sampled_from([True, True, True, False]),
    mask=st.binary(min_size=4, max_size=4),
    rsv=st.sampled_from([0] * 9 + [0x40]),
)
streams = st.lists(frames | st.binary(max_size=6), max_size=8).map(b"".join)


def by_the_engine(data: bytes) -> tuple[list[bytes], int | None]:
    """The texts and the close code websockets' own protocol makes of the bytes, and our rules on top of it."""
    engine = ServerProtocol(state=State.OPEN, max_size=LIMIT)
    texts: list[bytes] = []
    code: int | None = None
    message: list[bytes] = []
    # Fed byte by byte, so that what comes before an error is seen before it.
    for index in range(len(data)):
        engine.receive_data(data[index : index + 1])
        for event in engine.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.BINARY:
                return texts, 1003
            if event.opcode in (Opcode.TEXT, Opcode.CONT):
                message.append(bytes(event.data))
                if event.fin:
                    text, message = b"".join(message), []
                    try:
                        text.decode()
                    except UnicodeDecodeError:
                        return texts, 1007
                    texts.append(text)
        if engine.close_sent is not None:
            code = engine.close_sent.code
            break
    return texts, code


@given(streams, st.lists(st.integers(1, 60), max_size=20))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_the_fast_path_and_the_engine_agree(data: bytes, cuts: list[int]) -> None:
    async def run() -> None:
        opened = Opened()
        start = 0
        for size in [*cuts, len(data)]:
            opened.feed(data[start : start + size])
            start += size
        texts, code = by_the_engine(data)
        assert opened.texts == texts
        closes = [f for f in opened.sent() if f.opcode is Opcode.CLOSE]
        # An empty close frame is answered with an empty one, which reads as 1005.
        assert [Close.parse(f.data).code for f in closes] == ([] if code is None else [code])
        await opened.end()

    asyncio.run(run())


async def test_capture_keeps_the_head_masked_and_every_message(tmp_path: Path) -> None:
    from streamsink.capture import Capture

    opened = Opened()
    await opened.end()
    engine = ServerProtocol()
    engine.receive_data(HEAD.replace(b"host:", b"Authorization: Bearer secret\r\nhost:"))
    (request,) = engine.events_received()
    capture = Capture.open(tmp_path / "captures", request, 10.0)  # type: ignore[arg-type]
    assert capture is not None
    capture.write(b'{"event":"connected"}', 10.5)
    capture.write(b"\xff", 11.75)
    # Flushed each second, so that a killed process loses little.
    lines = [json.loads(line) for line in capture.path.read_text().splitlines()]
    assert lines[0]["head"]["path"] == "/"
    assert ["Authorization", "Bearer ***"] in lines[0]["head"]["headers"]
    assert lines[1:] == [{"t": 0.5, "text": '{"event":"connected"}'}, {"t": 1.75, "base64": "/w=="}]
    assert "secret" not in capture.path.read_text()
    assert capture.path.stat().st_mode & 0o777 == 0o600
    capture.close()
    capture.close()

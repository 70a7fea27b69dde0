"""The endpoint from outside, over real TLS sockets: every bad input beside a healthy call that must not notice."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

from streamsink.audio import Frame
from streamsink.auth import REFUSAL_BODY
from streamsink.config import Settings
from streamsink.connection import MAX_FRAGMENTS
from streamsink.loop import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, USER_TIMEOUT_MS, new_event_loop
from streamsink.playout import Outcome
from streamsink.processor import Processor
from streamsink.server import Server
from streamsink.simulator import SimulateOptions, simulate
from streamsink.stream import Stream
from streamsink.tls import CERTIFICATE_FILE, self_signed
from tests.conftest import Serve
from tests.peer import (
    ADMIN_TOKEN,
    BINARY,
    CLOSE,
    CONT,
    LISTENER,
    PATIENCE,
    STOP,
    TOKEN,
    Listener,
    Peer,
    Running,
    eventually,
    masked,
    media,
    message,
    request,
    start,
    upgrade,
)

pytestmark = pytest.mark.endpoint_loop

WRONG = "wrong-horse-battery-staple"
PARAMETER = "the caller's secret"
SECRETS = (TOKEN, WRONG, ADMIN_TOKEN, PARAMETER, base64.b64encode(bytes(60)).decode())
# Ours begin with the time; the stack of what blocks the loop is marked line by line.
LOG_LINE = re.compile(r"\| |\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z \[(debug|info|warning|error) *\] ")


def check_log(log: str) -> None:
    """Every line is ours, nothing in it is unprintable, and nothing is told that is nobody's business."""
    for line in log.splitlines():
        assert LOG_LINE.match(line), line
        assert line.isprintable(), line
    assert [secret for secret in SECRETS if secret in log] == []


# --- The upgrade -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status", "reason", "told"),
    [
        (upgrade("/", None), 401, "missing", "there is no Authorization header"),
        (upgrade("/", WRONG), 401, "wrong", f"a bearer token of {len(WRONG)} bytes came that is none of the 1 known"),
        (upgrade("/", None, f"Authorization: Basic {WRONG}"), 401, "scheme", "the scheme 'Basic'"),
        (upgrade("/", None, f"Authorization: {TOKEN}"), 401, "scheme", "no scheme that is known"),
        (upgrade("/", None, "Authorization:"), 401, "empty", "the Authorization header is empty"),
        (upgrade("/", None, "Authorization: Bearer"), 401, "empty", "'Bearer' came without a token"),
        (
            upgrade("/", TOKEN, f"Authorization: Bearer {TOKEN}"),
            401,
            "duplicate",
            "there are 2 Authorization headers",
        ),
        (upgrade("/nowhere", WRONG), 401, "wrong", "is none of the 1 known"),
        (upgrade("/nowhere"), 404, "path", "expected / or one of /default, /healthy"),
        (upgrade("/%1b%5b2J%0aevil"), 404, "path", r"\x1b[2J\nevil"),
        (upgrade("/../../etc"), 404, "path", "the path names no pipeline"),
        (upgrade().replace(b"Version: 13", b"Version: 12"), 400, "invalid", "not a WebSocket upgrade"),
        (upgrade("/", TOKEN, f"X: {'x' * 9000}"), 431, "invalid", "not a valid HTTP request"),
    ],
    ids=[
        "no token",
        "wrong token",
        "Basic",
        "a token without a scheme",
        "empty",
        "no token behind Bearer",
        "two Authorization headers",
        "wrong token and unknown path",
        "unknown path",
        "control characters in the path",
        "a path that climbs",
        "another version",
        "a header line too long",
    ],
)
async def test_a_refused_upgrade(serve: Serve, head: bytes, status: int, reason: str, told: str) -> None:
    running = await serve()
    healthy = await running.healthy()
    peer = await running.connect()
    peer.send(head, start(peer.sid), media(1))
    response = await peer.response()
    assert response.status == status
    if status == 401:
        assert response.body == REFUSAL_BODY
        assert response.headers["www-authenticate"] == "Bearer"
    assert await peer.ended() == b""
    await healthy.finish()
    assert await running.counters("handshakes_refused", "messages_bad", "streams_total") == {
        f'handshakes_refused_total{{reason="{reason}"}}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 1.0,
    }
    refusals = [line for line in running.log.splitlines() if "handshake refused" in line]
    assert len(refusals) == 1
    assert told in refusals[0].replace('"', "'").replace("\\\\", "\\")
    check_log(running.log)


async def test_every_401_has_the_same_body(serve: Serve) -> None:
    running = await serve()
    responses = [await running.request(head) for head in (upgrade("/", None), upgrade("/nowhere", WRONG))]
    responses += [await running.get(path) for path in ("/metrics", "/", "/api/v1/streams")]
    responses += [await running.get("/metrics", f"Authorization: Bearer {TOKEN}")]
    assert [(response.status, response.body) for response in responses] == [(401, REFUSAL_BODY)] * len(responses)


# --- What follows the upgrade ----------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """What a peer sends behind its start message and a first frame, and what becomes of the stream."""

    data: bytes
    code: int = 1000
    """1000: it goes on to the frame and the stop message behind."""
    reason: str | None = None
    """Of messages_bad."""
    times: int = 1
    gap: int = 0
    """Frames missing."""


def text(content: bytes) -> bytes:
    return masked(content)


NESTED = b"[" * 10_000
FRAME = {"event": "media", "media": {"chunk": "2", "payload": base64.b64encode(bytes(160)).decode()}}
BAD_MESSAGES = {
    "a second start": Bad(start("another", encoding="audio/x-L16", rate=16000), reason="second_start"),
    "a binary message": Bad(masked(b"{}", BINARY), 1003),
    "not UTF-8": Bad(masked(b'{"event":"\xff"}'), 1007),
    "not UTF-8 in fragments": Bad(masked(b"\xc3", fin=False) + masked(b"{", CONT), 1007),
    "broken JSON": Bad(text(b'{"event":"media",'), reason="json"),
    "no JSON": Bad(text(b"hello"), reason="json"),
    "nothing": Bad(text(b""), reason="json"),
    "nested brackets": Bad(text(NESTED), reason="type"),
    "nested brackets, all closed": Bad(text(NESTED + b"]" * 10_000), reason="type"),
    "nested brackets beside the media": Bad(
        text(b'{"event":"media","x":' + NESTED + b"]" * 10_000 + b"}"), reason="json"
    ),
    "NaN": Bad(text(b'{"event":"media","media":{"chunk":NaN,"payload":"AAAA"}}'), reason="json"),
    "an array": Bad(text(b"[]"), reason="type"),
    "null": Bad(text(b"null"), reason="type"),
    "no event": Bad(message({"media": {}}), reason="type"),
    "an event that is a number": Bad(message({"event": 5}), reason="type"),
    "media that is a number": Bad(message({"event": "media", "media": 5}), reason="type", gap=0),
    "a chunk that is a word": Bad(media(2, chunk="two"), reason="type", gap=1),
    "a negative chunk": Bad(media(2, chunk=-1), reason="type", gap=1),
    "a payload that is a number": Bad(media(2, payload=5), reason="payload", gap=1),
    "a payload that is no base64": Bad(media(2, payload="!!!!"), reason="payload", gap=1),
    "an empty payload": Bad(media(2, b""), reason="payload", gap=1),
    "an unknown track": Bad(media(2, track="sideways"), reason="track", gap=0),
    "an unknown digit": Bad(message({"event": "dtmf", "dtmf": {"digit": "E"}}), reason="type"),
    "an unknown event": Bad(message({"event": "surprise"}), reason="unknown_event"),
    "too many bad messages": Bad(text(b"x") * 25, 1008, reason="json", times=20),
    "64 KiB and one": Bad(text(b" " * 65537), 1009),
    "a head that promises much": Bad(b"\x81\xff" + (2**62).to_bytes(8, "big"), 1009),
    "endless fragments": Bad(masked(b" " * 999, fin=False) + masked(b" " * 999, CONT, fin=False) * 70, 1009),
    "endless empty fragments": Bad(masked(b"", fin=False) + masked(b"", CONT, fin=False) * MAX_FRAGMENTS, 1009),
    "an unmasked frame": Bad(b"\x81\x02{}", 1002),
    "RSV1": Bad(masked(b"{}", rsv=0x40), 1002),
    "RSV2": Bad(masked(b"{}", rsv=0x20), 1002),
    "RSV3": Bad(masked(b"{}", rsv=0x10), 1002),
    "a reserved opcode": Bad(masked(b"{}", 3), 1002),
    "a continuation of nothing": Bad(masked(b"{}", CONT), 1002),
    "a flood": Bad(b"".join(media(chunk, bytes(40_000)) for chunk in range(2, 8)), 1008),
}


@pytest.mark.parametrize("case", BAD_MESSAGES.values(), ids=list(BAD_MESSAGES))
async def test_a_bad_message(serve: Serve, case: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.connection.LINGER", 0.01)
    running = await serve()
    healthy = await running.healthy()
    peer = await running.stream()
    parameters = {"who": PARAMETER}
    peer.send(start(peer.sid, customParameters=parameters), media(1))
    listener = await Listener.of(peer.sid)
    await listener.until(lambda listener: len(listener.frames) == 1)
    peer.send(case.data)
    if case.code == 1000:
        peer.send(media(2 + case.gap), STOP)
    assert await peer.close_code() == case.code
    await healthy.finish()
    await running.streams_over()
    if case.code == 1000:
        heard = [(frame.start, frame.lost) for frame in listener.frames]
        assert heard == [(0, 0), (160 + 160 * case.gap, 160 * case.gap)]
    counted = {'streams_total{codec="PCMU",outcome="stop"}': 1.0 if case.code != 1000 else 2.0}
    if case.reason is not None:
        counted[f'messages_bad_total{{reason="{case.reason}"}}'] = float(case.times)
    if case.code != 1000:
        counted['streams_total{codec="PCMU",outcome="policy"}'] = 1.0
    assert await running.counters("handshakes_refused", "messages_bad", "streams_total") == counted
    check_log(running.log)
    # Whatever came, what was heard before it is kept.
    (sidecar,) = running.recordings.glob("*.json")
    kept = json.loads(sidecar.read_text())
    assert (kept["close_code"], kept["complete"], kept["custom_parameters"]) == (case.code, True, parameters)
    assert list(running.recordings.glob("*.part")) == []


MEDIA_FORMAT = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
BAD_STARTS = {
    "media before start": (media(1), "none"),
    "an unknown encoding": (start("s", encoding="audio/opus", rate=48000), "none"),
    "two channels": (start("s", channels=2), "none"),
    "a rate that no codec has": (start("s", rate=12345), "none"),
    "no rate": (start("s", mediaFormat={"encoding": "PCMU"}), "none"),
    "no media format": (start("s", mediaFormat=None), "none"),
    "a parameter that names no pipeline": (start("s", customParameters={"pipeline": PARAMETER}), "none"),
}


@pytest.mark.parametrize(("data", "codec"), BAD_STARTS.values(), ids=list(BAD_STARTS))
async def test_a_stream_that_cannot_start(serve: Serve, data: bytes, codec: str) -> None:
    running = await serve()
    healthy = await running.healthy()
    peer = await running.stream()
    peer.send(data)
    assert await peer.close_code() == 1008
    await healthy.finish()
    await running.streams_over()
    assert await running.counters("handshakes_refused", "messages_bad", "streams_total") == {
        f'streams_total{{codec="{codec}",outcome="policy"}}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 1.0,
    }
    check_log(running.log)
    assert list(running.recordings.glob("*")) == []


async def test_a_start_of_wrong_types_is_bad_and_the_next_one_counts(serve: Serve) -> None:
    running = await serve()
    peer = await running.stream()
    deep = b'{"event":"start","start":{"customParameters":{"x":' + NESTED + b"]" * 10_000 + b"}}}"
    peer.send(
        message({"event": "start", "start": 5}),
        start("s", mediaFormat={"encoding": 5, "sampleRate": 8000}),
        start("s", tracks="inbound"),
        start("s", customParameters=[PARAMETER]),
        text(deep),
        start(peer.sid),
        media(1),
        STOP,
    )
    assert await peer.close_code() == 1000
    await running.streams_over()
    assert await running.counters("messages_bad", "frames_received") == {
        'messages_bad_total{reason="type"}': 4.0,
        'messages_bad_total{reason="json"}': 1.0,
        'frames_received_total{codec="PCMU"}': 1.0,
    }
    check_log(running.log)


# --- Silence ---------------------------------------------------------------------------------------------------------


async def test_silence_after_the_upgrade(serve: Serve) -> None:
    running = await serve(start_deadline=2.0)
    healthy = await running.healthy()
    peer = await running.stream()
    peer.send(message({"event": "connected"}))
    assert await peer.close_code() == 1008
    await healthy.finish()
    await running.streams_over()
    assert await running.counters("handshakes_refused", "messages_bad", "streams_total") == {
        'streams_total{codec="none",outcome="policy"}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 1.0,
    }
    assert "no start message in time" in running.log
    check_log(running.log)


async def test_a_stream_outlives_the_deadlines_of_its_upgrade(serve: Serve) -> None:
    running = await serve(head_deadline=2.0, start_deadline=2.0)
    streams = [await running.healthy(), await running.healthy()]
    # Who connects now and says nothing is cut off after all that these have outlived.
    assert (await (await running.connect()).response()).status == 408
    for stream in streams:
        await stream.finish()


async def test_a_standstill_of_the_endpoint_is_no_silence_of_its_streams(serve: Serve) -> None:
    running = await serve(media_silence_seconds=2.0)
    healthy = await running.healthy()
    # Among what the loop reads, so that its timers come next.
    ours, theirs = socket.socketpair()
    over = asyncio.Event()

    def stand_still() -> None:
        time.sleep(2.5)
        loop.remove_reader(ours)
        over.set()

    with ours, theirs:
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, stand_still)
        theirs.send(b"x")
        await over.wait()
        await asyncio.sleep(0.1)
    await healthy.finish()


async def test_silence_after_the_tls_handshake(serve: Serve) -> None:
    running = await serve()
    healthy = await running.healthy()
    with running.head_deadline(1.0):
        peer = await running.connect()
        assert (await peer.response()).status == 408
    assert await peer.ended() == b""
    await healthy.finish()
    assert await running.counters("handshakes_refused") == {'handshakes_refused_total{reason="timeout"}': 1.0}
    check_log(running.log)


async def counted_as_tls(running: Running) -> None:
    """Wait until a connection counts as one that never came through TLS, and nothing else does."""
    pattern = re.compile(rb"^streamsink_handshakes_refused_total(\S+) ([1-9]\S*)$", re.MULTILINE)

    def refused() -> list[tuple[bytes, bytes]]:
        return pattern.findall(running.server.metrics.render()[0])

    await eventually(refused)
    assert refused() == [(b'{reason="tls"}', b"1.0")]


def test_silence_before_the_tls_handshake(tmp_path: Path, read_log: Callable[[], str]) -> None:
    async def main() -> None:
        settings = Settings.model_validate(
            {
                "host": "127.0.0.1",
                "port": 0,
                "state": tmp_path,
                "recordings": tmp_path,
                "tokens": [f"crew:{TOKEN}"],
                "admin_token": ADMIN_TOKEN,
                "pipelines": {"healthy": {"processors": [LISTENER]}},
                "head_deadline": 3.5,
            }
        )
        async with Server(settings) as server:
            running = Running(server, read_log)
            healthy = await running.healthy()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            async with asyncio.timeout(PATIENCE):
                assert await reader.read() == b""
            writer.close()
            await counted_as_tls(running)
            await healthy.finish()
            await running.disconnect()

    with asyncio.Runner(loop_factory=partial(new_event_loop, tls_handshake_deadline=3.0)) as runner:
        runner.run(main())
    check_log(read_log())


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(64)],
    ids=["HTTP", "a broken hello", "zeros"],
)
async def test_what_is_no_tls_is_dropped(serve: Serve, data: bytes) -> None:
    running = await serve()
    healthy = await running.healthy()
    with running.head_deadline(0.3):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        writer.write(data)
        async with asyncio.timeout(PATIENCE):
            await reader.read()
        writer.close()
        await counted_as_tls(running)
    await healthy.finish()
    check_log(running.log)


async def test_what_the_event_loop_reports_is_logged(serve: Serve) -> None:
    running = await serve()
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "SSL handshake failed on verifying the certificate", "exception": OSError})
    loop.call_exception_handler({"message": "something of ours failed"})
    for words, level in (("TLS handshake failed", "[debug"), ("something of ours failed", "[error")):
        (line,) = (line for line in running.log.splitlines() if words in line)
        assert level in line


# --- Strings ---------------------------------------------------------------------------------------------------------

FORGED = "\r\n2026-11-20T20:42:18.000000Z [info     ] forged\x1b[2J\x00\x9b\u202e\u2028"
HOSTILE = {
    "climbing": "../../x",
    "absolute": "/etc/passwd",
    "NUL": "a\0b",
    "4 KB": "n" * 4096,
    "control characters": FORGED,
    "dots": "..",
    "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=list(HOSTILE))
async def test_a_hostile_name_stays_in_its_folder(serve: Serve, tmp_path: Path, name: str) -> None:
    running = await serve()
    healthy = await running.healthy()
    peer = await running.stream()
    peer.send(start(peer.sid, name=name), media(1), STOP)
    assert await peer.close_code() == 1000
    await healthy.finish()
    await running.streams_over()
    assert sorted(os.listdir(tmp_path)) == ["recordings", "state"]
    recording, sidecar = sorted(running.recordings.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (recording.suffix, sidecar.suffix, recording.stem) == (".wav", ".json", sidecar.stem)
    assert re.fullmatch(r"\d{8}T\d{6}Z_[\w.-]{1,200}", recording.stem, re.ASCII)
    assert json.loads(sidecar.read_text())["name"] == (name or None)
    check_log(running.log)


async def test_control_characters_reach_no_log(serve: Serve) -> None:
    running = await serve(tokens=[])
    token = running.server.access.made_token
    assert token is not None
    healthy = await running.healthy(token)
    peer = await running.stream(token=token)
    peer.send(
        message({"event": FORGED}),
        start(
            peer.sid + FORGED,
            name=FORGED,
            callSid="call" + FORGED,
            accountSid=FORGED,
            tracks=["inbound", FORGED],
            customParameters={FORGED: PARAMETER, PARAMETER: FORGED},
            mediaFormat={"encoding": FORGED, "sampleRate": 8000},
        ),
    )
    assert await peer.close_code() == 1008
    peer = await running.stream(token=token)
    peer.send(
        start(
            peer.sid + FORGED,
            name=FORGED,
            callSid="call" + FORGED,
            accountSid=FORGED,
            tracks=["inbound", FORGED],
            customParameters={FORGED: PARAMETER, PARAMETER: FORGED},
        ),
        media(1, track=FORGED),
        message({"event": "mark", "mark": {"name": FORGED}}),
        message({"event": "dtmf", "dtmf": {"digit": FORGED}}),
        message({"event": FORGED, FORGED: FORGED}),
        message({FORGED: FORGED}),
    )
    listener = await Listener.of(peer.sid + FORGED)
    secret = running.server.access.status_secret
    webhook = {
        "event_type": "calling.call.stream",
        "params": {"state": FORGED, "call_id": "call" + FORGED, "name": FORGED, FORGED: FORGED},
    }
    for body in (webhook, {**webhook, "event_type": FORGED}):
        posted = json.dumps(body).encode()
        await running.request(request("POST", f"/status/{secret}", "Content-Type: application/json", body=posted))
    await running.get(f"/status/{secret}?StreamEvent=%0d%0aforged%1b%00&StreamName=%0aforged")
    await running.request(upgrade("/%0d%0aforged%1b%00", token))
    peer.send(masked((1000).to_bytes(2, "big") + FORGED.encode()[:100], CLOSE))
    assert await peer.close_code() == 1000
    await listener.until(lambda listener: listener.stopped is not None)
    await healthy.finish()
    await running.streams_over()
    log = running.log
    check_log(log)
    assert token not in log
    assert secret not in log
    # They are there, and harmless.
    assert log.count("forged") > 10


# --- The certificate -------------------------------------------------------------------------------------------------


async def served(running: Running) -> bytes:
    """The certificate a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    peer = await Peer.connect(running.server.port, context)
    certificate: bytes = peer.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    await peer.close()
    return certificate


async def test_a_renewed_certificate_is_served_and_a_bad_one_refused(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.server.HOUSEKEEPING", 0.01)
    pairs = [self_signed(tmp_path / name) for name in ("first", "second", "third")]
    first, second, third = [ssl.PEM_cert_to_DER_cert(pair.cert.read_text()) for pair in pairs]
    cert, key = tmp_path / "state" / CERTIFICATE_FILE, tmp_path / "state" / "key.pem"
    cert.parent.mkdir()

    def install(new_cert: Path, new_key: Path) -> None:
        for source, path in ((new_cert, cert), (new_key, key)):
            aside = path.with_suffix(".new")
            aside.write_bytes(source.read_bytes())
            aside.replace(path)

    async def told(words: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while words not in running.log:
                await served(running)

    install(pairs[0].cert, pairs[0].key)
    running = await serve(cert=cert, key=key)
    healthy = await running.healthy()
    assert await served(running) == first
    install(pairs[1].cert, pairs[1].key)
    await told("loaded a changed certificate")
    assert await served(running) == second
    install(pairs[2].cert, pairs[1].key)
    await told("refused a changed certificate")
    assert await served(running) == second
    assert third != second
    await healthy.finish()
    check_log(running.log)


# --- Peers that are slow, gone or many -------------------------------------------------------------------------------


async def test_the_newest_stream_has_the_sid(serve: Serve) -> None:
    running = await serve()
    healthy = await running.healthy()
    older, newer = await running.stream(), await running.stream()
    older.send(start(older.sid), media(1))
    first = await Listener.of(older.sid)
    await first.until(lambda listener: len(listener.frames) == 1)
    newer.send(start(older.sid), media(1), media(2))
    assert await older.close_code() == 1001
    second = await Listener.of(older.sid, 2)
    newer.send(media(3), STOP)
    assert await newer.close_code() == 1000
    await healthy.finish()
    await running.streams_over()
    assert (first.stopped, len(first.frames)) == ("closed", 1)
    assert (second.stopped, len(second.frames)) == ("stop", 3)
    kept = [json.loads(path.read_text()) for path in sorted(running.recordings.glob("*.json"))]
    assert [(sidecar["stream_sid"], sidecar["close_code"]) for sidecar in kept] == [
        (older.sid, 1001),
        (older.sid, 1000),
    ]
    assert await running.counters("streams_total") == {
        'streams_total{codec="PCMU",outcome="closed"}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 2.0,
    }


class Digits(Processor):
    """Answers each frame with more than a peer that does not read can be owed for long."""

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream

    def on_frame(self, frame: Frame) -> None:
        self.stream.send_dtmf("1" * 10)


class Marks(Digits):
    """Answers each frame with marks: those of five frames are more than what audio waits for."""

    def on_frame(self, frame: Frame) -> None:
        for index in range(60):
            self.stream.mark(f"{frame.sequence}-{index} ".ljust(1000, "m"))


def shrink_socket_buffers(running: Running) -> None:
    """Let connections that are accepted from now on be held back after few bytes."""
    listening = running.server._socket
    assert listening is not None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_a_peer_that_never_reads_is_dropped(serve: Serve) -> None:
    running = await serve(processors=["tests.test_endpoint:Digits"])
    shrink_socket_buffers(running)
    healthy = await running.healthy()
    peer = await running.connect(receive_buffer=4096)
    await peer.upgraded()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    # The sid stands in each of our messages: a long one makes few of them much.
    peer.send(start("s" * 10_000), *[media(chunk) for chunk in range(1, 41)])
    await running.streams_over(healthy)
    await healthy.finish()
    await running.streams_over()
    assert await running.counters("streams_total", "processor_errors") == {
        'streams_total{codec="PCMU",outcome="lost"}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 1.0,
    }
    assert "peer does not read: connection dropped" in running.log
    check_log(running.log)


async def test_a_peer_that_stops_reading_holds_two_seconds_of_audio_and_is_dropped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.connection.STALL_LIMIT", 0.2)
    running = await serve(processors=[LISTENER])
    healthy = await running.healthy()
    peer = await running.connect(receive_buffer=4096)
    await peer.upgraded()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(start(peer.sid))
    listener = await Listener.of(peer.sid)
    assert listener.stream is not None
    playout = listener.stream.play(np.zeros(10 * 8000, np.int16), 8000)
    (session,) = (each for each in running.server.endpoint.sessions if each.stream is listener.stream)
    await listener.until(lambda listener: listener.stopped is not None)
    assert listener.stopped == "lost"
    # What fits into sockets and buffers, the lead, and what the peer's own buffers take.
    assert 0.3 < session.frames_sent * 0.02 < 2.0 + 0.1 + 1.0
    assert (await playout).outcome is Outcome.CLOSED
    await healthy.finish()
    assert "peer does not read: connection dropped" in running.log
    check_log(running.log)


async def test_a_peer_that_reads_late_gets_all_of_it(serve: Serve) -> None:
    running = await serve(processors=["tests.test_endpoint:Marks", LISTENER])
    shrink_socket_buffers(running)
    healthy = await running.healthy()
    peer = await running.connect(receive_buffer=4096)
    await peer.upgraded()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(start(peer.sid))
    listener = await Listener.of(peer.sid)
    # In all 600 kB, more than twice what a connection takes before the rest has to wait.
    for chunk in range(1, 11):
        peer.send(media(chunk))
        await listener.until(lambda listener, chunk=chunk: len(listener.frames) == chunk)  # type: ignore[misc]
    peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
    marks = [(await peer.text())["mark"]["name"].split()[0] for _ in range(600)]
    assert marks == [f"{sequence}-{index}" for sequence in range(2, 12) for index in range(60)]
    peer.send(STOP)
    assert await peer.close_code() == 1000
    await healthy.finish()
    check_log(running.log)


async def test_a_peer_that_vanishes_leaves_a_whole_recording(serve: Serve) -> None:
    running = await serve()
    healthy = await running.healthy()
    peer = await running.stream()
    payloads = [bytes((chunk, 128 + chunk)) * 80 for chunk in range(1, 11)]
    peer.send(start(peer.sid), *[media(chunk, payload) for chunk, payload in enumerate(payloads, 1)])
    listener = await Listener.of(peer.sid)
    await listener.until(lambda listener: len(listener.frames) == 10)
    peer.reset()
    await listener.until(lambda listener: listener.stopped is not None)
    assert listener.stopped == "lost"
    await healthy.finish()
    await running.streams_over()
    (path,) = running.recordings.glob("*.wav")
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == 8000
    assert np.array_equal(samples, np.concatenate([frame.samples for frame in listener.frames]))
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert (sidecar["complete"], sidecar["duration_seconds"], sidecar["gaps"]) == (True, 0.2, [])
    assert await running.counters("streams_total") == {
        'streams_total{codec="PCMU",outcome="lost"}': 1.0,
        'streams_total{codec="PCMU",outcome="stop"}': 1.0,
    }
    check_log(running.log)


async def test_missing_pongs_close_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.connection.PING_INTERVAL", 0.01)
    running = await serve()
    peer = await running.stream()
    for _ in range(5):
        frame = await peer.frame()
        assert frame is not None
        assert (frame.opcode, frame.data) == (9, b"")
    peer.send(start(peer.sid), media(1), STOP)
    assert await peer.close_code() == 1000


async def test_accepted_sockets_find_out_dead_peers(serve: Serve) -> None:
    running = await serve()
    peer = await running.stream()
    (connection,) = running.server._uvicorn.server_state.connections  # type: ignore[union-attr]
    sock = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
    options = {
        "SO_KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "TCP_NODELAY": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
        "TCP_KEEPIDLE": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        "TCP_KEEPINTVL": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        "TCP_KEEPCNT": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        "TCP_USER_TIMEOUT": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    }
    assert options == {
        "SO_KEEPALIVE": 1,
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": KEEPALIVE_IDLE,
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL,
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": USER_TIMEOUT_MS,
    }
    await peer.close()


async def test_frames_in_the_segment_of_the_upgrade_are_taken(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    peer.send(upgrade(), start(peer.sid), media(1), media(2)[:50])
    assert (await peer.response()).status == 101
    listener = await Listener.of(peer.sid)
    await listener.until(lambda listener: len(listener.frames) == 1)
    peer.send(media(2)[50:], STOP)
    assert await peer.close_code() == 1000
    assert [frame.start for frame in listener.frames] == [0, 160]


async def test_no_more_streams_than_allowed(serve: Serve) -> None:
    running = await serve(max_streams=1)
    healthy = await running.healthy()
    assert (await running.get("/readyz")).body == b"full\n"
    response = await running.request(upgrade())
    assert (response.status, response.headers["retry-after"]) == (503, "5")
    await healthy.finish()
    await running.streams_over()
    assert await running.counters("handshakes_refused") == {'handshakes_refused_total{reason="full"}': 1.0}
    assert (await running.get("/readyz")).status == 200
    peer = await running.stream()
    await peer.close()
    check_log(running.log)


async def test_a_capture_replays_to_the_same_recording(serve: Serve, tmp_path: Path) -> None:
    running = await serve(capture=tmp_path / "captures")
    peer = await running.stream()
    rng = np.random.default_rng(2)
    chunks = [1, 2, 3, 5, 6, 6, 7]
    frames = [media(chunk, rng.integers(0, 256, 160, np.uint8).tobytes()) for chunk in chunks]
    parameters: dict[str, Any] = {"who": "grüße"}
    peer.send(start(peer.sid, encoding="G722", name="first", customParameters=parameters), *frames, STOP)
    assert await peer.close_code() == 1000
    await running.streams_over()
    (capture,) = (tmp_path / "captures").iterdir()
    assert TOKEN not in capture.read_text()
    report = await simulate(
        SimulateOptions(
            replay=capture,
            url=f"wss://localhost:{running.server.port}/",
            token=TOKEN,
            cafile=running.server.settings.state / CERTIFICATE_FILE,
        )
    )
    assert report.close_code == 1000
    await running.streams_over()
    first, second = sorted(running.recordings.glob("*.wav"))
    assert first.read_bytes() == second.read_bytes()
    sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in (first, second)]
    for sidecar in sidecars:
        del sidecar["started_at"], sidecar["stream_sid"], sidecar["files"][0]["name"]
    assert sidecars[0] == sidecars[1]
    assert sidecars[0]["gaps"] == [{"track": "inbound", "start_seconds": 0.06, "seconds": 0.02}]

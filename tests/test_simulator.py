from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import os
import random
import signal
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from streamsink import wire
from streamsink.audio import Samples
from streamsink.codec import CodecSpec
from streamsink.loop import new_event_loop
from streamsink.simulator import (
    PAUSE,
    Durations,
    EchoMatch,
    FarEnd,
    Pacer,
    Report,
    SimulateOptions,
    SimulationError,
    Step,
    call_script,
    encode_payloads,
    read_audio,
    read_capture,
    report_text,
    run,
    show,
    simulate,
)

PCMU = CodecSpec.parse("PCMU")


def tone(samples: int, rate: int = 8000) -> Samples:
    return (8000 * np.sin(np.arange(samples) * 2 * np.pi * 440 / rate)).astype(np.int16)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_percentiles_are_nearest_ranks() -> None:
    durations = Durations()
    assert durations.percentiles() is None
    for milliseconds in range(1000, 0, -1):
        durations.add(milliseconds / 1000)
    assert durations.percentiles() == {"p50": 500.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}


def test_the_kth_frame_back_is_paired_with_the_kth_sent() -> None:
    durations = Durations()
    match = EchoMatch(durations)
    match.send(1.0)
    match.send(1.020)
    match.come_back(1.003)
    assert match.missing == 1
    match.come_back(1.030)
    match.come_back(1.050)  # one more than was sent: counted, and there is nothing to time it by
    assert (match.sent, match.returned, match.missing) == (2, 3, 0)
    assert durations.percentiles() == {"p50": 3.0, "p99": 10.0, "p999": 10.0, "max": 10.0}


def test_frames_further_back_than_the_window_are_counted_but_not_timed() -> None:
    durations = Durations()
    match = EchoMatch(durations)
    for frame in range(EchoMatch.WINDOW + 1):
        match.send(float(frame))
    match.come_back(EchoMatch.WINDOW + 1.0)
    assert durations.percentiles() is None
    match.come_back(EchoMatch.WINDOW + 1.0)
    assert durations.percentiles() == dict.fromkeys(("p50", "p99", "p999", "max"), EchoMatch.WINDOW * 1000.0)


# --- The far end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "underruns", "starts"),
    [
        ([0.0, 0.02, 0.04], 0, [160, 320, 480]),
        ([0.0, 0.0, 0.0], 0, [160, 320, 480]),  # a burst is queued
        ([0.0, 0.039, 0.059], 0, [160, 320, 480]),  # 19 ms late: the cushion holds
        ([0.0, 0.050, 0.070], 1, [160, 560, 720]),  # 10 ms too late: a hole, and a new cushion
        ([0.0, 0.040 + PAUSE, 0.060 + PAUSE], 1, [160, 4480, 4640]),
        ([0.0, 0.041 + PAUSE, 0.061 + PAUSE], 0, [160, 4488, 4648]),  # a pause between two spurts is no hole
    ],
)
def test_audio_plays_one_frame_behind_and_a_dry_queue_is_an_underrun(
    arrivals: list[float], underruns: int, starts: list[int]
) -> None:
    far_end = FarEnd(PCMU, keep=True)
    expected = np.zeros(starts[-1] + 160, np.int16)
    for number, (arrival, start) in enumerate(zip(arrivals, starts, strict=True), start=1):
        samples = np.full(160, number, np.int16)
        far_end.media(160, arrival, samples)
        expected[start : start + 160] = number
    assert far_end.underruns == underruns
    np.testing.assert_array_equal(far_end.heard(), expected)


def test_a_mark_comes_back_when_the_audio_before_it_is_played() -> None:
    far_end = FarEnd(PCMU)
    assert far_end.mark("nothing queued", 0.0) == ["nothing queued"]
    far_end.media(160, 0.0)
    assert far_end.mark("first", 0.0) == []
    far_end.media(80, 0.01)
    assert far_end.mark("second", 0.01) == []
    assert far_end.next_mark() == 0.04
    assert far_end.played(0.039) == []
    assert far_end.played(0.04) == ["first"]
    assert far_end.next_mark() == 0.05
    assert far_end.played(0.06) == ["second"]
    assert far_end.next_mark() is None
    assert far_end.mark("all played", 0.06) == ["all played"]


def test_clear_drops_the_queue_and_gives_the_marks_back() -> None:
    far_end = FarEnd(PCMU, keep=True)
    for _ in range(3):
        far_end.media(160, 0.0, np.ones(160, np.int16))
    far_end.mark("a", 0.0)
    far_end.mark("b", 0.0)
    assert far_end.clear(0.05) == ["a", "b"]  # 30 ms of the audio had been played
    assert far_end.mark("c", 0.05) == ["c"]
    assert far_end.cleared == 1
    far_end.media(160, 0.06, np.full(160, 2, np.int16))
    assert far_end.underruns == 0
    expected = np.concatenate((np.zeros(160), np.ones(240), np.zeros(240), np.full(160, 2))).astype(np.int16)
    np.testing.assert_array_equal(far_end.heard(), expected)


def test_clear_before_anything_played_leaves_silence() -> None:
    far_end = FarEnd(PCMU, keep=True)
    far_end.media(160, 0.0, np.ones(160, np.int16))
    assert far_end.clear(0.01) == []
    assert far_end.heard().size == 0


# --- What is sent -----------------------------------------------------------------------------------------------------


def test_a_script_has_every_message_at_its_time() -> None:
    writer = wire.PlatformWriter("sid")
    skips = iter([False, True] + [False] * 30)
    steps = list(call_script(writer, [b"a", b"b", b"c"], 20, frames=27, dtmf="1#", skip=lambda: next(skips)))
    told = [(step.at, None if step.text is None else json.loads(step.text), step.media, step.last) for step in steps]
    assert told[:3] == [
        (
            0.0,
            {
                "event": "media",
                "sequenceNumber": "1",
                "media": {"track": "inbound", "chunk": "1", "timestamp": "0", "payload": "YQ=="},
            },
            True,
            False,
        ),
        (0.02, None, True, False),
        (
            0.04,
            {
                "event": "media",
                "sequenceNumber": "3",
                "media": {"track": "inbound", "chunk": "3", "timestamp": "40", "payload": "Yw=="},
            },
            True,
            False,
        ),
    ]
    digit = {
        "event": "dtmf",
        "sequenceNumber": "26",
        "streamSid": "sid",
        "dtmf": {"digit": "1", "duration": 200},
    }
    assert told[25:27] == [
        (0.5, digit, False, False),
        (
            0.5,
            {
                "event": "media",
                "sequenceNumber": "27",
                "media": {"track": "inbound", "chunk": "26", "timestamp": "500", "payload": "Yg=="},
            },
            True,
            False,
        ),
    ]
    # The second digit is due after the audio: the call lasts until it is sent.
    digit = {**digit, "sequenceNumber": "29", "dtmf": {"digit": "#", "duration": 200}}
    assert told[28:] == [(0.75, digit, False, False), (0.75, None, False, True)]


def test_a_script_ends_with_its_last_frame() -> None:
    steps = list(call_script(wire.PlatformWriter("sid"), [b"a"], 40, frames=2))
    assert [(step.at, step.media, step.last) for step in steps] == [
        (0.0, True, False),
        (0.04, True, False),
        (0.08, False, True),
    ]


def test_pacing_is_on_absolute_deadlines() -> None:
    clock = [100.0]
    late = Durations()
    pacer = Pacer(lambda: clock[0], late)
    done: list[tuple[str, float]] = []

    def add(name: str, begin: float) -> None:
        steps = [Step(k * 0.02, b"x", media=True, last=k == 2) for k in range(3)]

        def perform(step: Step) -> bool:
            done.append((name, step.at))
            return not step.last

        pacer.add(begin, iter(steps), perform)

    add("a", 100.0)
    add("b", 100.01)
    deadlines = []
    for now in (100.0, 100.0096, 100.025, 100.025, 100.2, 100.2):
        clock[0] = now
        deadlines.append(pacer.run_due())
    # 9.6 ms is near enough to 10; a late step moves no later one; after a stall one round at a time catches up.
    assert deadlines == pytest.approx([100.01, 100.02, 100.03, 100.03, 100.05, None])
    assert done == [("a", 0.0), ("b", 0.0), ("a", 0.02), ("b", 0.02), ("a", 0.04), ("b", 0.04)]
    assert late.percentiles() == {"p50": 5.0, "p99": 170.0, "p999": 170.0, "max": 170.0}


@pytest.mark.parametrize("codec", ["PCMU", "PCMA@40i", "G722", "L16@16000h", "L16@24000h@40i"])
def test_frames_are_whole_and_decode_to_the_padded_audio(codec: str) -> None:
    spec = CodecSpec.parse(codec)
    samples = tone(spec.frame_samples * 3 + 1, spec.rate)
    payloads = encode_payloads(samples, spec)
    assert [len(payload) for payload in payloads] == [spec.bytes_per_second * spec.ptime // 1000] * 4
    padded = np.concatenate((samples, np.zeros(spec.frame_samples - 1, np.int16)))
    assert b"".join(payloads) == spec.encoder().encode(padded)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
def test_any_sample_width_is_read_without_a_change(tmp_path: Path, subtype: str) -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 1234], np.int16)
    soundfile.write(tmp_path / "a.wav", samples / 32768, 8000, subtype=subtype)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 8000), samples)


def test_channels_are_averaged_and_overs_saturate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [[0.5, 0.25], [2.0, 1.5], [-2.0, -1.5]], 8000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav", 8000).tolist() == [12288, 32767, -32768]


def test_audio_is_resampled_to_the_codec(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(44_100, 44_100), 44_100)
    samples = read_audio(tmp_path / "a.flac", 8000)
    assert 8000 <= len(samples) <= 8080
    spectrum = np.abs(np.fft.rfft(samples[:8000] * np.hanning(8000)))
    assert int(spectrum.argmax()) == 440


def test_a_file_that_is_no_sound_is_told(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), 8000)
    (tmp_path / "text.wav").write_text("no sound")
    for name, told in [
        ("missing.wav", "there is no sound file"),
        ("empty.wav", "holds no audio"),
        ("text.wav", "cannot be read as sound"),
    ]:
        with pytest.raises(SimulationError, match=told):
            read_audio(tmp_path / name, 8000)


# --- Captures ---------------------------------------------------------------------------------------------------------

HEAD = '{"head": {"path": "/agent", "headers": [["host", "x"], ["authorization", "Bearer ***"]]}, "t": 0.0, "more": 1}'


def test_a_capture_is_read(tmp_path: Path) -> None:
    writer = wire.PlatformWriter("sid")
    start = writer.start(account_sid="a", call_sid="c", encoding="audio/x-alaw", sample_rate=8000)
    media = writer.media(b"abc", chunk=1, timestamp_ms=0)
    lines = [HEAD, json.dumps({"t": 0.01, "text": start.decode()}), json.dumps({"t": 0.02, "text": media.decode()})]
    lines += ['{"t": 0.02, "base64": "/w=="}', '{"t": 0.5, "text": "no JSON"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    capture = read_capture(tmp_path / "a.jsonl")
    assert (capture.path, capture.codec) == ("/agent", CodecSpec.parse("PCMA"))
    assert capture.steps == (
        Step(0.01, start),
        Step(0.02, media, media=True),
        Step(0.02, b"\xff"),
        Step(0.5, b"no JSON", last=True),
    )


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "is empty"),
        ([HEAD], "holds no message"),
        (["RIFF"], "line 1: "),
        (['{"t": 0, "text": ""}'], "line 1: Object missing required field `head`"),
        ([HEAD, '{"t": 0, "text": ""}', "{"], "line 3: "),
        ([HEAD, '{"t": "x", "text": ""}'], r"line 2: Expected `float`, got `str` - at `\$.t`"),
        ([HEAD, '{"t": 0}'], "line 2: expected either `text` or `base64`"),
        ([HEAD, '{"t": 0, "text": "", "base64": ""}'], "line 2: expected either `text` or `base64`"),
        ([HEAD, '{"t": 0, "base64": "?"}'], "line 2: "),
        ([HEAD, '{"t": 1, "text": ""}', '{"t": 0.5, "text": ""}'], "line 3: `t` is 0.5, earlier than the line before"),
        ([HEAD, '{"t": -1, "text": ""}'], "line 2: `t` is -1"),
        ([HEAD, "[" * 100_000], "line 2: "),
    ],
)
def test_a_broken_capture_names_the_line(tmp_path: Path, lines: list[str], told: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(SimulationError, match=told):
        read_capture(tmp_path / "a.jsonl")


def test_a_missing_capture_is_told(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="cannot be read: No such file"):
        read_capture(tmp_path / "a.jsonl")


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_json_object_is_the_contract() -> None:
    report = Report(streams=2, frames_sent=10, frames_received=9, lost=1, underruns=3, close_code=1000, marks=4)
    assert json.loads(report.to_json()) == {
        "streams": 2,
        "frames_sent": 10,
        "frames_received": 9,
        "lost": 1,
        "turnaround_ms": {"p50": None, "p99": None, "p999": None, "max": None},
        "underruns": 3,
        "close_code": 1000,
    }
    assert report.exit_status == 1
    report.turnaround_ms = {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}
    assert json.loads(report.to_json())["turnaround_ms"] == report.turnaround_ms


def test_the_table_leaves_out_what_did_not_happen() -> None:
    report = Report(
        streams=1, frames_sent=10, turnaround_ms={"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}, clears=2
    )
    assert report_text(report).splitlines() == [
        "streams          1",
        "frames sent      10",
        "frames received  0",
        "lost             0",
        "turnaround       p50 1.00 · p99 2.00 · p99.9 3.00 · max 4.00 ms",
        "underruns        0",
        "clears           2",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"file": None}, "give either a sound FILE"),
        ({"replay": Path("x")}, "give either a sound FILE"),
        ({"file": None, "replay": Path("x"), "streams": 2}, "--streams does not go with --replay"),
        ({"url": "https://localhost/"}, "--url has to begin with wss://"),
        ({"url": "localhost:8443"}, "--url has to begin with wss://"),
        ({"url": "wss://localhost:99999999/"}, "--url cannot be used"),
        ({"url": "wss://me:secret@localhost/"}, "use --token"),
        ({"codec": "OPUS"}, "OPUS"),
        ({"param": ["novalue"]}, "--param wants key=value"),
        ({"streams": 0}, "--streams is 0"),
        ({"seconds": 0.0}, "--seconds is 0"),
        ({"lose": 5.0}, "--lose is 5; it is a share"),
        ({"dtmf": "1x"}, "--dtmf holds 'X'"),
        ({"token": "a\r\nX: y"}, "--token holds a character"),
        ({"save": Path("/nowhere/at/all.wav")}, "there is no folder /nowhere/at"),
        ({"cafile": Path("/nowhere.pem")}, "--cafile /nowhere.pem holds no certificate"),
        ({"url": "wss://localhost/a b"}, "cannot stand in an HTTP request"),
    ],
)
def test_options_that_cannot_be_used_are_told_without_a_traceback(
    sound: Path, options: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SimulateOptions(**{"file": sound, **options})) == 1
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.err.startswith("streamsink simulate: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


# --- Against a real endpoint ------------------------------------------------------------------------------------------

Handler = Callable[[ServerConnection], Awaitable[None]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost and its key in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """0.3 s, 15 frames of 20 ms."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(2400), 8000, subtype="PCM_16")
    return path


class Endpoint:
    """A scripted endpoint that keeps what it was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self.streams: list[list[dict[str, Any]]] = []

    def payloads(self, stream: int = 0) -> list[str]:
        return [message["media"]["payload"] for message in self.streams[stream] if message["event"] == "media"]


@contextlib.asynccontextmanager
async def endpoint(
    certificate: Path | None,
    answer: Callable[[ServerConnection, dict[str, Any]], Awaitable[None]] | None = None,
    refuse: tuple[HTTPStatus, str] | None = None,
    **settings: Any,
) -> AsyncIterator[Endpoint]:
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    async def stream(connection: ServerConnection) -> None:
        messages: list[dict[str, Any]] = []
        this.streams.append(messages)
        try:
            async for text in connection:
                messages.append(json.loads(text))
                if answer is not None:
                    await answer(connection, messages[-1])
        except ConnectionClosed:
            pass

    def look(connection: ServerConnection, request: Request) -> Response | None:
        this.requests.append(request)
        return connection.respond(*refuse) if refuse is not None else None

    server: Server
    async with serve(stream, "127.0.0.1", 0, ssl=context, process_request=look, compression=None, **settings) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        this = Endpoint(f"{'wss' if certificate else 'ws'}://localhost:{port}/")
        yield this


async def echo(connection: ServerConnection, message: dict[str, Any]) -> None:
    if message["event"] == "media":
        await connection.send(json.dumps({"event": "media", "media": {"payload": message["media"]["payload"]}}))


@pytest.mark.parametrize("codec", ["PCMU", "PCMA@40i", "G722", "L16@16000h", "L16@24000h@40i"])
async def test_an_echo_comes_back_whole_and_is_saved_as_it_was_heard(
    certificate: Path, sound: Path, tmp_path: Path, codec: str
) -> None:
    saved = tmp_path / "heard.wav"
    spec = CodecSpec.parse(codec)
    payloads = encode_payloads(read_audio(sound, spec.rate), spec)
    async with endpoint(certificate, echo) as there:
        report = await simulate(
            SimulateOptions(file=sound, url=there.url, cafile=certificate, codec=codec, save=saved, expect_echo=True)
        )
    assert report.failures == []
    assert (report.frames_sent, report.frames_received, report.lost) == (len(payloads), len(payloads), 0)
    assert (report.close_code, report.exit_status, report.saved) == (1000, 0, saved)
    assert report.turnaround_ms is not None
    samples, rate = soundfile.read(saved, dtype="int16")
    assert rate == spec.rate
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    decoder = spec.decoder()
    expected = np.concatenate([decoder.decode(payload) for payload in payloads])
    if not report.underruns:
        np.testing.assert_array_equal(samples[-len(expected) :], expected)


async def test_the_upgrade_and_the_messages_are_what_the_platform_sends(certificate: Path, sound: Path) -> None:
    async with endpoint(certificate) as there:
        report = await simulate(
            SimulateOptions(
                file=sound,
                url=there.url + "agent",
                cafile=certificate,
                token="s3cret",
                param=["a=1", "b=x=y"],
                name="standup",
                codec="G722",
                seconds=0.04,
            )
        )
    assert report.exit_status == 0
    (request,) = there.requests
    assert request.path == "/agent"
    headers = list(request.headers.raw_items())
    key = request.headers["Sec-WebSocket-Key"]
    assert headers == [
        ("Host", "localhost"),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", key),
        ("Sec-WebSocket-Version", "13"),
        ("Authorization", "Bearer s3cret"),
    ]
    (messages,) = there.streams
    body = messages[1]["start"]
    payloads = encode_payloads(read_audio(sound, 16000), CodecSpec.parse("G722"))
    decoded = [wire.decode(json.dumps(message)) for message in messages]
    assert [type(message) for message in decoded] == [wire.Connected, wire.Start, wire.Media, wire.Media, wire.Stop]
    assert [message.media.payload for message in decoded if isinstance(message, wire.Media)] == payloads[:2]
    assert body == {
        "streamSid": body["streamSid"],
        "accountSid": body["accountSid"],
        "callSid": body["callSid"],
        "tracks": ["inbound"],
        "customParameters": {"a": "1", "b": "x=y"},
        "mediaFormat": {"encoding": "audio/G722", "sampleRate": 16000, "channels": 1},
        "name": "standup",
    }


async def test_streams_at_once_have_their_own_sids_and_a_short_file_is_played_again(
    certificate: Path, sound: Path
) -> None:
    async with endpoint(certificate, echo) as there:
        report = await simulate(
            SimulateOptions(
                file=sound,
                url=there.url,
                cafile=certificate,
                streams=5,
                seconds=0.4,
                lose=0.3,
                seed=7,
                expect_echo=True,
            )
        )
    sids = {messages[1]["start"]["streamSid"] for messages in there.streams}
    assert len(sids) == 5
    assert (report.frames_sent + report.skipped, report.lost) == (100, 0)
    assert report.frames_received == report.frames_sent
    expected = set()
    for index in range(5):
        chance = random.Random(f"7 {index}")
        expected.add(tuple(str(chunk) for chunk in range(1, 21) if chance.random() >= 0.3))
    sent = {
        tuple(message["media"]["chunk"] for message in messages if message["event"] == "media")
        for messages in there.streams
    }
    assert sent == expected
    payloads = dict(zip(range(1, 16), encode_payloads(tone(2400), PCMU), strict=True))
    for stream, messages in enumerate(there.streams):
        chunks = [int(message["media"]["chunk"]) for message in messages if message["event"] == "media"]
        decoded = [wire.decode(json.dumps(message)) for message in messages]
        carried = [message.media.payload for message in decoded if isinstance(message, wire.Media)]
        assert carried == [payloads[(chunk - 1) % 15 + 1] for chunk in chunks], stream


async def test_replies_that_never_come_are_lost(certificate: Path, sound: Path) -> None:
    async def echo_most(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "media" and message["media"]["chunk"] != "4":
            await echo(connection, message)

    async with endpoint(certificate, echo_most) as there:
        options = SimulateOptions(file=sound, url=there.url, cafile=certificate, expect_echo=True)
        report = await simulate(options)
    assert (report.frames_sent, report.frames_received, report.lost, report.exit_status) == (15, 14, 1, 1)
    assert report.failures == []


async def test_marks_come_back_when_played_and_at_once_when_cleared(certificate: Path, sound: Path) -> None:
    async def talk(connection: ServerConnection, message: dict[str, Any]) -> None:
        async def send(event: str, **body: Any) -> None:
            await connection.send(json.dumps({"event": event, **body}))

        if message["event"] == "start":
            await send("mark", mark={"name": "nothing queued"})
            await send("media", media={"payload": "f39/f39/f39/f39/"})
            await send("mark", mark={"name": "played"})
            await send("media", media={"payload": "f39/" * 4000})
            await send("mark", mark={"name": "cleared"})
            await send("dtmf", dtmf={"digit": "5"})
            await send("surprise")
            await connection.send("no JSON")
            await connection.send(b"binary")
        if message.get("mark") == {"name": "played"}:
            await send("clear")
            await connection.send(iter_parts(json.dumps({"event": "mark", "mark": {"name": "in parts"}})))

    async with endpoint(certificate, talk) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate))
    marks = [message["mark"]["name"] for message in there.streams[0] if message["event"] == "mark"]
    assert marks == ["nothing queued", "played", "cleared", "in parts"]
    assert (report.marks, report.clears, report.digits, report.bad_messages) == (4, 1, 1, 3)
    assert (report.frames_received, report.close_code) == (2, 1000)


def iter_parts(text: str) -> Iterator[str]:
    yield text[:5]
    yield text[5:]


async def test_digits_are_sent_before_the_call_ends(certificate: Path, sound: Path) -> None:
    async with endpoint(certificate) as there:
        await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate, dtmf="d"))
    events = [message["event"] for message in there.streams[0]]
    assert events[-2:] == ["dtmf", "stop"]
    assert there.streams[0][-2]["dtmf"] == {"digit": "D", "duration": 200}


@pytest.mark.parametrize("no_pong", [False, True])
async def test_pings_are_answered_unless_told_not_to(certificate: Path, sound: Path, no_pong: bool) -> None:
    pongs: list[asyncio.Future[float]] = []

    async def ping(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "start":
            pongs.append(await connection.ping())  # type: ignore[arg-type]

    async with endpoint(certificate, ping, ping_interval=None) as there:
        options = SimulateOptions(file=sound, url=there.url, cafile=certificate, no_pong=no_pong)
        report = await simulate(options)
        answered = [pong.done() and pong.exception() is None for pong in pongs]
    assert answered == [not no_pong]
    assert report.exit_status == 0


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            HTTPStatus.UNAUTHORIZED,
            "refused with HTTP 401 Unauthorized: no\\x1b[1m: the endpoint did not accept the token",
        ),
        (
            HTTPStatus.NOT_FOUND,
            "refused with HTTP 404 Not Found: no\\x1b[1m: the endpoint has no pipeline at this path",
        ),
        (HTTPStatus.SERVICE_UNAVAILABLE, "refused with HTTP 503 Service Unavailable: no\\x1b[1m: the endpoint is full"),
        (HTTPStatus.FORBIDDEN, "refused with HTTP 403 Forbidden: no\\x1b[1m: no WebSocket endpoint answers there"),
    ],
)
async def test_a_refusal_tells_status_body_and_how_to_mend_it(
    certificate: Path, sound: Path, status: HTTPStatus, told: str
) -> None:
    async with endpoint(certificate, refuse=(status, "no\x1b[1m")) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate, streams=3))
    assert len(report.failures) >= 1
    assert all(failure.startswith(told) for failure in report.failures)
    assert (report.exit_status, report.close_code, report.frames_sent) == (1, None, 0)


async def test_a_call_cut_off_tells_code_and_reason(certificate: Path, sound: Path) -> None:
    async def cut(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "media":
            await connection.close(1008, "too loud\a")

    async with endpoint(certificate, cut) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate, expect_echo=True))
    assert report.failures == [
        "the endpoint cut the call off with 1008 (too loud\\x07); its log tells more",
    ]
    assert (report.close_code, report.exit_status) == (1008, 1)


async def test_a_connection_lost_is_told(certificate: Path, sound: Path) -> None:
    async def drop(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "media":
            connection.transport.abort()

    async with endpoint(certificate, drop) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate))
    (failure,) = report.failures
    assert failure.startswith("the connection was lost in the middle of the call")
    assert (report.close_code, report.exit_status) == (1006, 1)


async def test_a_certificate_is_trusted_only_when_named(certificate: Path, sound: Path) -> None:
    async with endpoint(certificate) as there:
        refused = await simulate(SimulateOptions(file=sound, url=there.url))
        accepted = await simulate(SimulateOptions(file=sound, url=there.url, insecure=True, seconds=0.02))
    (failure,) = refused.failures
    assert "is not trusted: self-signed certificate. Name the certificate to trust by --cafile" in failure
    assert refused.exit_status == 1
    assert accepted.exit_status == 0


async def test_tls_where_there_is_none_and_none_where_there_is(certificate: Path, sound: Path) -> None:
    async with endpoint(None) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url.replace("ws:", "wss:")))
        (failure,) = report.failures
        assert "--url begins with ws://" in failure
        plain = await simulate(SimulateOptions(file=sound, url=there.url, seconds=0.02))
        assert plain.exit_status == 0
    async with endpoint(certificate) as there:
        report = await simulate(SimulateOptions(file=sound, url=there.url.replace("wss:", "ws:")))
        (failure,) = report.failures
        assert "--url begins with wss://" in failure


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop, new_event_loop])
async def test_a_failed_handshake_is_one_sentence_on_every_loop(
    sound: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], capfd: pytest.CaptureFixture[str]
) -> None:
    async with endpoint(None) as there:
        options = SimulateOptions(file=sound, url=there.url.replace("ws:", "wss:"))
        assert await asyncio.to_thread(run, options, new_loop) == 1
    shown = capfd.readouterr()
    assert shown.err.startswith("streamsink simulate: no TLS with localhost:")
    assert shown.err.count("\n") == 1


async def test_no_endpoint_is_told(sound: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    report = await simulate(SimulateOptions(file=sound, url=f"ws://127.0.0.1:{port}/"))
    (failure,) = report.failures
    assert failure.startswith(f"no connection to 127.0.0.1:{port}: ")
    assert failure.endswith("Is the endpoint running there? Start it with `streamsink serve`")


async def test_a_server_that_speaks_something_else_is_told(sound: Path) -> None:
    gone = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
            writer.close()
            await writer.wait_closed()
        gone.set()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        report = await simulate(SimulateOptions(file=sound, url=f"ws://127.0.0.1:{port}/"))
        await gone.wait()
    (failure,) = report.failures
    assert failure.startswith("what answers is no WebSocket endpoint")


async def test_a_capture_is_played_back_as_it_was(certificate: Path, sound: Path, tmp_path: Path) -> None:
    async with endpoint(certificate) as there:
        await simulate(SimulateOptions(file=sound, url=there.url, cafile=certificate, seconds=0.1))
        (original,) = there.streams
    lines = [HEAD]
    lines += [json.dumps({"t": 0.01 * k, "text": json.dumps(message)}) for k, message in enumerate(original)]
    capture = tmp_path / "call.jsonl"
    capture.write_text("\n".join(lines))
    heard = tmp_path / "heard.wav"
    async with endpoint(certificate, echo) as there:
        options = SimulateOptions(replay=capture, url=there.url, cafile=certificate, expect_echo=True, save=heard)
        report = await simulate(options)
    assert there.streams == [original]
    assert there.requests[0].path == "/agent"
    assert (report.frames_sent, report.frames_received, report.lost, report.failures) == (5, 5, 0, [])
    assert soundfile.info(heard).samplerate == 8000


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_an_interrupt_stops_the_calls_politely(certificate: Path, sound: Path, loop: str) -> None:
    program = f"""
import sys, pathlib, {loop}
from streamsink.simulator import SimulateOptions, run
options = SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2], cafile=pathlib.Path(sys.argv[3]),
    loop=True, json=True, streams=2)
sys.exit(run(options, {loop}.new_event_loop))
"""
    heard = asyncio.Event()

    async def listen(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "media" and int(message["media"]["chunk"]) > 15:
            heard.set()

    async with endpoint(certificate, listen) as there:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", program, str(sound), there.url, str(certificate)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(30):
                await heard.wait()
                process.send_signal(signal.SIGINT)
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, err.decode()) == (0, "")
    told = json.loads(out)
    assert told["close_code"] == 1000
    assert told["frames_sent"] == len(there.payloads(0)) + len(there.payloads(1))
    assert [messages[-1]["event"] for messages in there.streams] == ["stop", "stop"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_second_interrupt_does_not_wait_for_the_endpoint(sound: Path, loop: str) -> None:
    program = f"""
import sys, pathlib, {loop}
from streamsink.simulator import SimulateOptions, run
options = SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2], loop=True)
sys.exit(run(options, {loop}.new_event_loop))
"""
    peer = RawPeer(accept=True, then=b"", last=None)
    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(sound), f"ws://127.0.0.1:{port}/"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(30):
                await peer.called.wait()
                process.send_signal(signal.SIGINT)
                await peer.hung_up.wait()
                process.send_signal(signal.SIGINT)
                shown = await process.communicate()
                await peer.gone.wait()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, shown) == (130, (b"", b""))


class RawPeer:
    """Takes the upgrade if it is to, sends some bytes, and then nothing but its last word when the call is closed."""

    def __init__(self, *, accept: bool, then: bytes, last: bytes | None) -> None:
        self.accept = accept
        self.then = then
        self.last = last
        self.called = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = ServerProtocol()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if self.accept and isinstance(event, Request):
                        protocol.send_response(protocol.accept(event))
                        writer.write(b"".join(protocol.data_to_send()) + self.then)
                    elif isinstance(event, Frame):
                        self.called.set()
                if protocol.close_rcvd is not None:
                    self.hung_up.set()
                    if self.last is not None:
                        writer.write(self.last)
                        break
            writer.close()
            await writer.wait_closed()
        self.gone.set()


async def against_raw_peer(
    sound: Path, *, accept: bool = True, then: bytes = b"", last: bytes | None = None, **options: Any
) -> Report:
    peer = RawPeer(accept=accept, then=then, last=last)
    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        report = await simulate(SimulateOptions(file=sound, url=f"ws://127.0.0.1:{port}/", **options))
        await peer.gone.wait()
    return report


async def test_an_upgrade_that_is_not_answered_is_given_up(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.simulator.OPEN_TIMEOUT", 0.05)
    report = await against_raw_peer(sound, accept=False)
    (failure,) = report.failures
    assert "did not answer within 0.05 s" in failure
    assert (report.close_code, report.exit_status) == (None, 1)


async def test_a_close_that_is_not_answered_is_given_up(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.simulator.CLOSE_TIMEOUT", 0.05)
    report = await against_raw_peer(sound, seconds=0.02)
    assert report.failures == ["the endpoint did not answer the close within 0.05 s; its log tells why"]
    assert (report.frames_sent, report.close_code, report.exit_status) == (1, 1006, 1)


async def test_an_endpoint_that_breaks_the_framing_is_told(sound: Path) -> None:
    masked = b"\x81\x81abcd!"
    report = await against_raw_peer(sound, then=masked)
    assert report.failures == ["the endpoint broke the WebSocket protocol: incorrect masking"]
    assert report.close_code == 1006


@pytest.mark.parametrize(
    ("last", "close_code", "failures"),
    [
        (b"\x88\x02\x03\xe8", 1000, []),
        (b"\x88\x00", 1005, []),
        (b"\x88\x09\x03\xf3no disk", 1011, ["the endpoint ended the stream with 1011 (no disk); its log tells more"]),
        (b"", 1006, ["the endpoint ended the connection without answering the close; its log tells why"]),
    ],
)
async def test_how_the_endpoint_ends_after_stop_matters(
    sound: Path, last: bytes, close_code: int, failures: list[str]
) -> None:
    report = await against_raw_peer(sound, last=last, seconds=0.02)
    assert (report.close_code, report.failures) == (close_code, failures)


async def test_a_message_before_the_first_of_ours_is_taken(sound: Path) -> None:
    media = b'{"event":"media","media":{"payload":"f39/"}}'
    report = await against_raw_peer(sound, then=b"\x81" + bytes([len(media)]) + media, last=b"\x88\x00", seconds=0.02)
    assert (report.frames_sent, report.frames_received) == (1, 1)


async def test_a_replay_without_a_codec_cannot_be_saved(certificate: Path, tmp_path: Path) -> None:
    capture = tmp_path / "a.jsonl"
    capture.write_text(f'{HEAD}\n{{"t": 0, "text": "{{}}"}}')
    async with endpoint(certificate) as there:
        options = SimulateOptions(replay=capture, url=there.url, cafile=certificate, save=tmp_path / "a.wav")
        report = await simulate(options)
    assert there.streams == [[{}]]
    assert report.failures == ["--save: the capture has no start message that tells the codec, so nothing is saved"]
    assert not (tmp_path / "a.wav").exists()


async def test_silence_is_saved_as_an_empty_file_and_a_failed_write_is_told(
    certificate: Path, sound: Path, tmp_path: Path
) -> None:
    async with endpoint(certificate) as there:
        options = SimulateOptions(file=sound, url=there.url, cafile=certificate, seconds=0.02)
        report = await simulate(dataclasses.replace(options, save=tmp_path / "a.wav"))
        assert (report.failures, soundfile.info(tmp_path / "a.wav").frames) == ([], 0)
        report = await simulate(dataclasses.replace(options, save=tmp_path))
    (failure,) = report.failures
    assert failure.startswith(f"--save: {tmp_path} cannot be written: ")


async def test_a_terminal_sees_the_progress_and_the_table(certificate: Path, sound: Path) -> None:
    program = """
import sys, pathlib
from streamsink.simulator import SimulateOptions, run
sys.exit(run(SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2], insecure=True)))
"""
    terminal, its_end = os.openpty()
    try:
        async with endpoint(certificate, echo) as there:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, str(sound), there.url),
                stdout=asyncio.subprocess.PIPE,
                stderr=its_end,
                env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            out, _ = await process.communicate()
        shown = os.read(terminal, 65_536)
    finally:
        os.close(terminal)
        os.close(its_end)
    assert process.returncode == 0
    assert b"playing" in shown
    assert out.decode().splitlines()[:4] == [
        "streams          1",
        "frames sent      15",
        "frames received  15",
        "lost             0",
    ]


def test_the_same_failure_of_many_streams_is_told_once(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(streams=3, failures=["cut off"] * 3 + ["lost"])
    show(report, as_json=True)
    shown = capsys.readouterr()
    assert shown.err == "streamsink simulate: cut off (3 streams)\nstreamsink simulate: lost\n"
    assert json.loads(shown.out)["streams"] == 3


def test_a_refused_run_says_so_in_a_sentence(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SimulateOptions(file=sound, url="ws://127.0.0.1:1/")) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("streamsink simulate: no connection to 127.0.0.1:1: ")
    assert shown.err.count("\n") == 1

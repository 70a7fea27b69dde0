from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import random
import stat
from collections.abc import Callable, Iterator
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
from websockets.asyncio.server import ServerConnection

from streamsink import wire
from streamsink.codec import CodecSpec
from streamsink.loop import new_event_loop
from streamsink.simulator import Report, SimulateOptions, run, simulate
from streamsink.simulator.script import encode_payloads, read_audio
from tests.scripted_endpoint import RawPeer, echo, endpoint, tone, write_sound

PCMU = CodecSpec.parse("PCMU")
HEAD = '{"head": {"path": "/agent", "headers": [["host", "x"], ["authorization", "Bearer ***"]]}, "t": 0.0, "more": 1}'


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back late is not lost."""
    monkeypatch.setattr("streamsink.simulator.simulation.GRACE", 20.0)


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
    return write_sound(tmp_path)


@pytest.mark.usefixtures("waiting")
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
    assert (report.close_code, report.exit_status) == (1000, 0)
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


@pytest.mark.usefixtures("waiting")
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
    assert (report.frames_sent + report.events["skipped"], report.lost) == (100, 0)
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


async def test_replies_that_never_come_are_lost(
    certificate: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.simulator.simulation.GRACE", 4.0)

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
    assert report.events == {"mark": 4, "clear": 1, "dtmf": 1, "bad": 3}
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


@pytest.mark.usefixtures("waiting")
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
    monkeypatch.setattr("streamsink.simulator.call.OPEN_TIMEOUT", 0.05)
    report = await against_raw_peer(sound, accept=False)
    (failure,) = report.failures
    assert "did not answer within 0.05 s" in failure
    assert (report.close_code, report.exit_status) == (None, 1)


async def test_a_close_that_is_not_answered_is_given_up(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamsink.simulator.simulation.CLOSE_TIMEOUT", 0.05)
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


async def test_a_call_that_is_saved_goes_on_until_the_answer_is_heard(
    certificate: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.simulator.simulation.QUIET", 0.3)
    word = tone(1600)
    payloads = encode_payloads(word, CodecSpec.parse("L16@8000h"))

    async def answer(connection: ServerConnection, message: dict[str, Any]) -> None:
        # Ten frames of silence behind the 15 of the file, then a word of ten frames.
        if message["event"] == "media" and message["media"]["chunk"] == "25":
            for payload in payloads:
                await connection.send(wire.Writer("7d56").media(payload).decode())

    async with endpoint(certificate, answer) as there:
        options = SimulateOptions(file=sound, url=there.url, cafile=certificate, codec="L16@8000h")
        report = await simulate(dataclasses.replace(options, save=tmp_path / "a.wav", streams=2))
    assert report.failures == []
    # Its silence is not part of what it was told to play, and the call that is not saved has none.
    assert report.frames_sent == 30
    assert sorted(len(there.payloads(stream)) > 15 for stream in (0, 1)) == [False, True]
    heard, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert heard[-len(word) :].tolist() == word.tolist()


async def test_a_call_that_is_saved_does_not_wait_for_ever(
    certificate: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.simulator.simulation.LONGEST", 0.1)
    async with endpoint(certificate, echo) as there:
        options = SimulateOptions(file=sound, url=there.url, cafile=certificate, save=tmp_path / "a.wav")
        report = await simulate(options)
    assert report.failures == []
    assert len(there.payloads()) == 15 + 6

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamsink.audio import Frame, Track
from streamsink.codec import CodecSpec
from streamsink.config import Settings
from streamsink.endpoint import Endpoint
from streamsink.errors import CodecError, ProcessorError, StreamClosed, TalkBackOff
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin
from streamsink.processor import MarkOutcome, Processor
from streamsink.session import Session
from streamsink.speech.events import Speaker, Transcript
from streamsink.stream import Stream

LOUD = bytes(160)


class Probe(Processor):
    """Keeps all it is told."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.frames: list[Frame] = []
        self.events: list[tuple[Any, ...]] = []

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        self.events.append(("dtmf", digit, duration_ms))

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        self.events.append(("mark", name, outcome.name))

    def on_status(self, event: Any) -> None:
        self.events.append(("status", event))

    def on_transcript(self, transcript: Transcript) -> None:
        self.events.append(("transcript", transcript))

    def on_speaker(self, event: Speaker) -> None:
        self.events.append(("speaker", event))

    async def on_stop(self, reason: str) -> None:
        self.events.append(("stop", reason))


class At16k(Probe):
    sample_rate = 16_000


class Hears(Probe):
    def on_played(self, frame: Frame) -> None:
        self.events.append(("played", frame.start, len(frame.samples)))


class Unbuildable(Processor):
    def __init__(self) -> None:
        raise ValueError("no")


class Outlet:
    """The connection's side: keeps what a session sends."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.closed: tuple[int, str] | None = None
        self.unsent_limit = 0

    def send(self, text: bytes) -> None:
        self.sent.append(json.loads(text))

    def limit_unsent(self, octets: int) -> None:
        self.unsent_limit = octets

    def close(self, code: int, reason: str) -> None:
        assert self.closed is None
        self.closed = (code, reason)


class Host:
    """An endpoint on a clock the test turns, with one probe in each session."""

    def __init__(self, probe: type[Probe] = Probe, **options: Any) -> None:
        # The pacer's timers run on the loop's own clock: near enough, so that none seems long overdue.
        self.now = asyncio.get_running_loop().time()
        self.probes: list[Probe] = []
        host = self

        class Kept(probe):  # type: ignore[valid-type, misc]
            def __init__(self) -> None:
                super().__init__()
                host.probes.append(self)

        self.settings = Settings(recordings=Path("/nonexistent"), **options)
        self.metrics = Metrics()
        self.endpoint = Endpoint(
            self.settings,
            {name: [Plugin("probe", Kept, {})] for name in self.settings.pipelines},
            self.metrics,
            asyncio.get_running_loop(),
        )
        self.endpoint.clock = lambda: self.now
        self.metrics.watch(self.endpoint.sessions)

    def connect(self, path: str = "/") -> "Peer":
        return Peer(self, path)

    def counted(self, line: str) -> bool:
        return line in self.metrics.render()[0].decode().splitlines()


class Peer:
    """One connection's far end."""

    def __init__(self, host: Host, path: str = "/") -> None:
        self.host = host
        self.outlet = Outlet()
        self.session = Session(
            host.endpoint,
            self.outlet,
            path=path,
            pipeline=host.endpoint.pipeline_of(path),
            client="192.0.2.1:5060",
            token_name="default",
            now=host.now,
        )
        self.chunk = 0

    def send(self, message: dict[str, Any] | bytes) -> None:
        text = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.session.receive(text, self.host.now)

    async def start(
        self, encoding: str = "audio/x-mulaw", rate: int = 8000, channels: int = 1, **body: Any
    ) -> Probe | None:
        self.send({"event": "connected", "protocol": "Call", "version": "0.2.0"})
        media_format = {"encoding": encoding, "sampleRate": rate, "channels": channels}
        given = {"streamSid": "sid", "callSid": "call", "accountSid": "account", "tracks": ["inbound"]}
        before = len(self.host.probes)
        self.send({"event": "start", "start": {**given, "mediaFormat": media_format, **body}})
        await settle()
        return self.host.probes[before] if len(self.host.probes) > before else None

    def media(self, payload: bytes = LOUD, chunk: int | None = None, step: float = 0.02, **media: Any) -> None:
        self.host.now += step
        self.chunk = self.chunk + 1 if chunk is None else chunk
        body = {"track": "inbound", "chunk": str(self.chunk), "payload": base64.b64encode(payload).decode(), **media}
        self.send({"event": "media", "sequenceNumber": str(self.chunk + 1), "media": body})

    def is_open(self) -> bool:
        return self.outlet.closed is None

    async def ended(self) -> None:
        await asyncio.wait_for(self.session.done.wait(), 5)


async def settle() -> None:
    """Let tasks that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def opened(host: Host, **start: Any) -> tuple[Peer, Probe]:
    peer = host.connect()
    probe = await peer.start(**start)
    assert probe is not None
    return peer, probe


async def test_what_was_said_just_before_the_end_finds_nobody_and_is_no_failure() -> None:
    class Answers(Probe):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            assert self.stream is not None
            self.stream.play(frame.samples, frame.sample_rate)

        def on_dtmf(self, digit: str, duration_ms: int) -> None:
            super().on_dtmf(digit, duration_ms)
            assert self.stream is not None
            self.stream.mark("m")

    host = Host(probe=Answers)
    peer = host.connect()
    media_format = {"encoding": "PCMU", "sampleRate": 8000}
    # All in one read: the processor has not even started when the stream has ended.
    peer.send({"event": "start", "start": {"streamSid": "sid", "mediaFormat": media_format}})
    peer.media()
    peer.send({"event": "dtmf", "dtmf": {"digit": "1"}})
    peer.send({"event": "stop"})
    await peer.ended()
    (probe,) = host.probes
    assert len(probe.frames) == 1
    assert probe.events == [("dtmf", "1", 0), ("stop", "stop")]
    assert not any("processor_errors_total{" in line for line in host.metrics.render()[0].decode().splitlines())


async def test_a_stream_from_start_to_stop() -> None:
    host = Host()
    peer, probe = await opened(host, customParameters={"agent": 7}, name="standup")
    stream = probe.stream
    assert stream is not None
    assert (stream.sid, stream.call_sid, stream.account_sid, stream.name) == ("sid", "call", "account", "standup")
    assert stream.custom_parameters == {"agent": 7}
    assert stream.tracks == (Track.INBOUND,)
    assert stream.processors == ["probe"]
    assert stream.path == "/"
    assert str(stream.codec) == str(CodecSpec.parse("PCMU"))
    peer.media(b"\xff" * 160)
    peer.media(b"\x00" * 160)
    peer.send({"event": "dtmf", "dtmf": {"digit": "5", "duration": 2000}})
    assert [(f.start, f.lost, f.sequence, f.sample_rate, f.track, len(f.samples)) for f in probe.frames] == [
        (0, 0, 2, 8000, Track.INBOUND, 160),
        (160, 0, 3, 8000, Track.INBOUND, 160),
    ]
    assert probe.frames[0].duration_ms == 20
    assert set(probe.frames[0].samples.tolist()) == {0}
    assert set(probe.frames[1].samples.tolist()) == {-32124}
    peer.send({"event": "stop", "sequenceNumber": "9"})
    await peer.ended()
    assert probe.events == [("dtmf", "5", 2000), ("stop", "stop")]
    assert peer.outlet.closed == (1000, "stop")
    assert (stream.close_code, stream.close_reason) == (1000, "stop")
    assert host.counted('streamsink_streams_total{codec="PCMU",outcome="stop"} 1.0')
    assert host.counted('streamsink_frames_received_total{codec="PCMU"} 2.0')
    assert host.endpoint.sessions == set()
    assert host.endpoint.live == {}
    # What comes after the end is nobody's.
    peer.media()
    peer.session.end(1006, "", "lost")
    assert len(probe.frames) == 2


@pytest.mark.parametrize(
    ("encoding", "rate", "spec"),
    [
        ("audio/x-mulaw", 8000, "PCMU@8000h@20i"),
        ("PCMA", 8000, "PCMA@8000h@20i"),
        ("audio/G722", 8000, "G722@16000h@20i"),
        ("audio/G722", 16000, "G722@16000h@20i"),
        ("audio/x-L16", 24000, "L16@24000h@20i"),
    ],
)
async def test_the_media_format_picks_the_codec(encoding: str, rate: int, spec: str) -> None:
    _, probe = await opened(Host(), encoding=encoding, rate=rate)
    assert probe.stream is not None
    assert probe.stream.codec == CodecSpec.parse(spec)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"mediaFormat": {"encoding": "audio/opus", "sampleRate": 48000}}, "this mediaFormat cannot be decoded"),
        ({"mediaFormat": {"encoding": "PCMU", "sampleRate": 8000, "channels": 2}}, "this mediaFormat cannot"),
        ({"mediaFormat": {"encoding": "PCMU"}}, "no mediaFormat with a sampleRate"),
        ({"mediaFormat": None}, "no mediaFormat with a sampleRate"),
        ({"customParameters": {"pipeline": "nowhere"}}, "names no pipeline"),
        ({"customParameters": {"pipeline": 5}}, "names no pipeline"),
    ],
)
async def test_a_start_that_cannot_be_served_ends_the_stream(body: dict[str, Any], why: str) -> None:
    host = Host()
    peer = host.connect()
    assert await peer.start(**body) is None
    assert peer.outlet.closed is not None
    assert peer.outlet.closed[0] == 1008
    assert why in peer.outlet.closed[1]
    await peer.ended()
    assert host.counted('streamsink_streams_total{codec="none",outcome="policy"} 1.0')


async def test_media_before_start_ends_the_stream() -> None:
    peer = Host().connect()
    peer.media()
    assert peer.outlet.closed == (1008, "media before start")


async def test_other_messages_before_start_are_dropped_and_counted() -> None:
    host = Host()
    peer = host.connect()
    peer.send({"event": "dtmf", "dtmf": {"digit": "1"}})
    peer.send({"event": "mark", "mark": {"name": "m"}})
    assert peer.is_open()
    assert host.counted('streamsink_messages_bad_total{reason="before_start"} 2.0')
    # Nothing to tell and nowhere to send yet.
    peer.session.status(None)  # type: ignore[arg-type]
    peer.session.writable(False)
    peer.send({"event": "stop"})
    assert peer.outlet.closed == (1000, "stop")


async def test_a_second_start_is_ignored() -> None:
    host = Host()
    peer, probe = await opened(host)
    assert await peer.start() is None
    peer.media()
    assert len(probe.frames) == 1
    assert host.counted('streamsink_messages_bad_total{reason="second_start"} 1.0')


async def test_no_start_in_time_ends_the_stream() -> None:
    peer = Host().connect()
    peer.session.start_deadline()
    assert peer.outlet.closed == (1008, "no start message in time")
    started, _ = await opened(Host())
    started.session.start_deadline()
    assert started.is_open()


async def test_twenty_bad_messages_within_ten_seconds_end_the_stream() -> None:
    peer, _ = await opened(Host())
    for _ in range(19):
        peer.send(b"nonsense")
    assert peer.is_open()
    peer.host.now += 10
    peer.send(b"nonsense")
    assert peer.outlet.closed == (1008, "20 bad messages within 10 s")


async def test_bad_messages_far_apart_do_not() -> None:
    peer, probe = await opened(Host())
    for _ in range(60):
        peer.host.now += 0.6
        peer.send(b"nonsense")
    assert peer.is_open()
    peer.media()
    assert len(probe.frames) == 1


async def test_an_unknown_event_is_ignored() -> None:
    host = Host()
    peer, _ = await opened(host)
    for index in range(100):
        peer.send({"event": f"surprise {index}"})
    assert peer.is_open()
    assert host.counted('streamsink_messages_bad_total{reason="unknown_event"} 100.0')


async def test_a_bad_frame_becomes_a_gap() -> None:
    host = Host()
    peer, probe = await opened(host)
    peer.media()
    peer.media(payload=b"")
    peer.media(track="sideways")
    peer.media()
    assert [(f.start, f.lost) for f in probe.frames] == [(0, 0), (480, 320)]
    assert host.counted("streamsink_frames_lost_total 2.0")
    assert host.counted('streamsink_messages_bad_total{reason="payload"} 1.0')
    assert host.counted('streamsink_messages_bad_total{reason="track"} 1.0')


async def test_duplicates_are_dropped() -> None:
    peer, probe = await opened(Host())
    for chunk in (1, 2, 2, 1, 3):
        peer.media(chunk=chunk)
    assert [f.sequence for f in probe.frames] == [2, 3, 4]


async def test_frames_without_a_chunk_are_taken_as_they_come() -> None:
    peer, probe = await opened(Host())
    payload = base64.b64encode(LOUD).decode()
    for _ in range(3):
        peer.send({"event": "media", "media": {"payload": payload}})
    assert [(f.start, f.lost, f.sequence) for f in probe.frames] == [(0, 0, 0), (160, 0, 1), (320, 0, 2)]


async def test_two_tracks_run_side_by_side_each_with_its_own_decoder() -> None:
    peer, probe = await opened(Host(), tracks=["inbound", "outbound", "inbound", "other"], encoding="G722", rate=8000)
    assert probe.stream is not None
    assert probe.stream.tracks == (Track.INBOUND, Track.OUTBOUND)
    rng = np.random.default_rng(1)
    payloads = [rng.integers(0, 256, 160, np.uint8).tobytes() for _ in range(6)]
    for chunk in range(3):
        peer.media(payloads[chunk], chunk=chunk)
        peer.media(payloads[3 + chunk], chunk=chunk, step=0, track="outbound")
    for track, own in ((Track.INBOUND, payloads[:3]), (Track.OUTBOUND, payloads[3:])):
        frames = [f for f in probe.frames if f.track is track]
        assert [f.start for f in frames] == [0, 320, 640]
        decoded = CodecSpec.parse("G722").decoder().decode(b"".join(own))
        assert np.concatenate([f.samples for f in frames]).tolist() == decoded.tolist()


async def test_a_later_track_starts_where_the_first_one_stands() -> None:
    peer, probe = await opened(Host(), tracks=["inbound", "outbound"])
    for chunk in range(1, 6):
        peer.media(chunk=chunk)
    peer.media(chunk=1, step=0, track="outbound")
    assert (probe.frames[-1].track, probe.frames[-1].start) == (Track.OUTBOUND, 4 * 160)


async def test_odd_octets_of_l16_are_carried() -> None:
    peer, probe = await opened(Host(), encoding="audio/x-L16", rate=16000)
    samples = np.arange(320, dtype="<i2").tobytes()
    peer.media(samples[:1])
    peer.media(samples[1:101])
    peer.media(samples[101:])
    assert np.concatenate([f.samples for f in probe.frames]).tolist() == list(range(320))
    assert [f.start for f in probe.frames] == [0, 50]


async def test_a_big_endian_l16_is_found_out_and_answered_in_kind() -> None:
    peer, probe = await opened(Host(l16_byteorder="auto"), encoding="audio/x-L16", rate=16000)
    tone = (8000 * np.sin(np.arange(16_000) / 20)).astype(np.int16)
    for start in range(0, 16_000, 320):
        peer.media(tone[start : start + 320].astype(">i2").tobytes())
    assert np.concatenate([f.samples for f in probe.frames]).tolist() == tone.tolist()
    assert probe.stream is not None
    probe.stream.play(np.full(320, 0x0102, np.int16), 16000)
    assert base64.b64decode(peer.outlet.sent[-1]["media"]["payload"])[:2] == b"\x01\x02"


async def test_a_big_endian_setting_holds_from_the_first_frame_out() -> None:
    class Greets(Probe):
        async def on_start(self, stream: Stream) -> None:
            stream.play(np.full(320, 0x0102, np.int16), 16_000)

    peer, _ = await opened(Host(probe=Greets, l16_byteorder="big"), encoding="audio/x-L16", rate=16000)
    assert base64.b64decode(peer.outlet.sent[0]["media"]["payload"])[:2] == b"\x01\x02"


async def test_the_inbound_track_alone_tells_the_byte_order_to_answer_in() -> None:
    host = Host(l16_byteorder="auto")
    peer, probe = await opened(host, encoding="audio/x-L16", rate=16000, tracks=["inbound", "outbound"])
    tone = (8000 * np.sin(np.arange(16_000) / 20)).astype(np.int16)
    for chunk, start in enumerate(range(0, 16_000, 320)):
        peer.media(tone[start : start + 320].astype(">i2").tobytes(), chunk=chunk)
        peer.media(bytes(640), chunk=chunk, step=0, track="outbound")
    assert probe.stream is not None
    for _ in range(4):
        probe.stream.play(np.full(320, 0x0102, np.int16), 16_000)
    assert [base64.b64decode(m["media"]["payload"])[:2] for m in peer.outlet.sent] == [b"\x01\x02"] * 4


async def test_frames_are_read_only() -> None:
    for probe_class in (Probe, At16k):
        peer, probe = await opened(Host(probe=probe_class))
        peer.media()
        with pytest.raises(ValueError, match="read-only"):
            probe.frames[0].samples[0] = 1


async def test_too_many_messages_end_the_stream() -> None:
    peer, _ = await opened(Host())
    for _ in range(10_000):
        peer.send(b'{"event":"dtmf","dtmf":{"digit":"1"}}')
    assert peer.is_open()
    peer.host.now += 1
    for _ in range(500):
        peer.send(b'{"event":"dtmf","dtmf":{"digit":"1"}}')
    assert peer.is_open()
    peer.send(b'{"event":"dtmf","dtmf":{"digit":"1"}}')
    assert peer.outlet.closed == (1008, "flood: too many messages")


async def test_the_log_has_a_name_only_where_it_is_no_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    _, probe = await opened(Host(), customParameters={"name": "pin-4711"})
    assert probe.stream is not None
    assert probe.stream.name == "pin-4711"
    await opened(Host(), name="standup")
    logged = capsys.readouterr().out
    assert "standup" in logged
    assert "4711" not in logged


async def test_the_first_frame_tells_the_ptime() -> None:
    peer, probe = await opened(Host())
    peer.media(bytes(320))
    assert probe.stream is not None
    assert str(probe.stream.codec) == "PCMU@8000h@40i"
    probe.stream.play(np.zeros(640, np.int16), 8000)
    assert [len(base64.b64decode(m["media"]["payload"])) for m in peer.outlet.sent] == [320, 320]


@pytest.mark.parametrize("size", [1, 161, 8 * 500])
async def test_a_first_frame_of_no_usual_ptime_changes_nothing(size: int) -> None:
    peer, probe = await opened(Host())
    peer.media(bytes(size))
    assert probe.stream is not None
    probe.stream.play(np.zeros(160, np.int16), 8000)
    assert len(base64.b64decode(peer.outlet.sent[0]["media"]["payload"])) == 160


async def test_a_flood_ends_the_stream_and_a_burst_after_a_stall_does_not() -> None:
    peer, probe = await opened(Host())
    # Ten seconds ahead of time is allowed, not a frame more.
    for _ in range(500):
        peer.media(step=0)
    assert peer.is_open()
    peer.media(step=0)
    assert peer.outlet.closed == (1008, "flood: more audio than time has passed")
    assert len(probe.frames) == 500

    stalled, probe = await opened(Host())
    stalled.media()
    stalled.host.now += 60
    for _ in range(3500):
        stalled.media(step=0)
    assert stalled.is_open()
    assert len(probe.frames) == 3501


async def test_a_processor_gets_the_rate_it_asked_for() -> None:
    peer, probe = await opened(Host(probe=At16k))
    for chunk in (1, 2, 4):
        peer.media(chunk=chunk)
    assert [(f.sample_rate, f.start, f.lost, len(f.samples)) for f in probe.frames] == [
        (16_000, 0, 0, 320),
        (16_000, 320, 0, 320),
        (16_000, 960, 320, 320),
    ]


async def test_talk_back() -> None:
    host = Host()
    peer, probe = await opened(host)
    peer.media()
    stream = probe.stream
    assert stream is not None
    stream.play(np.zeros(160, np.int16), 8000)
    stream.mark("heard")
    stream.send_dtmf("1#")
    await settle()
    peer.host.now += 0.1
    host.endpoint.pacer.tick(host.now)
    assert [m["event"] for m in peer.outlet.sent] == ["media", "mark", "dtmf", "dtmf"]
    peer.send({"event": "mark", "mark": {"name": "heard"}})
    peer.send({"event": "mark", "mark": {"name": "never sent"}})
    stream.play(np.zeros(1600, np.int16), 8000)
    stream.mark("dropped")
    stream.clear()
    stream.mark("open")
    peer.session.writable(False)
    peer.session.writable(True)
    peer.send({"event": "stop"})
    await peer.ended()
    assert probe.events == [
        ("mark", "heard", "PLAYED"),
        ("mark", "dropped", "CLEARED"),
        ("mark", "open", "UNCONFIRMED"),
        ("stop", "stop"),
    ]
    uses: tuple[Callable[[], object], ...] = (
        lambda: stream.play(np.zeros(160, np.int16), 8000),
        lambda: stream.play_file("hello.wav"),
        lambda: stream.say("hello"),
        lambda: stream.tone(440, 100),
    )
    for use in uses:
        with pytest.raises(StreamClosed):
            use()


@pytest.mark.parametrize(
    ("encoding", "rate"),
    [("audio/x-mulaw", 8000), ("audio/x-alaw", 8000), ("audio/G722", 8000), ("audio/x-L16", 16000), ("l16", 48000)],
)
async def test_a_socket_is_bounded_to_two_seconds_of_audio(encoding: str, rate: int) -> None:
    peer, probe = await opened(Host(), encoding=encoding, rate=rate)
    assert probe.stream is not None
    sizes: list[int] = []
    playback = peer.session._playback
    assert playback is not None

    def weigh(text: bytes) -> None:
        sizes.append(len(text))

    playback._send = weigh
    frame = np.zeros(probe.stream.codec.frame_samples, np.int16)
    probe.stream.play(frame, probe.stream.codec.rate)
    assert peer.outlet.unsent_limit == pytest.approx(2 * 50 * sizes[0], rel=0.01)


async def test_a_mark_without_an_echo_is_told_while_the_stream_lives() -> None:
    host = Host()
    peer, probe = await opened(host)
    assert probe.stream is not None
    probe.stream.mark("lost")
    host.now += 5.1
    host.endpoint.pacer.tick(host.now)
    assert probe.events == [("mark", "lost", "UNCONFIRMED")]
    peer.send({"event": "mark", "mark": {"name": "lost"}})
    assert probe.events == [("mark", "lost", "UNCONFIRMED")]


@pytest.mark.parametrize("digits", ["", "5x", "a"])
async def test_digits_that_are_none_are_refused(digits: str) -> None:
    peer, probe = await opened(Host())
    assert probe.stream is not None
    with pytest.raises(ValueError, match="one or more of 0-9"):
        probe.stream.send_dtmf(digits)
    assert peer.outlet.sent == []


async def test_a_digit_from_the_peer_must_be_one() -> None:
    host = Host()
    peer, probe = await opened(host)
    peer.send({"event": "dtmf", "dtmf": {"digit": "\x1b[31m"}})
    assert probe.events == []
    assert host.counted('streamsink_messages_bad_total{reason="type"} 1.0')


async def test_a_pipeline_without_talk_back_is_silent() -> None:
    host = Host(pipelines={"default": {"processors": ["record"], "talk_back": False}})
    peer, probe = await opened(host)
    stream = probe.stream
    assert stream is not None
    for use in (
        lambda: stream.play(np.zeros(160, np.int16), 8000),
        lambda: stream.play_file("hello.wav"),
        lambda: stream.tone(440, 100),
        lambda: stream.play_live(None),
        lambda: stream.mark("m"),
        lambda: stream.clear(),
        lambda: stream.send_dtmf("1"),
    ):
        with pytest.raises(TalkBackOff, match="talk_back = false"):
            use()
    # It is heard all the same.
    peer.media()
    peer.media()
    assert [frame.start for frame in probe.frames] == [0, 160]
    assert peer.outlet.sent == []


async def test_what_was_heard_is_placed_on_the_inbound_clock() -> None:
    host = Host(probe=Hears)
    peer, probe = await opened(host)
    peer.media()
    assert probe.stream is not None
    probe.stream.play(np.zeros(320, np.int16), 8000)
    await settle()
    host.now += 0.1
    host.endpoint.pacer.tick(host.now)
    # The first frame's end came now, so what is heard from now on lies behind it.
    assert probe.events == [("played", 160, 160), ("played", 320, 160)]
    host.now += 0.9
    probe.stream.play(np.zeros(160, np.int16), 8000)
    host.now += 0.1
    host.endpoint.pacer.tick(host.now)
    assert probe.events[2:] == [("played", 8160, 160)]


@pytest.mark.parametrize("ppm", [400, -400])
async def test_outgoing_audio_keeps_the_pace_of_what_comes_in(ppm: int) -> None:
    host = Host(probe=Hears)
    peer, probe = await opened(host)
    assert probe.stream is not None
    frames = 60 * 50
    for _ in range(frames):
        peer.media(step=0.02 / (1 + ppm * 1e-6))
    playback = peer.session._playback
    assert playback is not None
    assert playback._slope == pytest.approx(1 + ppm * 1e-6, abs=1e-6)
    probe.stream.play(np.zeros(160, np.int16), 8000)
    host.now += 0.1
    host.endpoint.pacer.tick(host.now)
    ((_, start, _),) = [event for event in probe.events if event[0] == "played"]
    # Counted by our clock it would be 24 ms off by now.
    assert start == pytest.approx(frames * 160, abs=0.004 * 8000)


async def test_a_processor_may_hang_up() -> None:
    peer, probe = await opened(Host())
    assert probe.stream is not None
    await probe.stream.close("done here")
    await probe.stream.close("twice")
    assert peer.outlet.closed == (1000, "done here")
    await peer.ended()
    assert probe.events == [("stop", "closed")]


async def test_calls_from_threads_reach_the_loop() -> None:
    _, probe = await opened(Host())
    stream = probe.stream
    assert stream is not None
    ran = asyncio.Event()
    await asyncio.to_thread(stream.from_thread, ran.set)
    await asyncio.wait_for(ran.wait(), 5)
    stream._loop = asyncio.new_event_loop()
    stream._loop.close()
    with pytest.raises(StreamClosed):
        stream.from_thread(ran.set)


async def test_what_one_processor_knows_all_are_told() -> None:
    peer, probe = await opened(Host())
    assert probe.stream is not None
    transcript = Transcript(0, 0, "Hello", True, 0.5, 1.0, track=Track.INBOUND, speaker="inbound")
    probe.stream.transcribed(transcript)
    speaker = Speaker("sid", None, 1.5, -20.0)
    probe.stream.speaker_changed(speaker)
    assert probe.events == [("transcript", transcript), ("speaker", speaker)]
    peer.send({"event": "stop"})
    await peer.ended()


async def test_the_same_sid_again_goes_to_the_newer_stream() -> None:
    host = Host()
    older, old_probe = await opened(host)
    newer, new_probe = await opened(host)
    assert older.outlet.closed == (1001, "a newer stream has this streamSid")
    await older.ended()
    assert old_probe.events == [("stop", "closed")]
    assert host.endpoint.live == {"sid": newer.session}
    newer.media()
    assert len(new_probe.frames) == 1


async def test_a_sid_is_made_where_none_came() -> None:
    _, probe = await opened(Host(), streamSid=None)
    assert probe.stream is not None
    assert len(probe.stream.sid) == 32


async def test_pipelines_by_path_and_by_parameter() -> None:
    host = Host(pipelines={"default": {"processors": ["record"]}, "agent": {"processors": ["echo"]}})
    assert host.endpoint.pipeline_of("/") is None
    assert host.endpoint.pipeline_of("/agent") == host.endpoint.pipeline_of("/agent/") == "agent"
    with pytest.raises(KeyError):
        host.endpoint.pipeline_of("/nowhere")
    by_path = host.connect("/agent")
    await by_path.start(customParameters={"pipeline": "default"})
    by_parameter = host.connect()
    await by_parameter.start(customParameters={"pipeline": "agent"}, streamSid="2")
    neither = host.connect()
    await neither.start(streamSid="3")
    assert [p.session.pipeline for p in (by_path, by_parameter, neither)] == ["agent", "agent", "default"]


async def test_a_processor_that_cannot_be_built_leaves_the_others() -> None:
    host = Host()
    plugins = host.endpoint.pipelines["default"]
    plugins.insert(0, Plugin("unbuildable", Unbuildable, {}))
    with pytest.raises(ProcessorError):
        plugins[0].build()
    peer, probe = await opened(host)
    peer.media()
    assert len(probe.frames) == 1
    assert host.counted('streamsink_processor_errors_total{processor="unbuildable"} 1.0')


async def test_silence_ends_a_stream_only_where_a_limit_is_set() -> None:
    host = Host(media_silence_seconds=30)
    peer, probe = await opened(host)
    peer.media()
    peer.session.check_silence(host.now + 30)
    assert peer.is_open()
    peer.session.check_silence(host.now + 30.1)
    assert peer.outlet.closed == (1008, "no media for 30 s")
    await peer.ended()
    assert probe.events == [("stop", "lost")]
    unlimited, _ = await opened(Host())
    unlimited.session.check_silence(1e9)
    assert unlimited.is_open()


class Event:
    def __init__(self, stream_sid: str | None, call_sid: str | None) -> None:
        self.stream_sid = stream_sid
        self.call_sid = call_sid


async def test_status_events_find_their_stream() -> None:
    host = Host()
    _, first = await opened(host)
    _, second = await opened(host, streamSid="two", callSid="other")
    await opened(host, streamSid="three", callSid="shared")
    await opened(host, streamSid="four", callSid="shared")
    found = [
        host.endpoint.status(Event(*ids))  # type: ignore[arg-type]
        for ids in [("sid", None), (None, "other"), ("gone", "other"), (None, "shared"), (None, None), ("gone", None)]
    ]
    assert found == [True, True, True, False, False, False]
    assert [len(first.events), len(second.events)] == [1, 2]


async def test_a_live_source_is_pulled() -> None:
    peer, probe = await opened(Host())
    assert probe.stream is not None
    probe.stream.play_live(lambda count: np.zeros(count, np.int16))
    assert [m["event"] for m in peer.outlet.sent] == ["media"] * 2


async def test_a_wrong_array_is_the_processors_own_error() -> None:
    _, probe = await opened(Host())
    assert probe.stream is not None
    with pytest.raises(CodecError):
        probe.stream.play(np.zeros(160, np.float64), 8000)  # type: ignore[arg-type]


anything = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b'{"event":"connected"}',
            b'{"event":"start","start":{"streamSid":"a","mediaFormat":{"encoding":"PCMU","sampleRate":8000}}}',
            b'{"event":"start","start":{"streamSid":"b","mediaFormat":{"encoding":"L16","sampleRate":"16000"}}}',
            b'{"event":"start","start":{}}',
            b'{"event":"media","media":{"payload":"AAAA","chunk":3}}',
            b'{"event":"media","media":{"payload":"AAA=","chunk":"1","track":"outbound"}}',
            b'{"event":"media","media":{"payload":"AAAA","chunk":90000000}}',
            b'{"event":"media","media":{"payload":"AAAA"}}',
            b'{"event":"media","media":{"payload":""}}',
            b'{"event":"dtmf","dtmf":{"digit":"5"}}',
            b'{"event":"mark","mark":{"name":"m"}}',
            b'{"event":"stop"}',
            b'{"event":"else"}',
        ]
    ),
)


@given(st.lists(st.tuples(anything, st.floats(0, 5)), max_size=30), st.sampled_from(["little", "auto"]))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_messages_breaks_a_session(messages: list[tuple[bytes, float]], byteorder: str) -> None:
    async def run() -> None:
        host = Host(l16_byteorder=byteorder)
        peer = host.connect()
        for text, step in messages:
            host.now += step
            peer.send(text)
            await asyncio.sleep(0)
        peer.session.end(1006, "", "lost")
        await peer.ended()
        position = {Track.INBOUND: 0, Track.OUTBOUND: 0}
        for probe in host.probes:
            for frame in probe.frames:
                assert frame.start - frame.lost >= position[frame.track]
                position[frame.track] = frame.start + len(frame.samples)

    asyncio.run(run())

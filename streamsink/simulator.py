"""Plays SignalWire's part over a real socket: a sound file goes to an endpoint as a conference would send it.

From top to bottom: what is asked for and what came of it; the far end's play-out; what is sent and when; one call's
socket; the whole run. Nothing of the server is imported, so what this tool says about an endpoint is a second opinion.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import math
import os
import random
import signal
import ssl
import sys
import time
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import soundfile
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus, InvalidURI
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.uri import WebSocketURI, parse_uri

from streamsink import wire
from streamsink.audio import Samples
from streamsink.codec import CodecSpec, Decoder, Resampler
from streamsink.errors import BadMessage, CodecError, StreamsinkError

OPEN_TIMEOUT = 10.0
"""Seconds for TCP, TLS and the upgrade of one call."""
CLOSE_TIMEOUT = 10.0
"""Seconds an endpoint has to answer our close."""
GRACE = 1.0
"""Seconds without a returned frame after which what is still missing counts as lost."""
PAUSE = 0.5
"""Seconds: returned audio that has been silent for longer begins a new talk spurt, which is no underrun."""

_ENCODINGS = {"PCMU": "audio/x-mulaw", "PCMA": "audio/x-alaw", "G722": "audio/G722", "L16": "audio/x-L16"}
_OPENING_AT_ONCE = 32
_DTMF_FIRST = 0.5
_DTMF_EVERY = 0.25


class SimulationError(StreamsinkError):
    """The simulation cannot be run as asked; the message says how to mend it."""


class CallRefused(StreamsinkError):
    """A call did not come about: no connection, no trust, or no upgrade; the message says how to mend it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What to simulate; each field is the command-line flag of its name.

    Attributes:
        file: Any sound file soundfile reads: mixed to mono and resampled to the codec's rate.
        replay: A capture to play back instead of ``file``.
        url: ``wss://host:port/path``, or ``ws://`` where a proxy terminates TLS.
        token: The bearer token; none is sent without.
        cafile: A PEM file of certificates to trust besides the system's.
        insecure: Accept any certificate.
        codec: ``NAME[@<rate>h][@<ptime>i]``, such as ``L16@24000h@40i``.
        param: Custom parameters, each ``key=value``.
        name: The stream's friendly name.
        streams: How many calls at once, their frames spread over the ptime.
        loop: Play the file again and again, until interrupted or until ``seconds`` are over.
        seconds: Length of the call; a shorter file is played again.
        dtmf: Digits a participant presses, the first after 0.5 s, then one each 0.25 s.
        lose: Share of frames that are skipped, from 0 up to 1: chunk numbers and timestamps jump.
        seed: Picks which frames are skipped.
        save: Where to write what the first call's participant heard, as WAV.
        expect_echo: Each sent frame must come back; what has not after ``GRACE`` is lost.
        no_pong: Leave pings unanswered, as SignalWire's own library does.
        json: Print one JSON object instead of a table.
    """

    file: Path | None = None
    replay: Path | None = None
    url: str = "wss://localhost:8443/"
    token: str | None = None
    cafile: Path | None = None
    insecure: bool = False
    codec: str = "PCMU"
    param: Sequence[str] = ()
    name: str | None = None
    streams: int = 1
    loop: bool = False
    seconds: float | None = None
    dtmf: str = ""
    lose: float = 0.0
    seed: int = 0
    save: Path | None = None
    expect_echo: bool = False
    no_pong: bool = False
    json: bool = False


class Durations:
    """Many durations in little memory: counted in steps of 10 µs."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[round(seconds * 100_000)] += 1

    def percentiles(self) -> dict[str, float] | None:
        """``p50``, ``p99``, ``p999`` (nearest rank) and ``max`` in milliseconds; None when there is nothing."""
        total = self._counts.total()
        if not total:
            return None
        steps = sorted(self._counts)
        reached = np.cumsum([self._counts[step] for step in steps])
        ranks = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "max": 1.0}
        return {
            name: steps[int(np.searchsorted(reached, math.ceil(share * total)))] / 100 for name, share in ranks.items()
        }


@dataclasses.dataclass
class Report:
    """What came of a simulation.

    Attributes:
        streams: Calls asked for.
        frames_sent: Media messages sent, all calls together; those skipped on purpose are not among them.
        frames_received: Media messages that came back.
        lost: With ``expect_echo``, the frames that did not come back; else 0.
        turnaround_ms: From sending frame k to the arrival of the k-th returned frame, in milliseconds.
        underruns: How often the far end ran dry in the middle of a talk spurt; see `FarEnd`.
        close_code: The endpoint's WebSocket close code, of the call that went worst; 1006 where the connection ended
            without one, None where there was no call.
        late_ms: How late the simulator itself sent, in milliseconds: a busy machine shows here.
        marks: Marks the endpoint set.
        clears: How often it cleared the queue.
        digits: DTMF digits it sent.
        bad_messages: Messages of it that no platform would understand.
        skipped: Frames skipped on purpose.
        saved: Where the participant's side was written.
        failures: A sentence for each call that failed: what happened and how to mend it.
    """

    streams: int
    frames_sent: int = 0
    frames_received: int = 0
    lost: int = 0
    turnaround_ms: dict[str, float] | None = None
    underruns: int = 0
    close_code: int | None = None
    late_ms: dict[str, float] | None = None
    marks: int = 0
    clears: int = 0
    digits: int = 0
    bad_messages: int = 0
    skipped: int = 0
    saved: Path | None = None
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 when all went well; 1 when a call failed or a reply is missing."""
        return 1 if self.failures or self.lost else 0

    def to_json(self) -> str:
        """One JSON object, the outside contract of ``--json``."""
        nothing = dict.fromkeys(("p50", "p99", "p999", "max"))
        return msgspec.json.encode(
            {
                "streams": self.streams,
                "frames_sent": self.frames_sent,
                "frames_received": self.frames_received,
                "lost": self.lost,
                "turnaround_ms": self.turnaround_ms or nothing,
                "underruns": self.underruns,
                "close_code": self.close_code,
            }
        ).decode()


def report_text(report: Report) -> str:
    """The report as a table for people; what did not happen is left out."""
    rows: list[tuple[str, str]] = [
        ("streams", str(report.streams)),
        ("frames sent", str(report.frames_sent)),
        ("frames received", str(report.frames_received)),
        ("lost", str(report.lost)),
    ]
    if report.turnaround_ms is not None:
        rows.append(("turnaround", _spread(report.turnaround_ms)))
    rows.append(("underruns", str(report.underruns)))
    for label, count in (
        ("skipped on purpose", report.skipped),
        ("marks set", report.marks),
        ("clears", report.clears),
        ("digits received", report.digits),
        ("bad messages", report.bad_messages),
    ):
        if count:
            rows.append((label, str(count)))
    if report.late_ms is not None:
        rows.append(("sent late by", _spread(report.late_ms)))
    if report.close_code is not None:
        rows.append(("close code", str(report.close_code)))
    if report.saved is not None:
        rows.append(("saved", str(report.saved)))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _spread(milliseconds: Mapping[str, float]) -> str:
    p50, p99, p999, most = (milliseconds[name] for name in ("p50", "p99", "p999", "max"))
    return f"p50 {p50:.2f} · p99 {p99:.2f} · p99.9 {p999:.2f} · max {most:.2f} ms"


# --- The far end: what the platform does with the endpoint's audio ----------------------------------------------------


class FarEnd:
    """The platform's play-out of one stream: a queue played in order, one frame behind.

    A talk spurt starts one ptime after its first audio arrives, the least jitter buffer there is; from then on audio
    plays as the one before it ends. Audio that comes after the queue ran dry starts a spurt of its own; it is an
    **underrun**, a hole a participant hears, unless the silence lasted longer than `PAUSE` or the endpoint had cleared
    the queue. Places in time are samples since the call began, so audio that is contiguous stays so.

    Args:
        codec: Tells the rate and the length of a frame.
        keep: Keep the audio for `heard`.

    Attributes:
        underruns: Holes so far.
        cleared: How often the queue was dropped.
    """

    __slots__ = ("_cushion", "_end", "_in_spurt", "_kept", "_marks", "_rate", "cleared", "underruns")

    def __init__(self, codec: CodecSpec, *, keep: bool = False) -> None:
        self._rate = codec.rate
        self._cushion = codec.frame_samples
        self._end = 0
        self._in_spurt = False
        self._marks: deque[tuple[int, str]] = deque()
        self._kept: list[tuple[int, Samples]] | None = [] if keep else None
        self.underruns = 0
        self.cleared = 0

    def media(self, length: int, now: float, samples: Samples | None = None) -> None:
        """Queue audio.

        Args:
            length: Samples.
            now: Seconds since the call began.
            samples: The audio, shape ``(length,)``, where it is to be kept.
        """
        position = int(now * self._rate)
        if self._end <= position:
            if self._in_spurt and position - self._end <= PAUSE * self._rate:
                self.underruns += 1
            self._end = position + self._cushion
            self._in_spurt = True
        if self._kept is not None and samples is not None:
            self._kept.append((self._end, samples))
        self._end += length

    def mark(self, name: str, now: float) -> list[str]:
        """Take a mark; returns the names to send back at once: this one, if nothing is queued before it."""
        if not self._marks and self._end <= int(now * self._rate):
            return [name]
        self._marks.append((self._end, name))
        return []

    def clear(self, now: float) -> list[str]:
        """Drop what has not been played; returns the names of all waiting marks, to send back at once."""
        position = int(now * self._rate)
        self._end = min(self._end, position)
        self._in_spurt = False
        self.cleared += 1
        if self._kept is not None:
            while self._kept and self._kept[-1][0] >= position:
                self._kept.pop()
            if self._kept:
                start, samples = self._kept[-1]
                self._kept[-1] = (start, samples[: position - start])
        names = [name for _, name in self._marks]
        self._marks.clear()
        return names

    def next_mark(self) -> float | None:
        """When the next waiting mark's audio will have been played, in seconds since the call began."""
        return self._marks[0][0] / self._rate if self._marks else None

    def played(self, now: float) -> list[str]:
        """The names of the marks whose audio has been played by now, in order; each is returned once."""
        names = []
        # A deadline comes back from seconds to samples by rounding, or the mark on it would be missed by one sample.
        position = round(now * self._rate)
        while self._marks and self._marks[0][0] <= position:
            names.append(self._marks.popleft()[1])
        return names

    def heard(self) -> Samples:
        """All audio as a participant heard it since the call began, silence where there was none."""
        kept = self._kept or []
        heard = np.zeros(kept[-1][0] + len(kept[-1][1]) if kept else 0, np.int16)
        for start, samples in kept:
            heard[start : start + len(samples)] = samples
        return heard


class EchoMatch:
    """Pairs the k-th frame that comes back with the k-th frame sent.

    Args:
        turnaround: Takes the time between the two.

    Attributes:
        sent: Frames sent.
        returned: Frames that came back.
    """

    WINDOW = 4096
    """Frames in flight that can still be timed, 82 s at 20 ms; beyond them frames are only counted."""

    __slots__ = ("_turnaround", "_when", "returned", "sent")

    def __init__(self, turnaround: Durations) -> None:
        self._turnaround = turnaround
        self._when = array("d", bytes(8 * self.WINDOW))
        self.sent = 0
        self.returned = 0

    def send(self, now: float) -> None:
        """A frame goes out; ``now`` in seconds on the clock of `come_back`."""
        self._when[self.sent % self.WINDOW] = now
        self.sent += 1

    def come_back(self, now: float) -> None:
        """A frame came back."""
        if self.returned < self.sent <= self.returned + self.WINDOW:
            self._turnaround.add(now - self._when[self.returned % self.WINDOW])
        self.returned += 1

    @property
    def missing(self) -> int:
        """Frames that have not come back."""
        return max(0, self.sent - self.returned)


# --- What is sent, and when -------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One message of a call's script."""

    at: float
    """Seconds since the call began."""
    text: bytes | None
    """The message; None where nothing is sent."""
    media: bool = False
    """It is a frame; without a text, one that is skipped."""
    last: bool = False
    """The script is over with it."""


def read_audio(path: Path, rate: int) -> Samples:
    """Read a sound file as mono at a codec's rate.

    Args:
        path: Any format and sample width soundfile reads; channels are averaged.
        rate: Hz wanted.

    Returns:
        int16 samples, shape ``(n,)``, n > 0.

    Raises:
        SimulationError: The file is missing, unreadable, empty, or has a rate that cannot be converted.
    """
    if not path.is_file():
        raise SimulationError(f"there is no sound file {path}")
    blocks: list[Samples] = []
    try:
        with soundfile.SoundFile(path) as sound:
            resampler = Resampler(sound.samplerate, rate) if sound.samplerate != rate else None
            for block in sound.blocks(65_536, dtype="float32", always_2d=True):
                mono = np.nan_to_num(block.mean(axis=1, dtype=np.float32)) * np.float32(32768)
                samples = np.clip(np.rint(mono), -32768, 32767).astype(np.int16)
                blocks.append(samples if resampler is None else resampler.push(samples))
            if resampler is not None:
                blocks.append(resampler.flush())
    except (soundfile.SoundFileError, OSError) as error:
        formats = ", ".join(sorted(soundfile.available_formats()))
        raise SimulationError(f"{path} cannot be read as sound ({error}); readable are {formats}") from None
    except CodecError as error:
        raise SimulationError(f"{path} cannot be converted to {rate} Hz: {error}") from None
    if not any(len(block) for block in blocks):
        raise SimulationError(f"{path} holds no audio")
    return np.concatenate(blocks)


def encode_payloads(samples: Samples, codec: CodecSpec) -> list[bytes]:
    """Cut audio into frames of one ptime and encode them in one go, state crossing frames.

    The platform sends whole frames only, so the last one is filled up with silence.
    """
    length = codec.frame_samples
    padded = np.zeros(-(-len(samples) // length) * length, np.int16)
    padded[: len(samples)] = samples
    encoder = codec.encoder()
    return [encoder.encode(padded[start : start + length]) for start in range(0, len(padded), length)]


def call_script(
    writer: wire.PlatformWriter,
    payloads: Sequence[bytes],
    ptime: int,
    *,
    frames: int | None,
    dtmf: str = "",
    skip: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """A call's media and digits in the order of their times, from 0 on.

    Frame k is due at k × ptime, so that delays never add up. Chunks count from 1 and timestamps are milliseconds;
    both, and the sequence number, go on over a skipped frame. The last step marks the end of the last frame.

    Args:
        writer: Writes this stream's messages.
        payloads: Encoded frames; after the last comes the first again.
        ptime: Milliseconds a frame lasts.
        frames: How many, None for no end.
        dtmf: Digits.
        skip: Says for each frame whether it is lost on the way.
    """
    digits = deque((_DTMF_FIRST + _DTMF_EVERY * place, digit) for place, digit in enumerate(dtmf))
    frame = 0
    while frame != frames:
        timestamp = frame * ptime
        while digits and digits[0][0] <= timestamp / 1000:
            at, digit = digits.popleft()
            yield Step(at, writer.dtmf(digit))
        text = writer.media(payloads[frame % len(payloads)], chunk=frame + 1, timestamp_ms=timestamp)
        yield Step(timestamp / 1000, None if skip() else text, media=True)
        frame += 1
    end = frame * ptime / 1000
    for at, digit in digits:
        end = max(end, at)
        yield Step(at, writer.dtmf(digit))
    yield Step(end, None, last=True)


class _Head(msgspec.Struct):
    path: str
    headers: list[tuple[str, str]]


class _HeadLine(msgspec.Struct):
    head: _Head
    t: float


class _MessageLine(msgspec.Struct):
    t: float
    text: str | None = None
    base64: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Capture:
    """One stream as ``--capture`` kept it.

    Attributes:
        path: The upgrade request's path.
        codec: What the start message says; None where there is none that can be read.
        steps: Every message at its time, in seconds since the upgrade.
    """

    path: str
    codec: CodecSpec | None
    steps: tuple[Step, ...]


def read_capture(path: Path) -> Capture:
    """Read a capture: JSON lines, the upgrade's head first, then one message a line.

    ``{"head": {"path": "/", "headers": [["host", "…"], …]}, "t": 0.0}``, then ``{"t": seconds, "text": "…"}``, with
    ``"base64"`` instead of ``"text"`` where the message is not UTF-8. Other keys are skipped. The messages themselves
    may be anything: a capture is for showing what a peer really sent.

    Raises:
        SimulationError: The file cannot be read, or a line is not of this form; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SimulationError(f"the capture {path} cannot be read: {error.strerror}") from None
    if not lines:
        raise SimulationError(f"the capture {path} is empty; its first line should hold the upgrade's head")
    path_asked = ""
    codec = None
    steps: list[Step] = []
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1:
                path_asked = msgspec.json.decode(line, type=_HeadLine).head.path
                continue
            step, message = _read_step(line, steps[-1].at if steps else 0.0)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise SimulationError(f"{path} is not a capture: line {number}: {error}") from None
        steps.append(step)
        if isinstance(message, wire.Start) and codec is None:
            codec = _codec_of(message)
    if not steps:
        raise SimulationError(f"the capture {path} holds no message")
    steps[-1] = steps[-1]._replace(last=True)
    return Capture(path_asked, codec, tuple(steps))


def _read_step(line: bytes, not_before: float) -> tuple[Step, wire.Message | None]:
    entry = msgspec.json.decode(line, type=_MessageLine)
    text = entry.text.encode() if entry.text is not None else entry.base64
    if text is None or None not in (entry.text, entry.base64):
        raise ValueError("expected either `text` or `base64`")
    if not not_before <= entry.t < math.inf:
        raise ValueError(f"`t` is {entry.t:g}, earlier than the line before")
    try:
        message = wire.decode(text)
    except BadMessage:
        message = None
    return Step(entry.t, text, media=isinstance(message, wire.Media)), message


def _codec_of(message: wire.Start) -> CodecSpec | None:
    given = message.start.media_format
    if given is None or given.sample_rate is None:
        return None
    try:
        return CodecSpec.from_media_format(given.encoding, given.sample_rate, given.channels)
    except CodecError:
        return None


class _Cue:
    """A script on the way: its next step, and where it goes."""

    __slots__ = ("begin", "perform", "script", "step")

    def __init__(self, begin: float, script: Iterator[Step], perform: Callable[[Step], bool], first: Step) -> None:
        self.begin = begin
        self.script = script
        self.perform = perform
        self.step = first


class Pacer:
    """Runs the scripts of all calls on absolute deadlines.

    Args:
        clock: Seconds; all times here are on it.
        late: Takes how late each step was.
    """

    EARLY = 0.0005
    """Seconds: uvloop's timers tick in milliseconds, so half of them fire a little early."""

    __slots__ = ("_added", "_clock", "_cues", "_late")

    def __init__(self, clock: Callable[[], float], late: Durations) -> None:
        self._clock = clock
        self._late = late
        self._cues: list[tuple[float, int, _Cue]] = []
        self._added = 0

    def add(self, begin: float, script: Iterator[Step], perform: Callable[[Step], bool]) -> None:
        """Perform a script, its times counted from ``begin``; ``perform`` returns False to end it early."""
        first = next(script, None)
        if first is not None:
            self._added += 1
            heapq.heappush(self._cues, (begin + first.at, self._added, _Cue(begin, script, perform, first)))

    def run_due(self) -> float | None:
        """Perform what is due, at most a round of all scripts; returns the next deadline, None when all are over."""
        cues = self._cues
        for _ in range(len(cues)):
            due, order, cue = cues[0]
            now = self._clock()
            if due > now + self.EARLY:
                break
            self._late.add(max(0.0, now - due))
            following = next(cue.script, None) if cue.perform(cue.step) else None
            if following is None:
                heapq.heappop(cues)
            else:
                cue.step = following
                heapq.heapreplace(cues, (cue.begin + following.at, order, cue))
        return cues[0][0] if cues else None

    def clear(self) -> None:
        """Drop all scripts."""
        self._cues.clear()


# --- One call ---------------------------------------------------------------------------------------------------------


class Call(asyncio.Protocol):
    """One stream's socket: the upgrade, the script's messages out, the endpoint's messages in.

    `websockets` judges the WebSocket side; times are taken where bytes leave and arrive.

    Args:
        uri: The endpoint.
        request: Makes the upgrade request from the WebSocket key.
        match: Pairs frames sent and returned.
        codec: How returned audio is encoded; None where a capture does not tell.
        writer: Writes this stream's messages; None in a replay, whose capture holds them all, echoes of marks included.
        keep: Decode returned audio and keep it.
        pong: Answer pings.

    Attributes:
        far_end: What the platform does with returned audio; None where the codec is not known.
        opened: Ends when the upgrade is done, or with `CallRefused`.
        over: Ends when the script is over.
        settled: Ends when the script is over and as many frames have come back as were sent.
        closed: Ends when the connection has ended after an upgrade.
        opened_at: When the upgrade was done, in seconds of ``time.perf_counter``; 0 before.
        active_at: When a media message last left or arrived, likewise.
        close_code: The endpoint's close code, 1006 where it sent none.
        failure: Why the call failed, None while it has not.
    """

    def __init__(
        self,
        uri: WebSocketURI,
        request: Callable[[str], Request],
        match: EchoMatch,
        *,
        codec: CodecSpec | None,
        writer: wire.PlatformWriter | None,
        keep: bool,
        pong: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.match = match
        self.far_end = FarEnd(codec, keep=keep) if codec is not None else None
        self.opened: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.settled: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.opened_at = 0.0
        self.active_at = 0.0
        self.close_code: int | None = None
        self.failure: str | None = None
        self.skipped = 0
        self.marks = 0
        self.digits = 0
        self.bad_messages = 0
        self._loop = loop
        self._request = request
        self.writer = writer
        self._pong = pong
        self._codec = codec
        self._decoder: Decoder | None = codec.decoder() if codec is not None and keep else None
        self._protocol = ClientProtocol(uri)
        self._transport: asyncio.Transport | None = None
        self._hung_up = False
        self._parts: list[bytes] | None = None
        self._mark_timer: asyncio.TimerHandle | None = None

    # From the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self._transport = transport  # type: ignore[assignment]
        self._protocol.send_request(self._request(self._protocol.key))
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what the endpoint sent."""
        now = time.perf_counter()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event, now)
            elif self._protocol.handshake_exc is None and not self.opened.done():
                self.opened_at = now
                self.opened.set_result(None)
        self._flush()
        if self._protocol.close_rcvd or self._protocol.handshake_exc or self._protocol.parser_exc:
            # Nothing more comes: both closes are exchanged, the upgrade was refused, or the peer broke the protocol.
            self._connected.close()

    def eof_received(self) -> None:
        """Take the endpoint's end of the connection."""
        self._protocol.receive_eof()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell what became of the call."""
        if self._mark_timer is not None:
            self._mark_timer.cancel()
        if not self.opened_at:
            if not self.opened.done():
                self.opened.set_exception(CallRefused(_refusal(self._protocol.handshake_exc or exc)))
            return
        close = self._protocol.close_rcvd
        self.close_code = close.code if close is not None else int(CloseCode.ABNORMAL_CLOSURE)
        if self.failure is None:
            self.failure = self._ending(close.reason if close is not None else "", exc)
        for future in (self.over, self.closed):
            if not future.done():
                future.set_result(None)

    def _ending(self, reason: str, exc: Exception | None) -> str | None:
        """The sentence for an ending that is not the agreed one."""
        why = f" ({printable(reason)})" if reason else ""
        if self._hung_up or self.over.done():
            if self.close_code in (CloseCode.NORMAL_CLOSURE, CloseCode.GOING_AWAY, CloseCode.NO_STATUS_RCVD):
                return None
            if self.close_code == CloseCode.ABNORMAL_CLOSURE:
                return "the endpoint ended the connection without answering the close; its log tells why"
            return f"the endpoint ended the stream with {self.close_code}{why}; its log tells more"
        if self._protocol.parser_exc is not None and self._protocol.close_rcvd is None:
            broken = self._protocol.parser_exc
            if not isinstance(broken, EOFError):
                return f"the endpoint broke the WebSocket protocol: {printable(str(broken))}"
        if self.close_code == CloseCode.ABNORMAL_CLOSURE:
            cause = f" ({exc})" if exc is not None else ""
            return f"the connection was lost in the middle of the call{cause}; is the endpoint still running?"
        return f"the endpoint cut the call off with {self.close_code}{why}; its log tells more"

    # To the endpoint.

    def send(self, text: bytes) -> None:
        """Send one text message; nothing where the stream is closing."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(text)
            self._flush()

    def perform(self, step: Step) -> bool:
        """Do one step of the script; returns False when nothing more can be done."""
        if self._protocol.state is not State.OPEN:
            return False
        if step.text is None:
            self.skipped += step.media
        else:
            if step.media:
                self.active_at = time.perf_counter()
                self.match.send(self.active_at)
            self.send(step.text)
        if step.last:
            self.finish()
        return not step.last

    def finish(self) -> None:
        """The script is over."""
        if not self.over.done():
            self.over.set_result(None)
        self._settle()

    def hang_up(self) -> None:
        """Stop and close, as the platform does."""
        if self._protocol.state is State.OPEN:
            self._hung_up = True
            if self.writer is not None:
                self._protocol.send_text(self.writer.stop())
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            self._flush()

    def abort(self, failure: str | None = None) -> None:
        """End the connection at once."""
        if self.failure is None:
            self.failure = failure
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            # An empty item asks for a half-close, which TLS does not have; the transport is closed instead. The low
            # half of a frame's first byte is its opcode (RFC 6455 §5.2).
            if data and (self._pong or data[0] & 0x0F != Opcode.PONG or not self.opened_at):
                self._connected.write(data)

    @property
    def _connected(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    # From the endpoint.

    def _frame(self, frame: Frame, now: float) -> None:
        """Put messages together: the engine hands over frames, and a message may have many."""
        data = bytes(frame.data)
        if frame.opcode is Opcode.TEXT:
            self._parts = [data]
        elif frame.opcode is Opcode.BINARY:
            self._parts = None
            self.bad_messages += 1
        elif frame.opcode is Opcode.CONT and self._parts is not None:
            self._parts.append(data)
        else:
            return
        if frame.fin and self._parts is not None:
            self._message(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts), now)
            self._parts = None

    def _message(self, text: bytes, now: float) -> None:
        try:
            message = wire.decode_endpoint(text)
        except BadMessage:
            self.bad_messages += 1
            return
        if message.event == "media" and message.media is not None and message.media.payload:
            self._media(message.media.payload, now)
        elif message.event == "mark" and message.mark is not None:
            self._mark(message.mark.name, now)
        elif message.event == "clear":
            if self.far_end is not None:
                self._send_marks(self.far_end.clear(now - self.opened_at))
        elif message.event == "dtmf" and message.dtmf is not None:
            self.digits += 1
        else:
            self.bad_messages += 1

    def _media(self, payload: bytes, now: float) -> None:
        self.active_at = now
        self.match.come_back(now)
        if self.far_end is not None and self._codec is not None:
            samples = self._decoder.decode(payload) if self._decoder is not None else None
            length = self._codec.samples_in(len(payload)) if samples is None else len(samples)
            self.far_end.media(length, now - self.opened_at, samples)
        self._settle()

    def _settle(self) -> None:
        if self.over.done() and not self.match.missing and not self.settled.done():
            self.settled.set_result(None)

    def _mark(self, name: str, now: float) -> None:
        self.marks += 1
        if self.far_end is not None:
            self._send_marks(self.far_end.mark(name, now - self.opened_at))
            if self._mark_timer is None:
                self._await_mark(now)

    def _await_mark(self, now: float) -> None:
        assert self.far_end is not None
        due = self.far_end.next_mark()
        if due is None:
            self._mark_timer = None
        else:
            delay = max(0.0, self.opened_at + due - now)
            self._mark_timer = self._loop.call_later(delay, self._marks_played)

    def _marks_played(self) -> None:
        assert self.far_end is not None
        now = time.perf_counter()
        self._send_marks(self.far_end.played(now - self.opened_at))
        self._await_mark(now)

    def _send_marks(self, names: Sequence[str]) -> None:
        if self.writer is not None:
            for name in names:
                self.send(self.writer.mark(name))


def printable(text: str, limit: int = 300) -> str:
    """A peer's text, safe for a terminal: escaped and cut."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return shown + "…" if len(text) > limit else shown


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
        body = printable(bytes(error.response.body).decode("utf-8", "replace").strip())
        answer = f"HTTP {status} {printable(error.response.reason_phrase)}".rstrip()
        mending = _MENDING.get(status, "no WebSocket endpoint answers there. Check host, port and path of --url")
        return f"refused with {answer}{f': {body}' if body else ''}: {mending}"
    cause = error.__cause__ if error is not None else None
    if error is None or isinstance(error, OSError) or isinstance(cause, EOFError):
        return (
            "the endpoint closed the connection without answering the upgrade. "
            "Does the port speak TLS? Then --url begins with wss://"
        )
    return f"what answers is no WebSocket endpoint: {printable(str(cause or error))}. Check host and port of --url"


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


# --- The whole run ----------------------------------------------------------------------------------------------------


class Simulation:
    """A run of `SimulateOptions`: everything is read and checked when it is made, nothing is connected before `run`.

    Raises:
        SimulationError: An option cannot be used.
        CodecError: The codec cannot.
    """

    def __init__(self, options: SimulateOptions) -> None:
        self.options = options
        self._check()
        self._uri = _parse_url(options.url)
        self._path = self._uri.resource_name
        self._parameters = _parse_parameters(options.param)
        self._capture: Capture | None = None
        self._codec: CodecSpec | None = None
        self._payloads: list[bytes] = []
        self._frames: int | None = None
        if options.replay is not None:
            self._capture = read_capture(options.replay)
            self._codec = self._capture.codec
            self._frames = sum(step.media for step in self._capture.steps)
            if self._path == "/":
                self._path = self._capture.path
        elif options.file is not None:
            self._codec = CodecSpec.parse(options.codec)
            self._payloads = encode_payloads(read_audio(options.file, self._codec.rate), self._codec)
            if options.seconds is not None:
                self._frames = max(1, round(options.seconds * 1000 / self._codec.ptime))
            elif not options.loop:
                self._frames = len(self._payloads)
        if not (self._path.isascii() and self._path.isprintable() and self._path.startswith("/")) or " " in self._path:
            raise SimulationError(f"the path {printable(self._path)!r} cannot stand in an HTTP request")
        self._trust = self._make_trust() if self._uri.secure else None
        self._turnaround = Durations()
        self._late = Durations()
        self._pacer = Pacer(time.perf_counter, self._late)
        self._timer: asyncio.TimerHandle | None = None
        self._calls: list[Call] = []
        self._stopped = False

    def _check(self) -> None:
        options = self.options
        if (options.file is None) == (options.replay is None):
            raise SimulationError("give either a sound FILE to play or a capture by --replay")
        if options.replay is not None:
            fresh = SimulateOptions()
            fields = ("codec", "param", "name", "streams", "loop", "seconds", "dtmf", "lose")
            for field in fields:
                if (getattr(options, field) or None) != (getattr(fresh, field) or None):
                    raise SimulationError(f"--{field} does not go with --replay: the capture holds what is sent")
        if options.streams < 1:
            raise SimulationError(f"--streams is {options.streams}; it has to be 1 or more")
        if options.seconds is not None and not 0 < options.seconds < math.inf:
            raise SimulationError(f"--seconds is {options.seconds:g}; it has to be above 0")
        if not 0 <= options.lose < 1:
            raise SimulationError(f"--lose is {options.lose:g}; it is a share from 0 up to 1, so 0.05 for 5 %")
        if wrong := set(options.dtmf.upper()) - set("0123456789*#ABCD"):
            raise SimulationError(f"--dtmf holds {printable(min(wrong))!r}; digits are 0-9, *, # and A-D")
        if options.token is not None and not (options.token.isascii() and options.token.isprintable()):
            raise SimulationError("--token holds a character that cannot stand in an HTTP header")
        if options.save is not None and not options.save.parent.is_dir():
            raise SimulationError(f"--save: there is no folder {options.save.parent}")

    def _make_trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self.options.cafile is not None:
            try:
                context.load_verify_locations(self.options.cafile)
            except OSError as error:
                # A file that is no PEM is an ssl.SSLError, which is an OSError too.
                raise SimulationError(f"--cafile {self.options.cafile} holds no certificate: {error}") from None
        if self.options.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    @property
    def progress(self) -> tuple[int, int | None]:
        """Frames done, and frames in all: None where there is no end."""
        done = sum(call.match.sent + call.skipped for call in self._calls)
        return done, None if self._frames is None else self._frames * self.options.streams

    def stop(self) -> None:
        """End all calls as if their audio were over."""
        self._stopped = True
        self._pacer.clear()
        for call in self._calls:
            call.finish()

    async def run(self) -> Report:
        """Open all calls, play, hang up, and tell what came of it."""
        self._calls = [self._make_call(index) for index in range(self.options.streams)]
        failures = []
        try:
            gate = asyncio.Semaphore(_OPENING_AT_ONCE)
            try:
                async with asyncio.TaskGroup() as opening:
                    for call in self._calls:
                        opening.create_task(self._open(call, gate))
            except* CallRefused as refused:
                failures = [str(error) for error in refused.exceptions]
                self.stop()
            if not self._stopped:
                self._play()
            async with asyncio.TaskGroup() as attending:
                for call in self._calls:
                    if call.opened_at:
                        attending.create_task(self._attend(call))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for call in self._calls:
                call.abort()
        return self._report(failures)

    def _make_call(self, index: int) -> Call:
        options = self.options
        return Call(
            self._uri,
            self._request,
            EchoMatch(self._turnaround),
            codec=self._codec,
            writer=wire.PlatformWriter(uuid.uuid4().hex) if self._capture is None else None,
            keep=options.save is not None and index == 0,
            pong=not options.no_pong,
        )

    def _request(self, key: str) -> Request:
        """The upgrade with exactly the headers SignalWire sends; its Host is without the port."""
        host = f"[{self._uri.host}]" if ":" in self._uri.host else self._uri.host
        headers = Headers(
            [
                ("Host", host),
                ("Upgrade", "websocket"),
                ("Connection", "Upgrade"),
                ("Sec-WebSocket-Key", key),
                ("Sec-WebSocket-Version", "13"),
            ]
        )
        if self.options.token is not None:
            headers["Authorization"] = f"Bearer {self.options.token}"
        return Request(self._path, headers)

    async def _open(self, call: Call, gate: asyncio.Semaphore) -> None:
        """Connect, upgrade and greet."""
        async with gate:
            try:
                async with asyncio.timeout(OPEN_TIMEOUT):
                    await asyncio.get_running_loop().create_connection(
                        lambda: call, self._uri.host, self._uri.port, ssl=self._trust
                    )
                    await call.opened
            except OSError as error:
                raise CallRefused(_connect_failure(self._uri, error)) from None
        self._greet(call)

    def _greet(self, call: Call) -> None:
        if call.writer is not None and self._codec is not None:
            call.send(call.writer.connected())
            call.send(
                call.writer.start(
                    account_sid=str(uuid.uuid4()),
                    call_sid=str(uuid.uuid4()),
                    encoding=_ENCODINGS[self._codec.name],
                    sample_rate=self._codec.rate,
                    custom_parameters=self._parameters,
                    name=self.options.name,
                )
            )

    def _play(self) -> None:
        """Start all scripts, spread over one ptime."""
        begin = time.perf_counter()
        spread = self._codec.ptime / 1000 / len(self._calls) if self._codec is not None else 0.0
        for index, call in enumerate(self._calls):
            self._pacer.add(begin + index * spread, self._script(index, call), call.perform)
        self._tick()

    def _script(self, index: int, call: Call) -> Iterator[Step]:
        if self._capture is not None:
            return iter(self._capture.steps)
        assert call.writer is not None
        assert self._codec is not None
        options = self.options
        chance = random.Random(f"{options.seed} {index}")
        return call_script(
            call.writer,
            self._payloads,
            self._codec.ptime,
            frames=self._frames,
            dtmf=options.dtmf.upper(),
            skip=lambda: chance.random() < options.lose,
        )

    def _tick(self) -> None:
        due = self._pacer.run_due()
        if due is not None:
            delay = max(0.0, due - time.perf_counter())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    async def _attend(self, call: Call) -> None:
        """See one call through: its script, what still comes back, the end."""
        await asyncio.wait({call.over, call.closed}, return_when=asyncio.FIRST_COMPLETED)
        if self.options.expect_echo or self.options.save is not None:
            while (rest := call.active_at + GRACE - time.perf_counter()) > 0:
                waited = {call.settled, call.closed}
                done, _ = await asyncio.wait(waited, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    break
        call.hang_up()
        await asyncio.wait({call.closed}, timeout=CLOSE_TIMEOUT)
        if not call.closed.done():
            call.abort(f"the endpoint did not answer the close within {CLOSE_TIMEOUT:g} s; its log tells why")
            await call.closed

    def _report(self, failures: list[str]) -> Report:
        calls = self._calls
        far_ends = [call.far_end for call in calls if call.far_end is not None]
        failures += [call.failure for call in calls if call.failure is not None]
        codes = [call.close_code for call in calls if call.close_code is not None]
        report = Report(
            streams=self.options.streams,
            frames_sent=sum(call.match.sent for call in calls),
            frames_received=sum(call.match.returned for call in calls),
            lost=sum(call.match.missing for call in calls) if self.options.expect_echo else 0,
            turnaround_ms=self._turnaround.percentiles(),
            underruns=sum(far_end.underruns for far_end in far_ends),
            close_code=next((code for code in codes if code != CloseCode.NORMAL_CLOSURE), codes[0] if codes else None),
            late_ms=self._late.percentiles(),
            marks=sum(call.marks for call in calls),
            clears=sum(far_end.cleared for far_end in far_ends),
            digits=sum(call.digits for call in calls),
            bad_messages=sum(call.bad_messages for call in calls),
            skipped=sum(call.skipped for call in calls),
            failures=failures,
        )
        if self.options.save is not None:
            self._save(self.options.save, report)
        return report

    def _save(self, path: Path, report: Report) -> None:
        """Write what the first call's participant heard."""
        far_end = self._calls[0].far_end
        if far_end is None or self._codec is None:
            report.failures.append("--save: the capture has no start message that tells the codec, so nothing is saved")
            return
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                soundfile.write(file, far_end.heard(), self._codec.rate, format="WAV", subtype="PCM_16")
        except (OSError, soundfile.SoundFileError) as error:
            report.failures.append(f"--save: {path} cannot be written: {error}")
        else:
            report.saved = path


def _parse_url(url: str) -> WebSocketURI:
    scheme = url.partition("://")[0].lower()
    if scheme not in ("ws", "wss"):
        raise SimulationError(f"--url has to begin with wss:// (or ws:// without TLS), got {printable(url)!r}")
    try:
        uri = parse_uri(url)
    except (InvalidURI, ValueError) as error:
        raise SimulationError(f"--url cannot be used: {printable(str(error))}") from None
    if uri.user_info is not None:
        raise SimulationError("--url holds a user and a password; SignalWire sends a bearer token: use --token")
    return uri


def _parse_parameters(given: Sequence[str]) -> dict[str, str]:
    parameters = {}
    for parameter in given:
        key, equals, value = parameter.partition("=")
        if not (key and equals):
            raise SimulationError(f"--param wants key=value, got {printable(parameter)!r}")
        parameters[key] = value
    return parameters


async def simulate(options: SimulateOptions) -> Report:
    """Run a simulation on the running event loop.

    Refused and broken calls are told in the report, not raised.

    Raises:
        SimulationError: An option cannot be used; nothing was connected.
        CodecError: The codec cannot; likewise.
    """
    return await Simulation(options).run()


def run(options: SimulateOptions, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> int:
    """Run a simulation as a command: progress and failures on stderr, the report on stdout.

    The first interrupt stops the calls politely, a second one at once.

    Returns:
        The exit status: 0 when all went well; 1 when an option cannot be used, a call was refused or cut off, or a
        reply that was expected is missing; 130 when interrupted twice.
    """
    try:
        simulation = Simulation(options)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            report = runner.run(_run_interruptibly(simulation))
    except StreamsinkError as error:
        sys.stderr.write(f"streamsink simulate: {error}\n")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    show(report, as_json=options.json)
    return report.exit_status


def show(report: Report, *, as_json: bool) -> None:
    """Print the failures on stderr, each once, and the report on stdout; no table where there was no call."""
    for failure, count in Counter(report.failures).items():
        sys.stderr.write(f"streamsink simulate: {failure}{f' ({count} streams)' if count > 1 else ''}\n")
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    elif report.close_code is not None:
        sys.stdout.write(report_text(report) + "\n")


async def _run_interruptibly(simulation: Simulation) -> Report:
    loop = asyncio.get_running_loop()

    running = asyncio.current_task()
    assert running is not None
    ways = iter((simulation.stop, running.cancel))

    def interrupt() -> None:
        next(ways, running.cancel)()

    loop.set_exception_handler(_but_failed_handshakes)
    # Only the main thread gets signals, and not every platform's loop.
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, interrupt)
    if not sys.stderr.isatty():
        return await simulation.run()
    showing = asyncio.create_task(_show_progress(simulation))
    try:
        return await simulation.run()
    finally:
        showing.cancel()
        await asyncio.wait({showing})


def _but_failed_handshakes(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # aiofastnet reports them here besides raising them, with a class for an exception, which logging cannot print.
    if not context["message"].startswith("SSL handshake failed"):
        loop.default_exception_handler(context)


async def _show_progress(simulation: Simulation) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} frames"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        playing = bar.add_task("playing", total=simulation.progress[1])
        while True:
            bar.update(playing, completed=simulation.progress[0], refresh=True)
            await asyncio.sleep(0.1)

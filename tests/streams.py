"""A real Stream without a connection, for tests of what is plugged into one."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec
from streamsink.config import SpeechSettings
from streamsink.delivery import Delivery
from streamsink.disk import DiskSpace
from streamsink.playback import Playback
from streamsink.speech.events import Speaker, Transcript
from streamsink.speech.synthesis import Synthesizer, build
from streamsink.stream import Stream
from streamsink.wire import Writer

SECRET = "what-signs-our-webhooks"

STARTED_AT = datetime(2026, 11, 20, 20, 42, 18, 250_000, tzinfo=UTC)


class Line:
    """The session's side of a stream: keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.transcripts: list[Transcript] = []
        self.speakers: list[Speaker] = []

    def send(self, text: bytes) -> None:
        self.sent.append(text)

    def wake(self) -> None:
        pass

    def send_dtmf(self, digit: str) -> None:
        self.sent.append(digit.encode())

    def clear(self) -> None:
        self.sent.append(b"clear")

    def hang_up(self, reason: str) -> None:
        self.sent.append(b"hang up")

    def transcribed(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)

    def speaker_changed(self, event: Speaker) -> None:
        self.speakers.append(event)


def make_stream(
    recordings: Path,
    *,
    sid: str = "7d56",
    name: str | None = "front desk",
    codec: str = "PCMU",
    tracks: tuple[Track, ...] = (Track.INBOUND,),
    custom_parameters: dict[str, Any] | None = None,
    processors: tuple[str, ...] = ("record",),
    line: Line | None = None,
    synthesizer: Synthesizer | None = None,
    disk: DiskSpace | None = None,
    delivery: Delivery | None = None,
    may_speak: bool = False,
) -> Stream:
    line = line or Line()
    spec = CodecSpec.parse(codec)
    return Stream(
        sid=sid,
        call_sid="76ac",
        account_sid="b08d",
        name=name,
        codec=spec,
        tracks=tracks,
        custom_parameters=custom_parameters or {},
        path="/",
        started_at=STARTED_AT,
        recordings=recordings,
        disk=disk or DiskSpace(0),
        delivery=delivery or Delivery(recordings, lambda: SECRET),
        processors=list(processors),
        playback=Playback(spec, Writer(sid), line.send, line.wake, time.monotonic),
        talk_back=True,
        may_speak=may_speak,
        control=line,
        synthesizer=synthesizer or build(SpeechSettings()),
        loop=asyncio.get_running_loop(),
    )


def frame(
    samples: Samples, start: int = 0, *, track: Track = Track.INBOUND, lost: int = 0, sample_rate: int = 8000
) -> Frame:
    return Frame(samples, sample_rate, track, start, lost, 1)


def counting(start: int, n: int) -> Samples:
    """Samples that say where they belong."""
    return np.arange(start, start + n).astype(np.int16)


class Counts:
    """A tally that can be asserted whole."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.dropped: list[tuple[str, int]] = []

    def processor_error(self, name: str) -> None:
        self.errors.append(name)

    def processor_dropped(self, name: str, frames: int) -> None:
        self.dropped.append((name, frames))

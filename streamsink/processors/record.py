"""Record: every stream a file, and beside it a JSON sidecar that tells what it is.

Audio is placed by sample count: where messages were lost or a track started late there is silence, and arrival times
play no part. The live form is a WAV file that outlives a crash; other formats are made of it when it ends.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import structlog
from pydantic import BeforeValidator

from streamsink.audio import Frame, Track
from streamsink.delivery import check_url, parse_target
from streamsink.processor import Processor
from streamsink.processors.formats import FormatName, check_rate, rate_of
from streamsink.processors.layout import PLAYED, SOURCE_OF, LayoutName, choose
from streamsink.processors.recording import Plan, Recording
from streamsink.processors.sidecar import Sidecar
from streamsink.processors.writer import failures, writer
from streamsink.stream import Stream

log = structlog.get_logger(__name__)

MOST_PENDING = 3000
"""Frames of a stream that may wait for a disk which does not keep up."""
START_WAITS = 3.0
"""Seconds ``on_start`` waits for a disk that is slow to make the files; the call goes on, and what is said is kept."""
STOP_WAITS = 8.0
"""Seconds ``on_stop`` waits for a recording that is being encoded; that goes on without it."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")


def duration(text: str | float) -> float:
    """Read a duration such as ``90s``, ``15m``, ``1h`` or ``90``; returns seconds.

    Raises:
        ValueError: It is none, or not above zero.
    """
    if isinstance(text, str):
        read = _DURATION.fullmatch(text.strip())
        if read is None:
            raise ValueError(f"{text!r} is no duration: write 90s, 15m or 1h")
        text = float(read[1]) * _UNITS[read[2]]
    if not text > 0:
        raise ValueError("a duration is more than nothing")
    return float(text)


Duration = Annotated[float, BeforeValidator(duration)]
Digit = Literal["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "*", "#", "A", "B", "C", "D"]


class Record(Processor):
    """Records the stream, with a JSON sidecar.

    Mono where there is one voice. Where there are both tracks, or a processor of the pipeline may speak, stereo: left
    inbound, right outbound and what the far end heard of ours.

    Args:
        format: What the finished file is; while the call lasts it is WAV.
        sample_rate: Hz; the stream's own when not given, 48000 for Opus.
        layout: One channel with everything, two, or a file for each side.
        segment: Begin a new file after so long, such as ``15m``; not one sample is lost or there twice.
        max_duration: End the recording after so long.
        trim: ``silence`` cuts what is below -40 dBFS off the recording's beginning and end, but for 0.1 s.
        pause_digit: A DTMF digit that pauses the recording and resumes it.
        directory: Where the files go; the endpoint's recordings folder when not given.
        upload: Where finished files are copied to: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``file:///folder``.
        keep_local: Whether they also stay here, once what was uploaded has been read back and is the same.
        on_complete: The ``https://`` URL that is told of each recording, once it is there and uploaded.

    Raises:
        ConfigError: Nothing can be uploaded to, or told to, such a URL.
        ValueError: The format cannot have that rate, or a duration is none.
    """

    speaks = False

    def __init__(
        self,
        format: FormatName = "wav",
        sample_rate: int | None = None,
        layout: LayoutName | None = None,
        segment: Duration | None = None,
        max_duration: Duration | None = None,
        trim: Literal["silence"] | None = None,
        pause_digit: Digit | None = None,
        directory: Path | None = None,
        upload: str | None = None,
        keep_local: bool = True,
        on_complete: str | None = None,
    ) -> None:
        if upload is not None:
            parse_target(upload)
        if on_complete is not None:
            check_url(on_complete)
        self._upload = upload
        self._keep_local = keep_local
        self._on_complete = on_complete
        if sample_rate is not None:
            check_rate(format, sample_rate)
        self.sample_rate = sample_rate
        self._format = format
        self._layout = layout
        self._segment = None if segment is None else duration(segment)
        self._max_duration = None if max_duration is None else duration(max_duration)
        self._trim = trim is not None
        self._pause_digit = pause_digit
        self._directory = directory
        # What the writer has not taken yet. Both ends of a deque are safe for a thread each.
        self._pending: deque[Frame] = deque()
        self._heard: deque[Frame] = deque()
        self._stray: set[Track] = set()
        # What was left out of each source since its last frame, the disk being behind; samples.
        self._dropped: dict[int, int] = {}
        self._pauses: list[tuple[int, int | None]] = []
        # Where the newest frame ends, on the stream's clock.
        self._head = 0
        self._paused = False
        self._paused_at = 0.0
        self._clock = time.monotonic

    async def on_start(self, stream: Stream) -> None:
        """Make the files; where the disk does not take them, that is tried again later."""
        self._stream = stream
        self._log = log.bind(stream=stream.sid, call=stream.call_sid)
        layout = choose(self._layout, stream.tracks, stream.may_speak)
        self._sources = layout.places.keys()
        rate = self._rate = self.sample_rate or stream.codec.rate
        plan = Plan(
            folder=self._directory or stream.recordings,
            layout=layout,
            rate=rate,
            segment=None if self._segment is None else max(1, round(self._segment * rate)),
            longest=None if self._max_duration is None else max(1, round(self._max_duration * rate)),
            shared=self._directory is None and len(stream.processors) > 1,
        )
        sidecar = Sidecar(
            stream_sid=stream.sid,
            call_sid=stream.call_sid,
            account_sid=stream.account_sid,
            name=stream.name,
            codec=str(stream.codec),
            sample_rate=rate_of(self._format, self.sample_rate, stream.codec.rate),
            started_at=stream.started_at,
            duration_seconds=0.0,
            custom_parameters=stream.custom_parameters,
            gaps=[],
            sha256=None,
            processors=stream.processors,
            close_code=None,
            close_reason="",
            complete=False,
            format=self._format,
            trim=self._trim,
        )
        self._recording = Recording(plan, sidecar, self._pending, self._heard, self._pauses, self._log)
        self._recording.require_space = stream.disk.require
        if self._upload is not None or self._on_complete is not None:
            self._recording.expect = functools.partial(
                stream.delivery.expect,
                upload=self._upload,
                keep_local=self._keep_local,
                on_complete=self._on_complete,
            )
        stem = None if self._directory else lambda: stream.stem
        starting = writer.run(lambda: self._recording.start(stem))
        try:
            await asyncio.wait({starting}, timeout=START_WAITS)
        except asyncio.CancelledError:
            # Nobody will stop what has not started.
            writer.run(self._recording.give_up)
            raise
        if starting.done():
            starting.result()
        else:
            self._log.warning("the disk is slow: what is said meanwhile waits in memory", seconds=START_WAITS)

    def on_frame(self, frame: Frame) -> None:
        """Leave the frame to the writer."""
        end = frame.start + len(frame.samples)
        if end > self._head:
            self._head = end
        if SOURCE_OF[frame.track] not in self._sources:
            self._is_stray(frame.track)
            return
        self._leave(frame, SOURCE_OF[frame.track], self._pending)

    def on_played(self, frame: Frame) -> None:
        """Leave what the far end heard of ours to the writer."""
        if PLAYED in self._sources:
            self._leave(frame, PLAYED, self._heard)

    def _leave(self, frame: Frame, source: int, queue: deque[Frame]) -> None:
        if self._pauses:
            frame = self._without_pauses(frame)
        if len(queue) >= MOST_PENDING:
            self._drop(frame, source)
            return
        if self._dropped:
            # What was left out is a loss like any other.
            frame = msgspec.structs.replace(frame, lost=frame.lost + self._dropped.pop(source, 0))
        queue.append(frame)

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        """Pause or resume, if this is the digit for it."""
        if digit == self._pause_digit:
            # A digit comes in its place among the audio, however late both are.
            if self._paused:
                self._resume_at(self._head)
            else:
                self.pause()

    def pause(self) -> None:
        """Record silence from now on; what is said meanwhile never reaches the disk. On the event loop."""
        if not self._paused:
            self._paused = True
            self._paused_at = self._clock()
            self._pauses.append((self._head, None))

    def resume(self) -> None:
        """Record again. On the event loop.

        What was said until now may still be on its way, so the pause lasts, on the stream's clock, as long as it did.
        """
        if self._paused:
            lasted = round((self._clock() - self._paused_at) * self._rate)
            self._resume_at(max(self._head, self._pauses[-1][0] + lasted))

    def _resume_at(self, end: int) -> None:
        self._paused = False
        self._pauses[-1] = (self._pauses[-1][0], end)

    def _without_pauses(self, frame: Frame) -> Frame:
        """The frame with silence where it was spoken during a pause, however late it comes."""
        end = frame.start + len(frame.samples)
        samples = None
        for begins, until in reversed(self._pauses):
            if until is not None and until <= frame.start:
                break
            if begins < end:
                samples = frame.samples.copy() if samples is None else samples
                samples[max(0, begins - frame.start) : end if until is None else until - frame.start] = 0
        return frame if samples is None else msgspec.structs.replace(frame, samples=samples)

    def _is_stray(self, track: Track) -> None:
        self._recording.flawed = True
        if track not in self._stray:
            self._stray.add(track)
            self._log.warning("not recorded: a track the start message did not announce", track=track.value)

    def _drop(self, frame: Frame, source: int) -> None:
        if not self._recording.flawed:
            failures.add()
            self._recording.sidecar.error = "the disk did not keep up"
            self._log.error("not recorded: the disk does not keep up", frames=MOST_PENDING)
        self._recording.flawed = True
        self._dropped[source] = self._dropped.get(source, 0) + frame.lost + len(frame.samples)

    async def on_stop(self, reason: str) -> None:
        """Write what is left, then give the files their names; what could not be kept makes the sidecar say so."""
        sidecar = self._recording.sidecar
        # The packet time is known from the first frame on.
        sidecar.codec = str(self._stream.codec)
        sidecar.close_code = self._stream.close_code
        sidecar.close_reason = self._stream.close_reason
        sidecar.members = list(self._stream.members)
        self._recording.flawed = self._recording.flawed or reason == "error"
        # Given up on by who asked, the threads still come to the end of it.
        ending = asyncio.ensure_future(self._end())
        await asyncio.wait({ending}, timeout=STOP_WAITS)
        if ending.done():
            ending.result()

    async def _end(self) -> None:
        await writer.run(self._recording.close)
        for segment in self._recording.finishing:
            await asyncio.wrap_future(segment)

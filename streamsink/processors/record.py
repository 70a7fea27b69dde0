"""Record: every stream a WAV file, and beside it a JSON sidecar that tells what it is.

Audio is placed by sample count: where messages were lost or a track started late there is silence, and arrival times
play no part. One thread writes for all streams of the process.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog

from streamsink.audio import Frame, Samples, Track
from streamsink.processor import Processor
from streamsink.processors.wav import WavPart
from streamsink.stem import reserve
from streamsink.stream import Stream

log = structlog.get_logger(__name__)

FLUSH_INTERVAL = 0.5
"""Seconds between two writes of a stream: a crash loses no more audio than that."""
MOST_PENDING = 3000
"""Frames of a stream that may wait for a disk which does not keep up."""


class Gap(msgspec.Struct):
    """A stretch of silence where messages were lost."""

    track: str
    start_seconds: float
    seconds: float


class Sidecar(msgspec.Struct):
    """What stands in ``<stem>.json``, in this order. While the stream is live: what is known by then."""

    stream_sid: str
    call_sid: str | None
    account_sid: str | None
    name: str | None
    codec: str
    sample_rate: int
    """Hertz, of the file."""
    started_at: datetime
    duration_seconds: float
    custom_parameters: dict[str, Any]
    gaps: list[Gap]
    sha256: str | None
    """Of the audio file, in hex; None where it could not be read back."""
    processors: list[str]
    close_code: int | None
    close_reason: str
    complete: bool
    """Whether the file has everything that arrived on the stream."""


class Record(Processor):
    """Records the stream as WAV, with a JSON sidecar.

    Mono for one track; for both stereo, left inbound, right outbound.

    Args:
        sample_rate: Hz; the stream's own when not given.
        directory: Where the files go; the endpoint's recordings folder when not given.
    """

    speaks = False

    def __init__(self, sample_rate: int | None = None, directory: Path | None = None) -> None:
        self.sample_rate = sample_rate
        self._directory = directory
        # What the writer has not taken yet. Both ends of a deque are safe for a thread each.
        self._pending: deque[Frame] = deque()
        self._stray: set[Track] = set()

    async def on_start(self, stream: Stream) -> None:
        """Make the files.

        Raises:
            OSError: They cannot be made.
        """
        self._stream = stream
        self._log = log.bind(stream=stream.sid, call=stream.call_sid)
        self._tracks = [track for track in Track if track in stream.tracks]
        directory = self._directory or stream.recordings
        stem = None if self._directory else stream.stem
        sidecar = Sidecar(
            stream_sid=stream.sid,
            call_sid=stream.call_sid,
            account_sid=stream.account_sid,
            name=stream.name,
            codec=str(stream.codec),
            sample_rate=self.sample_rate or stream.codec.rate,
            started_at=stream.started_at,
            duration_seconds=0.0,
            custom_parameters=stream.custom_parameters,
            gaps=[],
            sha256=None,
            processors=stream.processors,
            close_code=None,
            close_reason="",
            complete=False,
        )
        self._recording = _Recording(sidecar, directory, self._tracks, self._pending)
        try:
            await asyncio.shield(_writer.run(lambda: self._recording.open(stem)))
        except asyncio.CancelledError:
            # The disk took too long; nobody will stop what has not started.
            _writer.run(self._recording.discard)
            raise

    def on_frame(self, frame: Frame) -> None:
        """Leave the frame to the writer.

        Raises:
            OSError: Earlier ones could not be written.
        """
        if self._recording.error is not None:
            raise self._recording.error
        if len(self._pending) >= MOST_PENDING:
            raise OSError(f"the disk does not keep up: {MOST_PENDING} frames wait to be written")
        if frame.track in self._tracks:
            self._pending.append(frame)
        elif frame.track not in self._stray:
            self._stray.add(frame.track)
            self._log.warning("not recorded: a track the start message did not announce", track=frame.track.value)

    async def on_stop(self, reason: str) -> None:
        """Write what is left, then give the files their names; what could not be kept makes the sidecar say so.

        Raises:
            OSError: Something could not be written.
        """
        sidecar = self._recording.sidecar
        # The packet time is known from the first frame on.
        sidecar.codec = str(self._stream.codec)
        sidecar.close_code = self._stream.close_code
        sidecar.close_reason = self._stream.close_reason
        sidecar.complete = reason != "error" and not self._stray
        # Shielded: a thread that has begun to end a file ends it, whatever becomes of who asked.
        await asyncio.shield(_writer.run(self._recording.close))
        self._log.info(
            "recorded",
            file=self._recording.path.name,
            seconds=round(sidecar.duration_seconds, 3),
            complete=sidecar.complete,
        )
        if self._recording.error is not None:
            raise self._recording.error


class _Recording:
    """The writer's side of a recording: everything here blocks and runs in the writer's thread.

    Attributes:
        sidecar: What is known of the stream so far.
        path: The finished audio file.
        error: Why nothing more is written; the event loop looks at it too.
    """

    def __init__(self, sidecar: Sidecar, directory: Path, tracks: list[Track], pending: deque[Frame]) -> None:
        self.sidecar = sidecar
        self.path = directory
        self.error: Exception | None = None
        self._directory = directory
        self._tracks = tracks
        self._pending = pending
        self._wav: WavPart | None = None
        # Channel, start and length in samples, one after the other: a bad hour has thousands.
        self._gaps = array.array("q")

    def open(self, stem: str | None) -> None:
        """Make the files, under ``stem`` if it is free for audio, else under a new one.

        Raises:
            OSError: They cannot be made.
        """
        try:
            self._open(stem or self._reserve())
        except FileExistsError:
            # Another recording of this stream, at another rate, was first.
            self._open(self._reserve())
        self._write_sidecar(final=False)
        _writer.add(self)

    def _reserve(self) -> str:
        return reserve(self._directory, self.sidecar.started_at, self.sidecar.name or self.sidecar.stream_sid)

    def _open(self, stem: str) -> None:
        self.path = self._directory / f"{stem}.wav"
        self._wav = WavPart(self.path, self.sidecar.sample_rate, len(self._tracks))

    def discard(self) -> None:
        """Undo :meth:`open`."""
        if self._wav is not None:
            with contextlib.suppress(OSError):
                self._wav.discard()
            self._wav = None

    def flush(self) -> bool:
        """Write what is pending; whether there will be more."""
        if self._wav is None or self.error is not None:
            return False
        try:
            self._write_pending(self._wav)
            self._wav.flush()
        except Exception as error:
            # Whatever it is: the thread writes for others too.
            self.error = error
            self._pending.clear()
        return self.error is None

    def _write_pending(self, wav: WavPart) -> None:
        # Frames that follow each other are written as one; tracks take turns, so each has its own run.
        runs: dict[int, list[Samples]] = {}
        ends: dict[int, int] = {}
        starts: dict[int, int] = {}
        while self._pending:
            frame = self._pending.popleft()
            channel = self._tracks.index(frame.track)
            if frame.lost:
                self._gaps.extend((channel, frame.start - frame.lost, frame.lost))
            if ends.get(channel) != frame.start:
                if channel in runs:
                    wav.write(np.concatenate(runs[channel]), starts[channel], channel)
                runs[channel] = []
                starts[channel] = frame.start
            runs[channel].append(frame.samples)
            ends[channel] = frame.start + len(frame.samples)
        for channel, run in runs.items():
            wav.write(np.concatenate(run), starts[channel], channel)

    def close(self) -> None:
        """End the files, as far as the disk allows; what it does not allow is in :attr:`error`."""
        wav, self._wav = self._wav, None
        assert wav is not None
        with self._failing():
            if self.error is None:
                self._write_pending(wav)
        with self._failing():
            wav.flush()
        self.sidecar.duration_seconds = wav.frames / self.sidecar.sample_rate
        with self._failing():
            try:
                for digest in wav.digest():
                    self.sidecar.sha256 = digest
                    # A long file takes seconds to read: the other streams' audio goes on to disk meanwhile.
                    _writer.flush_due()
            finally:
                wav.finish()
        rate = self.sidecar.sample_rate
        gaps = zip(self._gaps[0::3], self._gaps[1::3], self._gaps[2::3], strict=True)
        self.sidecar.gaps = [Gap(self._tracks[channel].value, at / rate, lost / rate) for channel, at, lost in gaps]
        self.sidecar.complete = self.sidecar.complete and self.error is None
        with self._failing():
            self._write_sidecar(final=True).rename(self.path.with_suffix(".json"))
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Note the first thing that went wrong and go on."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def _write_sidecar(self, *, final: bool) -> Path:
        path = self.path.with_suffix(".json.part")
        text = msgspec.json.format(msgspec.json.encode(self.sidecar), indent=2) + b"\n"
        # Over what is there, not truncated first: on a full disk the room it has is all the room there is.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(text)
            file.truncate()
            file.flush()
            if final:
                os.fsync(fd)
        return path


class _Writer:
    """The thread that writes all recordings of the process, each every :data:`FLUSH_INTERVAL`."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # When each is due; in order, since all wait equally long. The thread's own.
        self._live: deque[tuple[float, _Recording]] = deque()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def run(self, job: Callable[[], None]) -> asyncio.Future[None]:
        """Run a job in the thread; for the event loop."""
        with self._starting:
            if self._thread is None:
                # Daemonic: a disk that hangs must not keep the process from ending; .part files are repaired.
                self._thread = threading.Thread(target=self._work, name="streamsink-record", daemon=True)
                self._thread.start()
        future: Future[None] = Future()
        # From here on it cannot be cancelled, only abandoned.
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._jobs.put(run)
        return asyncio.wrap_future(future)

    def add(self, recording: _Recording) -> None:
        """Write this recording from now on, until its ``flush`` says that it is over; for jobs."""
        self._live.append((time.monotonic() + FLUSH_INTERVAL, recording))

    def flush_due(self) -> None:
        """Write what is due; for jobs that take long."""
        now = time.monotonic()
        while self._live and self._live[0][0] <= now:
            _, recording = self._live.popleft()
            if recording.flush():
                self._live.append((now + FLUSH_INTERVAL, recording))

    def _work(self) -> None:
        while True:
            self.flush_due()
            wait = max(0.0, self._live[0][0] - time.monotonic()) if self._live else None
            with contextlib.suppress(queue.Empty):
                self._jobs.get(timeout=wait)()


_writer = _Writer()

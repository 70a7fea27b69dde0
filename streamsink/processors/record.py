"""Record: every stream a WAV file, and beside it a JSON sidecar that tells what it is.

Audio is placed by sample count: where messages were lost or a track started late there is silence, and arrival times
play no part. One thread writes for all streams of the process; a few more finish the files of those that have ended,
which waits for the disk, also when the process exits meanwhile.
"""

from __future__ import annotations

import array
import asyncio
import atexit
import contextlib
import functools
import math
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
from streamsink.delivery import Expected, check_url, parse_target
from streamsink.disk import NoRoom
from streamsink.processor import Processor
from streamsink.processors.wav import WavPart
from streamsink.stem import reserve
from streamsink.stream import Stream

log = structlog.get_logger(__name__)

FLUSH_INTERVAL = 0.5
"""Seconds between two writes of a stream: a crash loses no more audio than that."""
MOST_PENDING = 3000
"""Frames of a stream that may wait for a disk which does not keep up."""
FINISHERS = 8
"""Recordings finished at once: disks take many fsyncs in the time of one."""
STALLED = 10.0
"""Seconds without any progress after which an exiting process takes the disk for hung."""


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
        upload: Where finished files are copied to: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``file:///folder``.
        keep_local: Whether they also stay here, once what was uploaded has been read back and is the same.
        on_complete: The ``https://`` URL that is told of each recording, once it is there and uploaded.

    Raises:
        ConfigError: Nothing can be uploaded to, or told to, such a URL.
    """

    speaks = False

    def __init__(
        self,
        sample_rate: int | None = None,
        directory: Path | None = None,
        upload: str | None = None,
        keep_local: bool = True,
        on_complete: str | None = None,
    ) -> None:
        self.sample_rate = sample_rate
        self._directory = directory
        if upload is not None:
            parse_target(upload)
        if on_complete is not None:
            check_url(on_complete)
        self._upload = upload
        self._keep_local = keep_local
        self._on_complete = on_complete
        # No file was opened, since the disk is nearly full.
        self._refused = False
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
        self._recording = _Recording(sidecar, directory, self._tracks, self._pending, self._log)
        if self._upload is not None or self._on_complete is not None:
            self._recording.expect = functools.partial(
                stream.delivery.expect,
                upload=self._upload,
                keep_local=self._keep_local,
                on_complete=self._on_complete,
            )
        recording = self._recording

        def begin() -> None:
            # Before a stem is reserved: a disk that is nearly full needs no more names either.
            stream.room.require(directory)
            recording.open(None if self._directory else stream.stem)

        try:
            await _writer.run(begin)
        except NoRoom:
            # Told and counted already; the call goes on.
            self._refused = True
        except asyncio.CancelledError:
            # The disk took too long; nobody will stop what has not started.
            _writer.run(self._recording.discard)
            raise

    def on_frame(self, frame: Frame) -> None:
        """Leave the frame to the writer.

        Raises:
            OSError: Earlier ones could not be written.
        """
        if self._refused:
            return
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
        if self._refused:
            return
        sidecar = self._recording.sidecar
        # The packet time is known from the first frame on.
        sidecar.codec = str(self._stream.codec)
        sidecar.close_code = self._stream.close_code
        sidecar.close_reason = self._stream.close_reason
        sidecar.complete = reason != "error" and not self._stray
        # Given up on by who asked, the threads still come to the end of it.
        await _writer.run(self._recording.close)
        if self._recording.error is not None:
            raise self._recording.error


class _Recording:
    """The writer's side of a recording: everything here blocks and runs in the writer's threads.

    Attributes:
        sidecar: What is known of the stream so far.
        path: The finished audio file.
        error: Why nothing more is written; the event loop looks at it too.
        expect: Told of the folder and the stem, where the recording is to be delivered.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        directory: Path,
        tracks: list[Track],
        pending: deque[Frame],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.sidecar = sidecar
        self.path = directory
        self.error: Exception | None = None
        self.expect: Callable[[Path, str], Expected] | None = None
        self._expected: Expected | None = None
        self._directory = directory
        self._tracks = tracks
        self._pending = pending
        self._log = log
        self._wav: WavPart | None = None
        # What holds the stem, where nobody but this recording can build on it.
        self._reservation: Path | None = None
        # Channel, start and length in samples, one after the other: a bad hour has thousands.
        self._gaps = array.array("q")

    def open(self, stem: str | None) -> None:
        """Make the files, under ``stem`` if it is free for audio, else under a new one.

        Raises:
            OSError: They cannot be made; what was made of them is gone again.
        """
        try:
            self._make_wav(stem)
            if self.expect is not None:
                # Before there is anything to lose: what a crash leaves is delivered too, once it is mended.
                self._expected = self.expect(self._directory, self.path.stem)
            self._write_sidecar(final=False)
        except Exception:
            self.discard()
            raise
        _writer.add(self)

    def _make_wav(self, stem: str | None) -> None:
        if stem is not None:
            try:
                self._open(stem, shared=len(self.sidecar.processors) > 1)
            except FileExistsError:
                # Another recording of this stream, at another rate, was first.
                pass
            else:
                return
        name = self.sidecar.name or self.sidecar.stream_sid
        self._open(reserve(self._directory, self.sidecar.started_at, name), shared=False)

    def _open(self, stem: str, *, shared: bool) -> None:
        self.path = self._directory / f"{stem}.wav"
        self._reservation = None if shared else self.path.with_suffix(".json.part")
        self._wav = WavPart(self.path, self.sidecar.sample_rate, len(self._tracks))

    def discard(self) -> None:
        """Undo :meth:`open`; a stem that other processors of the stream share stays reserved."""
        with contextlib.suppress(OSError):
            if self._wav is not None:
                self._wav.discard()
        self._wav = None
        if self._expected is not None:
            self._expected.withdraw()
        with contextlib.suppress(OSError):
            if self._reservation is not None:
                self._reservation.unlink(missing_ok=True)

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

    def close(self) -> Rest:
        """Write what is left; returns what then ends the files. What the disk does not allow is in :attr:`error`."""
        wav, self._wav = self._wav, None
        assert wav is not None
        with self._failing():
            if self.error is None:
                self._write_pending(wav)
        with self._failing():
            wav.flush()
        return functools.partial(self._finish, wav)

    def _finish(self, wav: WavPart) -> None:
        self.sidecar.duration_seconds = wav.frames / self.sidecar.sample_rate
        with self._failing():
            try:
                so_far = None
                for digest in wav.digest():
                    so_far = digest
                    _writer.moved()
                self.sidecar.sha256 = so_far
            finally:
                wav.finish()
        rate = self.sidecar.sample_rate
        gaps = zip(self._gaps[0::3], self._gaps[1::3], self._gaps[2::3], strict=True)
        self.sidecar.gaps = [Gap(self._tracks[channel].value, at / rate, lost / rate) for channel, at, lost in gaps]
        self.sidecar.complete = self.sidecar.complete and self.error is None
        with self._failing():
            self._write_sidecar(final=True).rename(self.path.with_suffix(".json"))
            _folder(self._directory).sync()
            if self._expected is not None:
                self._expected.arrived()
        self._log.info(
            "recorded",
            file=self.path.name,
            seconds=round(self.sidecar.duration_seconds, 3),
            complete=self.sidecar.complete,
        )

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


class _Folder:
    """A folder that many recordings bring to the disk together.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        # When the last fsync that succeeded began.
        self._synced = -math.inf

    def sync(self) -> None:
        """Put every name given so far on the disk for good.

        Raises:
            OSError: The disk is broken.
        """
        asked = time.monotonic()
        with self._turn:
            if self._synced > asked:
                # One that began while we waited took ours along.
                return
            began = time.monotonic()
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            self._synced = began


_folder = functools.lru_cache(maxsize=64)(_Folder)


Rest = Callable[[], None]
Job = Callable[[], Rest | None]


class _Writer:
    """The thread that writes all recordings of the process, each every :data:`FLUSH_INTERVAL`, and those that finish.

    A job runs in the writing thread; what it returns is its rest, which takes long and runs in a finishing thread.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Future[None]]] = queue.SimpleQueue()
        self._rests: queue.SimpleQueue[tuple[Rest, Future[None]]] = queue.SimpleQueue()
        # When each is due; in order, since all wait equally long. The writing thread's own.
        self._live: deque[tuple[float, _Recording]] = deque()
        self._started = False
        self._starting = threading.Lock()
        # Jobs that are not over, rest and all.
        self._owed = 0
        self._moved = threading.Condition()

    def run(self, job: Job) -> asyncio.Future[None]:
        """Run a job, rest and all; for the event loop. It runs to its end, also when what this returns is cancelled."""
        with self._starting:
            if not self._started:
                self._start()
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._moved:
            self._owed += 1
        self._jobs.put((job, future))
        return asyncio.wrap_future(future)

    def _start(self) -> None:
        # All now: while the process exits none can be started. Daemonic: a disk that hangs must not keep it for ever.
        threading.Thread(target=self._write, name="streamsink-record", daemon=True).start()
        for number in range(FINISHERS):
            threading.Thread(target=self._finish, name=f"streamsink-record-{number}", daemon=True).start()
        atexit.register(self._wait)
        self._started = True

    def add(self, recording: _Recording) -> None:
        """Write this recording from now on, until its ``flush`` says that it is over; for jobs."""
        self._live.append((time.monotonic() + FLUSH_INTERVAL, recording))

    def moved(self) -> None:
        """Tell who waits that the disk does something; for jobs and rests."""
        with self._moved:
            self._moved.notify_all()

    def _write(self) -> None:
        while True:
            now = time.monotonic()
            while self._live and self._live[0][0] <= now:
                _, recording = self._live.popleft()
                if recording.flush():
                    self._live.append((now + FLUSH_INTERVAL, recording))
            wait = max(0.0, self._live[0][0] - time.monotonic()) if self._live else None
            with contextlib.suppress(queue.Empty):
                self._run(*self._jobs.get(timeout=wait))

    def _finish(self) -> None:
        while True:
            self._run(*self._rests.get())

    def _run(self, job: Job, future: Future[None]) -> None:
        try:
            rest = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            if rest is not None:
                self._rests.put((rest, future))
                return
            future.set_result(None)
        with self._moved:
            self._owed -= 1
            self._moved.notify_all()

    def _wait(self) -> None:
        """Let what is owed come to its end before the process does, for as long as the disk does something."""
        with self._moved:
            while self._owed:
                if not self._moved.wait(STALLED):
                    log.error("recordings keep .part: the disk hangs", recordings=self._owed)
                    return


_writer = _Writer()

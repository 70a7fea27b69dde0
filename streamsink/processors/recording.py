"""The writer's side of one stream's recording: what is pending goes to the segment it belongs to.

A recording is one segment, unless it is to be cut, or a disk that was full has room again: then the next begins under a
stem of its own, ``<stem>~002``. Everything is placed by its position on the stream's clock, arrival plays no part.
"""

from __future__ import annotations

import array
import contextlib
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import structlog

from streamsink.audio import Frame, Samples
from streamsink.disk import DiskFull
from streamsink.processors import sidecar as sidecars
from streamsink.processors.files import create
from streamsink.processors.layout import PLAYED, SOURCE_OF, SOURCES, Layout
from streamsink.processors.segment import Expected, Segment, describe
from streamsink.processors.sidecar import AudioFile, Gap, Pause, Sidecar
from streamsink.processors.wav import WavPart, most_frames
from streamsink.processors.writer import Job, failures, writer
from streamsink.stem import reserve

SYNC_INTERVAL = 8.0
"""Seconds after which what was written is asked to outlive a power cut."""
RETRY = 5.0
"""Seconds between attempts to go on after the disk took no more."""
MANY_GAPS = 300
"""Numbers in `_gaps` beyond which telling of each at once would take too long."""
GRACE = 10.0
"""Seconds of audio by which one voice may come later than another and still find its segment open."""
MOST_OPEN = 64
"""Segments of a stream that wait for late audio, while one long gap runs through many."""
_FOR_EVER = sys.maxsize


class Plan(NamedTuple):
    """What to make of a stream.

    Attributes:
        folder: Where.
        layout: Which voice goes where.
        rate: Hz, of the live files.
        segment: Samples after which a new file begins; None for never.
        longest: Samples after which the recording ends; None for never.
        shared: Whether others write files under the stream's stem.
    """

    folder: Path
    layout: Layout
    rate: int
    segment: int | None = None
    longest: int | None = None
    shared: bool = False


class Recording:
    """Everything here blocks, and runs in the writing thread unless it says otherwise.

    Args:
        plan: What to make.
        sidecar: What is known of the stream; the event loop completes it before :meth:`close`.
        pending: Frames as they came. Both ends of a deque are safe for a thread each.
        heard: What the far end heard of ours, likewise.
        pauses: Beginning and end of each pause on the stream's clock, samples; end None while it lasts.
        log: Bound to the stream.

    Attributes:
        require_space: Asked for space before a file is made; raises OSError where there is none.
        expect: Told of the folder and stem of each segment that will come.
        finishing: Segments that ended before the recording does.
        flawed: Set by whoever knows of audio that did not get here.
    """

    def __init__(
        self,
        plan: Plan,
        sidecar: Sidecar,
        pending: deque[Frame],
        heard: deque[Frame],
        pauses: list[tuple[int, int | None]],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.sidecar = sidecar
        self.flawed = False
        self.finishing: list[Future[None]] = []
        self.require_space: Callable[[Path], None] | None = None
        self.expect: Callable[[Path, str], Expected] | None = None
        self._plan = plan
        self._pending = pending
        self._heard = heard
        self._pauses = pauses
        self._log = log
        self._places = plan.layout.places
        self._open: list[Segment] = []
        self._stem: Callable[[], str] | None = None
        # The stem, once it is ours.
        self._reserved: str | None = None
        self._number = 0
        # Where the newest audio ends, and where the last file did that ended early.
        self._head = 0
        self._broke_at: int | None = None
        # Where the next file begins, when the last one ended as meant.
        self._next_start: int | None = None
        self._retry_at: float | None = None
        self._told = False
        self._late = False
        # How much of pauses and gaps the live sidecars tell of, and when they were told.
        self._known = (0, 0)
        self._told_at = -math.inf
        # Calls that begin together must not keep the disk busy together.
        self._synced_at = time.monotonic() - random.uniform(0, SYNC_INTERVAL)
        self._syncing = False
        self._closed = False
        # Source, start and length in samples, one after the other: a bad hour has thousands.
        self._gaps = array.array("q")

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def start(self, stem: Callable[[], str] | None) -> None:
        """Make the first files, under ``stem()`` if it is free for audio, else, and without one, under a new one."""
        self._stem = stem
        self._next(0)
        writer.add(self)

    def give_up(self) -> None:
        """Undo :meth:`start`; a stem that other processors of the stream share stays reserved."""
        self._closed = True
        for segment in self._open:
            segment.discard(stem_too=False)
        self._open = []
        self._number = 0
        self._let_go()

    def _let_go(self) -> None:
        """Give the stem back, where nothing came of it and nobody else builds on it."""
        if not self._number and self._reserved is not None and not self._plan.shared:
            with contextlib.suppress(OSError):
                (self._plan.folder / f"{self._reserved}.json.part").unlink(missing_ok=True)

    def flush(self) -> bool:
        """Write what is pending; whether there will be more."""
        if self._closed:
            return False
        self._take()
        self._end_passed()
        self._keep_told()
        now = time.monotonic()
        if self._open and not self._syncing and now - self._synced_at >= SYNC_INTERVAL:
            self._syncing = True
            self._synced_at = now
            writer.sync(self._sync)
        return True

    def close(self) -> Job | None:
        """Write what is left; returns what then ends the files."""
        if self._closed:
            return None
        self._closed = True
        self._take()
        self._end_passed()
        self._let_go()
        ending, self._open = self._open, []
        if not ending:
            return None
        for segment in ending[:-1]:
            self._fill(segment)
        # The newest one has the recording's end.
        ending[-1].end = None
        for segment in ending:
            self._prepare(segment)
        for segment in ending[:-1]:
            self._finish(segment)
        return ending[-1].finish

    def _finish(self, segment: Segment) -> None:
        self.finishing = [future for future in self.finishing if not future.done()]
        self.finishing.append(writer.finish(segment.finish))

    def _keep_told(self) -> None:
        """Keep the live sidecars at what is known: a pause at once, losses as often as there is time to."""
        pauses = 2 * len(self._pauses) - (bool(self._pauses) and self._pauses[-1][1] is None)
        known, now = (pauses, len(self._gaps)), time.monotonic()
        many = known[0] == self._known[0] and known[1] > MANY_GAPS
        if known != self._known and now - self._told_at >= (SYNC_INTERVAL if many else 0):
            self._known, self._told_at = known, now
            for segment in self._open:
                self._tell(segment)
                segment.stale = True
        for segment in self._open:
            # What a disk does not take of it is no reason to end the audio.
            with contextlib.suppress(OSError):
                segment.tell()

    def _sync(self) -> None:
        """In a thread that waits for the disk."""
        try:
            for segment in list(self._open):
                segment.sync()
        finally:
            self._syncing = False

    # --- Writing -----------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        try:
            for segment in self._open:
                if segment.lost is not None:
                    raise segment.lost
            for source, start, samples in self._runs():
                self._place(source, start, samples)
            for segment in self._open:
                for wav in segment.wavs:
                    wav.flush()
        except Exception as error:
            # Whatever it is: the thread writes for others too.
            self._fail(error)
            self._skip()

    def _skip(self) -> None:
        """While the disk takes nothing, what comes is lost."""
        for _source, start, samples in self._runs():
            self._head = max(self._head, start + len(samples))

    def _runs(self) -> Iterator[tuple[int, int, Samples]]:
        """What is pending, with what follows each other as one; tracks take turns, so each has its own run."""
        runs: dict[int, list[Samples]] = {}
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for queue, heard in ((self._pending, False), (self._heard, True)):
            while queue:
                frame = queue.popleft()
                source = PLAYED if heard else SOURCE_OF[frame.track]
                if frame.lost:
                    self._gaps.extend((source, frame.start - frame.lost, frame.lost))
                if ends.get(source) != frame.start:
                    if source in runs:
                        yield source, starts[source], np.concatenate(runs[source])
                    runs[source] = []
                    starts[source] = frame.start
                runs[source].append(frame.samples)
                ends[source] = frame.start + len(frame.samples)
        for source, run in runs.items():
            yield source, starts[source], np.concatenate(run)

    def _place(self, source: int, start: int, samples: Samples) -> None:
        file, channel = self._places[source]
        end, longest = start + len(samples), self._plan.longest
        if longest is not None and end > longest:
            samples = samples[: max(0, longest - start)]
            if start >= longest:
                # Up to there all is silence, which has its files too.
                self._segment_at(longest - 1)
        while len(samples):
            segment = self._segment_at(start)
            if segment is None and start >= self._border:
                # There was no room for its file.
                upto = len(samples)
            elif segment is None:
                # It came after its segment was closed, or belongs where there was no room for one.
                ahead = next((segment.start for segment in self._open if segment.start > start), None)
                upto = len(samples) if ahead is None else min(len(samples), ahead - start)
                if not self._open or start < self._open[0].start:
                    self._too_late()
            else:
                upto = len(samples) if segment.end is None else min(len(samples), segment.end - start)
                segment.wavs[file].write(samples[:upto], start - segment.start, channel)
            start += upto
            samples = samples[upto:]
            self._head = max(self._head, start)
        self._head = max(self._head, end)

    @property
    def _border(self) -> int:
        """Where the segments that are or were end."""
        if self._open:
            return self._open[-1].end or _FOR_EVER
        return max(self._next_start or 0, self._broke_at or 0)

    def _segment_at(self, position: int) -> Segment | None:
        """The open segment a position falls into, made if it is ahead; None where it is closed or cannot be made."""
        for segment in self._open:
            if segment.end is None or position < segment.end:
                return segment if position >= segment.start else None
        while position >= self._border:
            # Silence has its files too. Behind a segment that broke, or has no successor yet, comes whatever there is.
            made = self._next(position if self._broke_at is not None else self._border)
            if made is None or made.end is None or position < made.end:
                return made
            if len(self._open) > MOST_OPEN:
                self._end_passed(made.end)
        return None

    def _next(self, start: int) -> Segment | None:
        """Make the next segment; where that fails, what is open goes on, and it is tried again later."""
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return None
        before = self._open[-1] if self._open else None
        try:
            segment = self._open_at(start)
        except Exception as error:
            self._complain(error)
            if self._broke_at is None:
                self._broke_at = start
            return None
        if before is not None:
            before.sidecar.continues = before.stale = True
            with contextlib.suppress(OSError):
                before.tell()
        return segment

    def _too_late(self) -> None:
        self.flawed = True
        if not self._late:
            self._late = True
            self._log.warning("not recorded: audio that came long after its time", seconds=GRACE)

    # --- Segments ----------------------------------------------------------------------------------------------------

    def _open_at(self, start: int) -> Segment:
        """Make the files that begin at a position.

        Raises:
            OSError: They cannot be made; what was made of them is gone again.
        """
        plan = self._plan
        if self.require_space is not None:
            self.require_space(plan.folder)
        length = min(plan.segment or _FOR_EVER, most_frames(max(len(channels) for _, channels in plan.layout.files)))
        end = (start // length + 1) * length
        if plan.longest is not None:
            end = min(end, plan.longest)
        segment = self._made(start, end)
        self._number += 1
        segment.log = self._log
        self._open.append(segment)
        if self._retry_at is not None:
            self._retry_at = None
            if self._told:
                self._told = False
                self._log.info("recording goes on", file=segment.stem)
        self._broke_at = None
        return segment

    def _made(self, start: int, end: int | None) -> Segment:
        if self._number:
            return self._make(self._next_stem(), start, end, stem_too=True)
        if self._reserved is None and self._stem is not None:
            self._reserved = self._stem()
        if self._reserved is not None:
            try:
                return self._make(self._reserved, start, end)
            except FileExistsError:
                # Another recording of this stream, at another rate, was first.
                self._reserved = None
        self._stem = None
        self._plan = self._plan._replace(shared=False)
        self._reserved = reserve(
            self._plan.folder, self.sidecar.started_at, self.sidecar.name or self.sidecar.stream_sid
        )
        return self._make(self._reserved, start, end)

    def _next_stem(self) -> str:
        for number in range(self._number + 1, self._number + 1000):
            stem = f"{self._reserved}~{number:03}"
            if (self._plan.folder / f"{stem}.json").exists():
                continue
            with contextlib.suppress(FileExistsError), open(create(self._plan.folder / f"{stem}.json.part")):
                return stem
        raise FileExistsError(f"{self._reserved}~ … are all taken")

    def _make(self, stem: str, start: int, end: int | None, *, stem_too: bool = False) -> Segment:
        folder, rate = self._plan.folder, self._plan.rate
        sidecar = msgspec.structs.replace(
            self.sidecar,
            files=[AudioFile(f"{stem}.{ending}wav", channels) for ending, channels in self._plan.layout.files],
            segment=self._number + 1,
            start_seconds=start / rate,
            missing_seconds=0.0 if self._broke_at is None else max(0, start - self._broke_at) / rate,
        )
        segment = Segment(folder, stem, sidecar, [], start, end)
        try:
            for file in sidecar.files:
                segment.wavs.append(WavPart(folder / file.name, rate, len(file.channels)))
            if self.expect is not None:
                # Before there is anything to lose: what a crash leaves is expected too, once it is mended.
                segment.expected = self.expect(folder, stem)
            sidecars.write(segment.part, sidecar)
            segment.stale = False
        except Exception:
            segment.discard(stem_too=stem_too)
            raise
        return segment

    def _end_passed(self, head: int | None = None) -> None:
        """Close the segments whose time is over for every voice."""
        head = self._head if head is None else max(head, self._head)
        grace = 0 if len(self._places) == 1 else round(GRACE * self._plan.rate)
        while self._open:
            segment = self._open[0]
            if segment.end is None or head < segment.end + grace:
                return
            self._open.pop(0)
            self._next_start = segment.end
            self._fill(segment)
            if segment.end == self._plan.longest:
                # The recording's end: what is trimmed at one is trimmed here.
                segment.end = None
            self._prepare(segment)
            self._finish(segment)

    def _fill(self, segment: Segment) -> None:
        """The stream went on behind it, so what it lacks is silence."""
        assert segment.end is not None
        with contextlib.suppress(OSError):
            for wav in segment.wavs:
                wav.extend(segment.end - segment.start)

    def _complain(self, error: Exception) -> None:
        """Tell, once, that the disk takes nothing; it is asked again later."""
        # A disk that is nearly full was told and counted already.
        failed = not isinstance(error, DiskFull)
        if failed:
            failures.add()
        if failed and not self._told:
            self._told = True
            self._log.error(
                "recording stopped: it goes on when the disk takes it", cause=str(error), kind=type(error).__name__
            )
        self._retry_at = time.monotonic() + RETRY

    def _fail(self, error: Exception) -> None:
        """End the files that are open at their last good sample; try again later."""
        self._complain(error)
        broken, self._open = self._open, []
        self._next_start = None
        self._broke_at = broken[-1].start + broken[-1].frames if broken else self._head
        for segment in broken:
            self._prepare(segment)
            segment.sidecar.complete = False
            segment.sidecar.error = describe(error)
            self._finish(segment)

    def _tell(self, segment: Segment) -> None:
        """Bring a segment's sidecar up to what is known."""
        rate, start = self._plan.rate, segment.start
        end = start + segment.frames
        sidecar = segment.sidecar
        sidecar.codec = self.sidecar.codec
        triples = zip(self._gaps[0::3], self._gaps[1::3], self._gaps[2::3], strict=True)
        sidecar.gaps = [
            Gap(SOURCES[source], (max(at, start) - start) / rate, (min(at + lost, end) - max(at, start)) / rate)
            for source, at, lost in triples
            if at < end and at + lost > start
        ]
        sidecar.pauses = [
            Pause((max(at, start) - start) / rate, (min(until, end) - max(at, start)) / rate)
            for at, until in ((at, _FOR_EVER if until is None else until) for at, until in list(self._pauses))
            if at < end and until > start and until > at
        ]

    def _prepare(self, segment: Segment) -> None:
        """Tell the sidecar how the recording went, before it is finished."""
        self._tell(segment)
        sidecar = segment.sidecar
        sidecar.close_code, sidecar.close_reason = self.sidecar.close_code, self.sidecar.close_reason
        sidecar.members = self.sidecar.members
        sidecar.error = sidecar.error or self.sidecar.error
        sidecar.continues = segment.end is not None
        sidecar.complete = not self.flawed and not sidecar.missing_seconds
        # What lies before the segments that are still open is told.
        if not self._closed and self._open:
            first = self._open[0].start
            kept = array.array("q")
            for index in range(0, len(self._gaps), 3):
                if self._gaps[index + 1] + self._gaps[index + 2] > first:
                    kept.extend(self._gaps[index : index + 3])
            self._gaps = kept

"""One recording's files on disk, from the first sample to their names: made by a live stream, ended by it or by repair.

    live        <stem>.wav.part (locked), <stem>.json.part
    settled     the same, on the disk for good; the sidecar says whether everything is in
    encoded     <stem>.flac.part, read back and compared
    named       <stem>.flac, then <stem>.json; the live WAV goes last, so that until then nobody else takes hold

Whatever of this a crash interrupts can be done again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from streamsink.processors import encoder
from streamsink.processors import sidecar as sidecars
from streamsink.processors.files import give_name, sync_folder
from streamsink.processors.formats import Order, Source
from streamsink.processors.sidecar import Gap, Pause, Sidecar, Trimmed
from streamsink.processors.wav import WavPart
from streamsink.processors.writer import Job, failures, writer

log = structlog.get_logger(__name__)


class Expected(Protocol):
    """Who waits for a recording."""

    def arrived(self) -> None:
        """Its files have their names."""

    def withdraw(self) -> None:
        """It will never come."""


class Segment:
    """A set of audio files that share a sidecar. Blocking; for one thread at a time but for :meth:`sync`.

    Args:
        folder: Where.
        stem: What all of them are called, reserved.
        sidecar: What is known so far; this segment's own.
        wavs: The live files, in the order of ``sidecar.files``.
        start: Where on the stream's clock it begins, in samples of the live files.
        end: Where it is to end, likewise; None when the stream's end does that.

    Attributes:
        expected: Told when the files have their names.
        stale: Whether the live sidecar on the disk does not say what is known.
        lost: What the disk said when it was to keep for good what had been written.
    """

    __slots__ = (
        "_lock",
        "_unsynced",
        "end",
        "expected",
        "folder",
        "log",
        "lost",
        "sidecar",
        "stale",
        "start",
        "stem",
        "wavs",
    )

    def __init__(
        self, folder: Path, stem: str, sidecar: Sidecar, wavs: Sequence[WavPart], start: int, end: int | None
    ) -> None:
        self.folder = folder
        self.stem = stem
        self.sidecar = sidecar
        self.wavs = list(wavs)
        self.start = start
        self.end = end
        self.expected: Expected | None = None
        self.stale = True
        self.lost: OSError | None = None
        # Whether what the live sidecar on the disk says is not there for good.
        self._unsynced = True
        self.log = log
        self._lock = threading.Lock()

    @property
    def part(self) -> Path:
        """The live sidecar."""
        return self.folder / f"{self.stem}.json.part"

    @property
    def frames(self) -> int:
        """Samples to the end of the longest file."""
        return max((wav.frames for wav in self.wavs), default=0)

    @property
    def rate(self) -> int:
        """Hz, of the live files."""
        return self.wavs[0].sample_rate

    def tell(self) -> None:
        """Bring the live sidecar up to what is known; not now, if the disk is just being waited for.

        Raises:
            OSError: The disk is full or broken.
        """
        if self.stale and self._lock.acquire(blocking=False):
            try:
                if self.wavs:
                    sidecars.write(self.part, self.sidecar)
                    self.stale, self._unsynced = False, True
            finally:
                self._lock.release()

    def sync(self) -> None:
        """Let what was written so far outlive a power cut; in another thread than the one that writes."""
        with self._lock:
            if not self.wavs:
                return
            with contextlib.suppress(OSError):
                # It is written again at the end; the audio is not.
                if self.stale or self._unsynced:
                    sidecars.write(self.part, self.sidecar, sync=True)
                    self.stale = self._unsynced = False
            try:
                for wav in self.wavs:
                    wav.sync()
            except OSError as error:
                # Told once: asked again, the kernel takes what it has lost for written.
                self.lost = self.lost or error

    def discard(self, *, stem_too: bool) -> None:
        """Delete everything, the stem's reservation too if nobody else builds on it."""
        with self._lock:
            for wav in self.wavs:
                with contextlib.suppress(OSError):
                    wav.discard()
            self.wavs = []
        if stem_too:
            with contextlib.suppress(OSError):
                self.part.unlink(missing_ok=True)
        if self.expected is not None:
            self.expected.withdraw()

    def finish(self) -> Job | None:
        """Put everything on the disk for good and give it its names; what has to be encoded for that is returned."""
        with self._lock:
            self._settle()
            if (self.sidecar.format != "wav" or self.sidecar.trim) and self.frames:
                return functools.partial(self._with_lock, self._make)
            self._name_wavs()
            return None

    def _with_lock(self, step: Callable[[], None]) -> None:
        with self._lock:
            step()

    def _settle(self) -> None:
        if self.lost is not None and self.sidecar.error is None:
            self._note(self.lost)
        with self._failing():
            frames = self.frames
            for wav in self.wavs:
                # Tracks of one call are equally long.
                wav.extend(frames)
                wav.flush()
                wav.sync(final=True)
        self.sidecar.duration_seconds = self.frames / self.rate
        with self._failing():
            sidecars.write(self.part, self.sidecar, final=True)

    def _make(self) -> None:
        """Encode, then name; where that cannot be done the WAV is kept as it is."""
        settled = msgspec.structs.replace(self.sidecar)
        files = self.sidecar.files
        ending = self.sidecar.format if self.sidecar.format != "wav" else "trim"
        parts = [os.path.abspath(_renamed(wav.path, f"{ending}.part")) for wav in self.wavs]
        try:
            made = encoder.make(self._order(parts), writer.moved)
            for wav, file, sha256 in zip(self.wavs, files, made.sha256, strict=True):
                file.name, file.sha256 = _renamed(wav.path, self.sidecar.format).name, sha256
            self._cut(made.span)
            self.sidecar.sha256 = files[0].sha256
            sidecars.write(self.part, self.sidecar, final=True)
        except Exception as error:
            with contextlib.suppress(OSError):
                encoder.discard(parts)
            self.sidecar = settled
            self._note(error)
            self._name_wavs()
            return
        with self._failing():
            for part, file in zip(parts, files, strict=True):
                give_name(Path(part), self.folder / file.name)
            self._name_sidecar()
            for wav in self.wavs:
                wav.part.unlink(missing_ok=True)
        self._over()

    def _order(self, parts: list[str]) -> Order:
        return Order(
            sources=[Source(os.path.abspath(wav.part), wav.sample_rate, wav.channels, wav.frames) for wav in self.wavs],
            parts=parts,
            format=self.sidecar.format,
            sample_rate=self.sidecar.sample_rate,
            trim=(self.sidecar.segment == 1, not self.sidecar.continues) if self.sidecar.trim else None,
        )

    def _cut(self, span: tuple[int, int]) -> None:
        if not self.sidecar.trim:
            return
        first, last = span[0] / self.rate, span[1] / self.rate
        whole = self.frames / self.rate
        self.sidecar.trimmed = Trimmed(first, whole - last)
        self.sidecar.duration_seconds = last - first
        self.sidecar.gaps = [
            Gap(gap.track, *cut)
            for gap in self.sidecar.gaps
            if (cut := _clip(gap.start_seconds, gap.seconds, first, last))
        ]
        self.sidecar.pauses = [
            Pause(*cut) for p in self.sidecar.pauses if (cut := _clip(p.start_seconds, p.seconds, first, last))
        ]

    def _name_wavs(self) -> None:
        """The live files are the finished ones."""
        self.sidecar.format = "wav"
        self.sidecar.sample_rate = self.rate
        for wav, file in zip(self.wavs, self.sidecar.files, strict=True):
            file.name = wav.path.name
            with self._failing():
                file.sha256 = _last(wav.digest())
        self.sidecar.sha256 = self.sidecar.files[0].sha256
        with self._failing():
            sidecars.write(self.part, self.sidecar, final=True)
        with self._failing():
            for wav in self.wavs:
                give_name(wav.part, wav.path)
            self._name_sidecar()
        self._over()

    def _name_sidecar(self) -> None:
        give_name(self.part, self.folder / f"{self.stem}.json")
        sync_folder(self.folder)

    def _over(self) -> None:
        for wav in self.wavs:
            wav.close()
        self.wavs = []
        if not (self.folder / f"{self.stem}.json").exists():
            return
        self.log.info(
            "recorded",
            file=self.sidecar.files[0].name,
            seconds=round(self.sidecar.duration_seconds, 3),
            complete=self.sidecar.complete,
        )
        if self.expected is not None:
            self.expected.arrived()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Note what went wrong and go on."""
        try:
            yield
        except Exception as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        failures.add()
        self.log.error("recording not as it should be", file=self.stem, cause=str(error), kind=type(error).__name__)
        self.sidecar.complete = False
        self.sidecar.error = self.sidecar.error or describe(error)


def describe(error: Exception) -> str:
    """Say what went wrong without naming folders."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".replace(os.getcwd(), ".")


def _renamed(wav: Path, ending: str) -> Path:
    return wav.with_name(f"{wav.name.removesuffix('wav')}{ending}")


def _last(digests: Iterator[str]) -> str | None:
    so_far = None
    for digest_so_far in digests:
        so_far = digest_so_far
        writer.moved()
    return so_far


def _clip(start: float, length: float, first: float, last: float) -> tuple[float, float] | None:
    """What of a stretch is left between first and last, from first on; None when nothing is."""
    begins, ends = max(start, first), min(start + length, last)
    return (begins - first, ends - begins) if ends > begins else None

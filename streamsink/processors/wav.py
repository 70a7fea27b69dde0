"""A WAV file that is written while the call lasts, at any place in any order, and is playable at every moment.

Not soundfile: its writer brings the header up to date only on close, so that a crash leaves a file which says it is
empty, and its flush is an fsync. Positioned writes also make silence free (a hole in the file reads as zeros) and
interleave two tracks in the file itself, however far one runs ahead of the other.

Source: Multimedia Programming Interface and Data Specifications 1.0 (RIFF, ``fmt `` and ``data`` chunks).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from streamsink.audio import Samples

_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_LONGEST = 2**32 - _HEADER.size
"""Bytes of audio; RIFF counts in 32 bits."""
_READ = 1 << 20


class WavPart:
    """A live recording: PCM of 16 bits under ``<path>.part``, 0600 and locked, which :meth:`finish` gives its name.

    Does blocking I/O; for one thread at a time.

    Args:
        path: What the finished file is called.
        sample_rate: Hz.
        channels: 1 or more, interleaved.

    Raises:
        FileExistsError: Somebody has this file.
        OSError: It cannot be made.
    """

    __slots__ = ("_channels", "_fd", "_path", "_sample_rate", "_stale", "frames", "part")

    def __init__(self, path: Path, sample_rate: int, channels: int) -> None:
        self._path = path
        self._sample_rate = sample_rate
        self._channels = channels
        self.part = path.with_name(f"{path.name}.part")
        # Samples a channel, to the end of the longest.
        self.frames = 0
        self._fd = os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._write_header()
        except OSError:
            self.discard()
            raise

    def write(self, samples: Samples, start: int, channel: int) -> None:
        """Place samples on a channel.

        Args:
            samples: Shape ``(n,)``, int16.
            start: Where on the file's clock ``samples[0]`` belongs; what lies between is silence.
            channel: From 0.

        Raises:
            OSError: The disk is full or broken, or the file would exceed what WAV can hold, 4 GiB.
        """
        end = start + len(samples)
        step = 2 * self._channels
        if end * step > _LONGEST:
            raise OSError(f"{self.part}: a WAV file ends at 4 GiB")
        offset = _HEADER.size + start * step
        little = samples.astype("<i2", copy=False)
        if self._channels == 1:
            self._write_all(little.tobytes(), offset)
        else:
            there = bytearray(len(samples) * step)
            known = os.pread(self._fd, len(there), offset)
            there[: len(known)] = known
            np.frombuffer(there, "<i2").reshape(-1, self._channels)[:, channel] = little
            self._write_all(there, offset)
        if end > self.frames:
            self.frames = end
            self._stale = True

    def flush(self) -> None:
        """Bring the header up to date: what was written so far outlives this process.

        Raises:
            OSError: The disk is broken.
        """
        if self._stale:
            self._write_header()

    def digest(self) -> Iterator[str]:
        """Read the file through a piece at a time, yielding after each the SHA-256 so far; the last one is the file's.

        Raises:
            OSError: The disk is broken.
        """
        sha256 = hashlib.sha256()
        offset = 0
        while piece := os.pread(self._fd, _READ, offset):
            sha256.update(piece)
            offset += len(piece)
            yield sha256.hexdigest()

    def finish(self) -> None:
        """Put the file on the disk for good, give it its name and close it.

        Raises:
            OSError: The disk is broken; the file keeps ``.part``.
        """
        try:
            os.fsync(self._fd)
            self.part.rename(self._path)
        finally:
            os.close(self._fd)

    def discard(self) -> None:
        """Close the file and delete it."""
        os.close(self._fd)
        self.part.unlink(missing_ok=True)

    def _write_header(self) -> None:
        size = self.frames * 2 * self._channels
        header = _HEADER.pack(
            b"RIFF",
            _HEADER.size - 8 + size,
            b"WAVE",
            b"fmt ",
            16,
            1,  # WAVE_FORMAT_PCM
            self._channels,
            self._sample_rate,
            self._sample_rate * 2 * self._channels,
            2 * self._channels,
            16,
            b"data",
            size,
        )
        self._write_all(header, 0)
        self._stale = False

    def _write_all(self, data: bytes | bytearray, offset: int) -> None:
        view = memoryview(data)
        while view:
            try:
                # A disk that runs full takes a part first, and complains the next time.
                written = os.pwrite(self._fd, view, offset)
            except OSError as error:
                # What did fit is kept, to the last whole sample.
                step = 2 * self._channels
                self.frames = max(self.frames, (offset - _HEADER.size) // step)
                self._stale = True
                os.ftruncate(self._fd, _HEADER.size + self.frames * step)
                raise OSError(error.errno, error.strerror, str(self.part)) from None
            view = view[written:]
            offset += written

"""A WAV file that is written while the call lasts, at any place in any order, and is playable at every moment.

Not soundfile: its writer brings the header up to date only on close, so that a crash leaves a file which says it is
empty, and its flush is an fsync. Positioned writes also make silence free (a hole in the file reads as zeros) and
interleave or mix two tracks in the file itself, however far one runs ahead of the other.

Source: Multimedia Programming Interface and Data Specifications 1.0 (RIFF, ``fmt `` and ``data`` chunks).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from streamsink.audio import Samples
from streamsink.disk import give_way
from streamsink.processors.files import create

_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_LONGEST = 2**32 - _HEADER.size
"""Bytes of audio; RIFF counts in 32 bits."""
_READ = 1 << 17
"""Bytes read at once to be hashed: a tenth of a millisecond's work."""


def most_frames(channels: int) -> int:
    """How many samples a channel a WAV file can hold."""
    return _LONGEST // (2 * channels)


class WavFile:
    """What a WAV file holds, for reading: PCM of 16 bits behind the header that :class:`WavPart` writes.

    Args:
        fd: An open file; closed by :meth:`close`.
        sample_rate: Hz.
        channels: 1 or more, interleaved.
        frames: Samples a channel.

    Attributes:
        frames: Samples a channel, to the end of the longest.
    """

    __slots__ = ("_fd", "channels", "frames", "sample_rate")

    def __init__(self, fd: int, sample_rate: int, channels: int, frames: int) -> None:
        self._fd = fd
        self.sample_rate = sample_rate
        self.channels = channels
        self.frames = frames

    def read(self, start: int, frames: int) -> NDArray[np.int16]:
        """Read samples back, shape ``(n, channels)``, int16; fewer at the end.

        Raises:
            OSError: The disk is broken.
        """
        step = 2 * self.channels
        data = os.pread(self._fd, frames * step, _HEADER.size + start * step)
        return np.frombuffer(data[: len(data) // step * step], "<i2").reshape(-1, self.channels)

    def digest(self) -> Iterator[str]:
        """Read the file through a piece at a time, yielding after each the SHA-256 so far; the last one is the file's.

        Raises:
            OSError: The disk is broken.
        """
        return digest(self._fd)

    def close(self) -> None:
        """Close the file, which lets go of its lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WavPart(WavFile):
    """A live recording: PCM of 16 bits under ``<path>.part``, 0600 and locked until it is closed.

    Does blocking I/O; for one thread at a time.

    Args:
        path: What the finished file is called.
        sample_rate: Hz.
        channels: 1 or more, interleaved.

    Attributes:
        part: Where the file is.

    Raises:
        FileExistsError: Somebody has this file.
        OSError: It cannot be made.
    """

    __slots__ = ("_stale", "part", "path")

    def __init__(self, path: Path, sample_rate: int, channels: int) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        super().__init__(create(self.part), sample_rate, channels, 0)
        try:
            # Who repairs may look at it in between, and lets go of a file without a header at once.
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._write_header()
        except OSError:
            self.discard()
            raise

    @classmethod
    def reopen(cls, path: Path, sample_rate: int, channels: int) -> Self:
        """Take over what a crash left under ``<path>.part``, header and end mended.

        Args:
            path: What the finished file is called.
            sample_rate: Hz, where the header does not tell.
            channels: Likewise.

        Raises:
            BlockingIOError: Somebody writes it.
            OSError: It is gone, is a link, or cannot be used.
        """
        self = cls.__new__(cls)
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self._fd = os.open(self.part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", str(self.part))
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(self.part.lstat(), found):
                raise FileNotFoundError(errno.ENOENT, "finished meanwhile", str(self.part))
            self._read_header(sample_rate, channels)
        except OSError:
            os.close(self._fd)
            raise
        return self

    def _read_header(self, sample_rate: int, channels: int) -> None:
        head = os.pread(self._fd, _HEADER.size, 0)
        self.sample_rate, self.channels = sample_rate, channels
        if len(head) == _HEADER.size and head.startswith(b"RIFF"):
            fields = _HEADER.unpack(head)
            # The size it tells is that of the last flush; what was written since is there too.
            self.channels, self.sample_rate = max(1, fields[6]), max(1, fields[7])
        step = 2 * self.channels
        self.frames = max(0, os.fstat(self._fd).st_size - _HEADER.size) // step
        os.ftruncate(self._fd, _HEADER.size + self.frames * step)
        self._write_header()

    def write(self, samples: Samples, start: int, channel: int) -> None:
        """Mix samples into a channel, saturating where they are too loud together.

        Args:
            samples: Shape ``(n,)``, int16.
            start: Where on the file's clock ``samples[0]`` belongs; what lies between is silence.
            channel: From 0.

        Raises:
            OSError: The disk is full or broken, or the file would exceed what WAV can hold, 4 GiB.
        """
        end = start + len(samples)
        step = 2 * self.channels
        if end * step > _LONGEST:
            raise OSError(errno.EFBIG, "a WAV file ends at 4 GiB", str(self.part))
        offset = _HEADER.size + start * step
        little = samples.astype("<i2", copy=False)
        if self.channels == 1 and start >= self.frames:
            self._write_all(little.tobytes(), offset)
        else:
            frames = np.zeros((len(samples), self.channels), "<i2")
            known = self.read(start, len(samples))
            frames[: len(known)] = known
            # Wide enough for the sum; only what is there already can make it too loud.
            frames[:, channel] = np.clip(frames[:, channel].astype(np.int32) + little, -32768, 32767)
            self._write_all(frames.tobytes(), offset)
        if end > self.frames:
            self.frames = end
            self._stale = True

    def extend(self, frames: int) -> None:
        """Let the file be at least so long; what is added is silence.

        Raises:
            OSError: The disk is broken.
        """
        if frames > self.frames:
            os.ftruncate(self._fd, _HEADER.size + frames * 2 * self.channels)
            self.frames = frames
            self._stale = True

    def flush(self) -> None:
        """Bring the header up to date: what was written so far outlives this process.

        Raises:
            OSError: The disk is broken.
        """
        if self._stale:
            self._write_header()

    def sync(self, *, final: bool = False) -> None:
        """Let what was written so far outlive a power cut too.

        Raises:
            OSError: The disk is broken.
        """
        (os.fsync if final else os.fdatasync)(self._fd)

    def discard(self) -> None:
        """Close the file and delete it."""
        self.part.unlink(missing_ok=True)
        self.close()

    def _write_header(self) -> None:
        size = self.frames * 2 * self.channels
        header = _HEADER.pack(
            b"RIFF",
            _HEADER.size - 8 + size,
            b"WAVE",
            b"fmt ",
            16,
            1,  # WAVE_FORMAT_PCM
            self.channels,
            self.sample_rate,
            self.sample_rate * 2 * self.channels,
            2 * self.channels,
            16,
            b"data",
            size,
        )
        self._write_all(header, 0)
        self._stale = False

    def _write_all(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            try:
                # A disk that runs full takes a part first, and complains the next time.
                written = os.pwrite(self._fd, view, offset)
            except OSError as error:
                # What did fit is kept, to the last whole sample.
                step = 2 * self.channels
                self.frames = max(self.frames, (offset - _HEADER.size) // step)
                self._stale = True
                os.ftruncate(self._fd, _HEADER.size + self.frames * step)
                raise OSError(error.errno, error.strerror, str(self.part)) from None
            view = view[written:]
            offset += written


def view(path: Path, sample_rate: int, channels: int, frames: int) -> WavFile:
    """Open a file for reading that somebody has locked, and whose header need not tell yet what is in it.

    Raises:
        OSError: It is gone, is a link, or cannot be read.
    """
    return WavFile(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), sample_rate, channels, frames)


def digest(fd: int) -> Iterator[str]:
    """Yield the SHA-256 of an open file so far, in hex, after each piece of it."""
    sha256 = hashlib.sha256()
    offset = 0
    while piece := os.pread(fd, _READ, offset):
        sha256.update(piece)
        offset += len(piece)
        yield sha256.hexdigest()
        give_way()

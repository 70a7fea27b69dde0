"""The JSON file beside a recording: what it is, and while it is live, what to make of it."""

from __future__ import annotations

import errno
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from streamsink.disk import give_way
from streamsink.stream import Attendance

_ROOM = 4096
"""Bytes a live sidecar takes at least, so that what its end adds has its room on a disk that is full by then."""
_LONGEST = 1 << 26
"""Bytes of a sidecar that are read."""


class Gap(msgspec.Struct):
    """A stretch of silence where messages were lost, from the beginning of the file."""

    track: str
    start_seconds: float
    seconds: float


class Pause(msgspec.Struct):
    """A stretch of silence where the recording was paused, from the beginning of the file."""

    start_seconds: float
    seconds: float


class Trimmed(msgspec.Struct):
    """Seconds of silence that were cut off."""

    start_seconds: float
    end_seconds: float


class AudioFile(msgspec.Struct):
    """One of the recording's audio files.

    Attributes:
        name: In the sidecar's folder.
        channels: For each channel what is in it: ``inbound``, ``outbound``, ``mix``, ``played``.
        sha256: In hex; None until it is finished.
    """

    name: str
    channels: list[list[str]]
    sha256: str | None = None


class Sidecar(msgspec.Struct):
    """What stands in ``<stem>.json``, in this order. While the stream is live: what is known by then.

    Attributes:
        sample_rate: Hz, of the finished file.
        sha256: Of the audio file (the first of them), in hex; None where it could not be read back.
        complete: Whether the file has everything that arrived on the stream while it was to be recorded.
        format: ``wav``, ``flac``, ``ogg``, ``opus`` or ``mp3``.
        segment: Number of this file among the stream's, from 1.
        start_seconds: Where on the stream's clock the file begins (before it is trimmed).
        missing_seconds: How much before that is in no file, since the disk took nothing.
        trim: Whether silence is cut off at the recording's ends.
        error: Why the file ends where it does, if not as meant.
        continues: Whether the next file goes on where this one ends.
        members: Of a room: who was in it, and when, in seconds on the stream's clock.
    """

    stream_sid: str
    call_sid: str | None
    account_sid: str | None
    name: str | None
    codec: str
    sample_rate: int
    started_at: datetime
    duration_seconds: float
    custom_parameters: dict[str, Any]
    gaps: list[Gap]
    sha256: str | None
    processors: list[str]
    close_code: int | None
    close_reason: str
    complete: bool
    format: str = "wav"
    files: list[AudioFile] = []
    segment: int = 1
    start_seconds: float = 0.0
    missing_seconds: float = 0.0
    pauses: list[Pause] = []
    trim: bool = False
    trimmed: Trimmed | None = None
    error: str | None = None
    continues: bool = False
    members: list[Attendance] = []


def write(path: Path, sidecar: Sidecar, *, sync: bool = False, final: bool = False) -> None:
    """Write a sidecar over the file that holds its place.

    Args:
        path: Where.
        sidecar: What to write.
        sync: Whether it is on the disk for good afterwards.
        final: Whether this is the last time; it is on the disk for good, too.

    Raises:
        OSError: The disk is full or broken, or a link was put in its place; what was there is there still.
    """
    text = _text(sidecar)
    give_way()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        there = os.fstat(fd).st_size
        if not final:
            text = text.ljust(max(_ROOM, there if len(text) <= there else 2 * len(text)))
        if len(text) > there:
            # Or half of it would stand over what was there, and the rest find no room.
            _make_room(fd, len(text))
        # Over what is there, not truncated first: on a full disk the room it has is all the room there is.
        file.write(text)
        file.flush()
        file.truncate()
        if sync or final:
            os.fsync(fd)


def _make_room(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _text(sidecar: Sidecar) -> bytes:
    """JSON for people and programs, a line a gap: a bad hour has thousands, and formatting them at once takes long."""
    head = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(sidecar, gaps=[])), indent=2)
    if sidecar.gaps:
        lines = b",\n    ".join(msgspec.json.encode(gap) for gap in sidecar.gaps)
        # Of what is named so only the sidecar's own is indented by two.
        head = head.replace(b'\n  "gaps": []', b'\n  "gaps": [\n    ' + lines + b"\n  ]", 1)
    return head + b"\n"


def read(path: Path) -> Sidecar | None:
    """Read a sidecar, live or finished; None when there is none or it makes no sense."""
    try:
        # Nobody writes into a FIFO of that name, ever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            # A crash while a shorter one was written over a longer one leaves the end of that.
            told, _ = json.JSONDecoder().raw_decode(file.read(_LONGEST).decode(errors="replace"))
        return msgspec.convert(told, Sidecar)
    except (OSError, ValueError):
        return None

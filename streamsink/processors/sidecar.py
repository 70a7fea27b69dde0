"""The JSON file beside a recording: what it is, and while it is live, what to make of it."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from streamsink.processors.files import give_way
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
    members: list[Attendance] = []


def write(path: Path, sidecar: Sidecar, *, final: bool) -> None:
    """Write a sidecar over the file that holds its place; a final one is on the disk for good afterwards.

    Raises:
        OSError: The disk is full or broken, or a link was put in its place.
    """
    text = msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n"
    if not final:
        text = text.ljust(_ROOM)
    give_way()
    # Over what is there, not truncated first: on a full disk the room it has is all the room there is.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(text)
        file.flush()
        file.truncate()
        if final:
            os.fsync(fd)


def read(path: Path) -> Sidecar | None:
    """Read a sidecar, live or finished; None when there is none or it makes no sense."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            # A crash while a shorter one was written over a longer one leaves the end of that.
            told, _ = json.JSONDecoder().raw_decode(file.read(_LONGEST).decode())
        return msgspec.convert(told, Sidecar)
    except (OSError, ValueError):
        return None

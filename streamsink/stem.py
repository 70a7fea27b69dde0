"""Names of the files about one stream: made safe, and reserved on disk so that no two streams share one."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

LONGEST_NAME = 80
"""Bytes of a name that are kept."""

_FORMATS = ("wav", "flac", "ogg", "opus", "mp3")
AUDIO_ENDINGS = (*_FORMATS, *(f"{side}.{ending}" for side in ("inbound", "outbound") for ending in _FORMATS))
"""Endings a recording may have; ``.part`` comes behind them while it is live."""

MADE_ENDINGS = (*AUDIO_ENDINGS, "transcript.jsonl", "vtt", "srt")
"""Endings of all that is made about a stream, but for the sidecar's own ``json``."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def safe(name: str) -> str:
    """Make a part of a file name from any text: ``A-Z a-z 0-9 . _ -``, 1 to 80 bytes, not beginning with a dot."""
    return _UNSAFE.sub("_", name).lstrip(".")[:LONGEST_NAME] or "_"


def reserve(directory: Path, started_at: datetime, name: str) -> str:
    """Find a stem nobody uses and reserve it by making ``<stem>.json.part``, empty, 0600.

    Any number of threads and processes may do so in one folder at once. A process tries each number only once, however
    many streams of one name start in one second.

    Args:
        directory: Made, 0700, where it is missing.
        started_at: When the stream started; aware of its zone.
        name: The stream's name, in its sender's words.

    Returns:
        ``<UTC start as 20261120T204218Z>_<name made safe>``, with ``_2``, ``_3`` … behind it when taken.

    Raises:
        OSError: The folder cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    first = f"{started_at.astimezone(UTC):%Y%m%dT%H%M%SZ}_{safe(name)}"
    for number in _numbers(directory, first):
        stem = first if number == 1 else f"{first}_{number}"
        reservation = directory / f"{stem}.json.part"
        try:
            os.close(os.open(reservation, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            continue
        # What follows takes as long again: in between the event loop may have this core, as disk.give_way says.
        os.sched_yield()
        # A finished recording's .json.part is gone, its .json is there: so look only once the reservation stands.
        if not any(os.path.lexists(path) for path in _files(directory, stem)):
            return stem
        reservation.unlink()
    raise AssertionError("unreachable: the numbers are endless")


@functools.lru_cache(maxsize=32)
def _numbers(directory: Path, first: str) -> Iterator[int]:
    """The numbers this process has not tried yet: they only save time, what a number is worth the disk says."""
    return itertools.count(1)


def _files(directory: Path, stem: str) -> Iterator[Path]:
    yield directory / f"{stem}.json"
    yield directory / f"{stem}.transcript.jsonl"
    yield directory / f"{stem}.transcript.jsonl.part"
    for ending in AUDIO_ENDINGS:
        yield directory / f"{stem}.{ending}"
        yield directory / f"{stem}.{ending}.part"

"""The files of a transcript: a JSON line an utterance while the call lasts, WebVTT and SubRip when it is over.

Times are seconds on the stream's media clock, which is the recording's: both begin with the stream. Sources: WebVTT
(W3C, https://www.w3.org/TR/webvtt1/); SubRip has no standard, players read what the first program of that name wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from streamsink.speech.events import Transcript, Word

SHORTEST = 0.001
"""Seconds of a cue: one that ends as it starts is invalid."""


class Line(msgspec.Struct):
    """A line of ``<stem>.transcript.jsonl``."""

    start: float
    """Seconds on the recording's clock; ``end`` too."""
    end: float
    text: str
    track: str
    speaker: str
    final: bool
    words: list[Word]
    utterance: int
    """Number on its track; lines come as finals do, which need not be its order."""
    confidence: float | None
    language: str | None
    dropped: bool
    """Somebody spoke, and nobody could transcribe it."""


def line_of(transcript: Transcript) -> Line:
    """What is kept of a final transcript."""
    return Line(
        start=transcript.start,
        end=transcript.end,
        text=transcript.text,
        track=transcript.track.value,
        speaker=transcript.speaker,
        final=transcript.final,
        words=list(transcript.words),
        utterance=transcript.utterance,
        confidence=transcript.confidence,
        language=transcript.language,
        dropped=transcript.dropped,
    )


class TranscriptPart:
    """A live transcript: lines under ``<stem>.transcript.jsonl.part``, 0600 and locked, until :meth:`finish`.

    Does blocking I/O; for one thread at a time.

    Args:
        directory: Where.
        stem: The name of the stream's files, reserved.
        shared: Whether a recording has this stem too; if not, its reservation ends with this transcript.

    Raises:
        FileExistsError: Somebody transcribes under this stem.
        OSError: It cannot be made.
    """

    def __init__(self, directory: Path, stem: str, *, shared: bool) -> None:
        self._reservation = None if shared else directory / f"{stem}.json.part"
        self.path = directory / f"{stem}.transcript.jsonl"
        self._part = _part(self.path)
        if self.path.exists():
            raise FileExistsError(f"there is {self.path} already")
        self._fd = os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines: what is written outlives this process.

        Raises:
            OSError: The disk is full or broken.
        """
        view = memoryview(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Write the cues of all lines, put everything on the disk for good, and give the files their names.

        Raises:
            OSError: The disk is full or broken; what could not be finished keeps ``.part``.
        """
        try:
            os.fsync(self._fd)
            write_cues(self._part, self.path)
            self._part.rename(self.path)
            if self._reservation is not None and _is_empty(self._reservation):
                self._reservation.unlink()
        finally:
            os.close(self._fd)


def repair(part: Path) -> bool:
    """Finish what a crash left: the whole lines of a ``.transcript.jsonl.part``, and their cues.

    Returns:
        Whether it was finished; False when its writer lives.

    Raises:
        OSError: The disk is full or broken.
    """
    fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path = part.with_suffix("")
        # Half a line is all that can be torn.
        os.ftruncate(fd, part.read_bytes().rfind(b"\n") + 1)
        os.fsync(fd)
        write_cues(part, path)
        part.rename(path)
        return True
    finally:
        os.close(fd)


def write_cues(lines_file: Path, path: Path) -> None:
    """Write ``<stem>.vtt`` and ``<stem>.srt`` of a transcript's lines; a file that is there is replaced whole.

    Args:
        lines_file: Where the lines are.
        path: ``<stem>.transcript.jsonl``, for the names.

    Raises:
        OSError: The disk is full or broken.
    """
    lines = [msgspec.json.decode(line, type=Line) for line in lines_file.read_bytes().splitlines()]
    lines.sort(key=lambda line: (line.start, line.end))
    stem = path.name.removesuffix(".transcript.jsonl")
    _write(path.with_name(f"{stem}.vtt"), webvtt(lines))
    _write(path.with_name(f"{stem}.srt"), subrip(lines))


def webvtt(lines: list[Line]) -> str:
    """Make WebVTT of lines in order of time: a cue an utterance, a note a hole; voices where there are several."""
    voices = len({line.speaker for line in lines if line.text}) > 1
    blocks = ["WEBVTT"]
    for line in lines:
        start, end = _times(line)
        if line.dropped:
            blocks.append(f"NOTE not transcribed: {_clock(start, '.')} to {_clock(end, '.')}")
        elif line.text:
            voice = f"<v {_cue(line.speaker)}>" if voices else ""
            blocks.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{voice}{_cue(line.text)}")
    return "\n\n".join(blocks) + "\n"


def subrip(lines: list[Line]) -> str:
    """Make SubRip of lines in order of time; a hole is a gap between cues."""
    voices = len({line.speaker for line in lines if line.text}) > 1
    cues = []
    for number, line in enumerate((line for line in lines if line.text), 1):
        start, end = _times(line)
        voice = f"{_one_line(line.speaker)}: " if voices else ""
        cues.append(f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{voice}{_one_line(line.text)}\n")
    return "\n".join(cues)


def _times(line: Line) -> tuple[float, float]:
    start = max(0.0, line.start)
    return start, max(line.end, start + SHORTEST)


def _clock(seconds: float, point: str) -> str:
    milliseconds = math.floor(seconds * 1000 + 0.5)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _cue(text: str) -> str:
    """Text as a cue may have it (WebVTT §4.2.2)."""
    return _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _one_line(text: str) -> str:
    # An empty line, or an arrow of its own, would end the cue.
    return " ".join(text.split()).replace("-->", "→")


def _is_empty(path: Path) -> bool:
    """Whether it is there and nobody has written to it."""
    return path.exists() and not path.stat().st_size


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write(path: Path, text: str) -> None:
    part = _part(path)
    with contextlib.suppress(FileNotFoundError):
        # Of a crash: the transcript's lock says that nobody writes it now.
        part.unlink()
    fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    part.rename(path)

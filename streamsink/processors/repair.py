"""What a crash left of recordings, made playable: done at each start, and by ``streamsink repair DIR``.

A recording that a live process writes is locked and left alone. What was settled before the crash is finished as it
was meant to be; anything else gets a sidecar that says ``complete: false``. Doing it twice, or in two processes at
once, does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import structlog

from streamsink.processors import sidecar as sidecars
from streamsink.processors import transcript
from streamsink.processors.files import give_name, sync_folder
from streamsink.processors.segment import Segment
from streamsink.processors.sidecar import AudioFile, Sidecar
from streamsink.processors.wav import WavPart, digest
from streamsink.stem import safe

log = structlog.get_logger(__name__)

JUST_MADE = 10.0
"""Seconds a reservation, or a file without a header, may be about to be used."""

_MADE = ("flac", "ogg", "opus", "mp3", "trim")
"""What is being made of a live WAV ends so, and with ``.part``."""
_LIVE = re.compile(r"(?P<stem>.+?)(?:\.(?P<side>inbound|outbound))?\.wav\.part", re.DOTALL)
_STEM = re.compile(r"(\d{8}T\d{6}Z)_(.*)", re.DOTALL)
_LEFT = "the process ended before the recording did"


class Repaired(NamedTuple):
    """What became of one recording.

    Attributes:
        stem: Which.
        files: What it is now, audio first; empty where nothing was to be made.
        problem: Why it is still as it was; None when it is not.
        in_use: Whether that is because somebody writes it.
    """

    stem: str
    files: tuple[str, ...] = ()
    problem: str | None = None
    in_use: bool = False


def repair(folder: Path, now: Callable[[], float] = time.time) -> Iterator[Repaired]:
    """Repair all recordings in a folder, one after the other.

    Args:
        folder: Which; one that is missing has none.
        now: Seconds since the epoch; tells how old a reservation is.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for stem in sorted(_stems(names)):
        try:
            done = _repair(folder, stem, now)
        except BlockingIOError:
            done = Repaired(stem, problem="in use", in_use=True)
        except FileNotFoundError:
            # Another process was faster.
            continue
        except (OSError, ValueError) as error:
            done = Repaired(stem, problem=str(error))
        if done is not None:
            yield done
    for name in names:
        if name.endswith(".transcript.jsonl.part"):
            yield from _transcript(folder / name)


def repair_all(folders: Iterable[Path]) -> None:
    """Repair what is in these folders and log it; for a thread."""
    for folder in folders:
        try:
            for done in repair(folder):
                if done.problem is None:
                    log.info("recording repaired", stem=done.stem, files=done.files)
                elif not done.in_use:
                    log.error("recording not repaired", stem=done.stem, cause=done.problem)
        except OSError as error:
            log.error("recordings not repaired", folder=str(folder), cause=error.strerror)


def _stems(names: Iterable[str]) -> set[str]:
    there = set(names)
    stems = {name.removesuffix(".json.part") for name in names if name.endswith(".json.part")}
    for name in names:
        live = _LIVE.fullmatch(name)
        if live is not None:
            whole = name.removesuffix(".wav.part")
            # A stream's own name may end like one side of another's.
            stems.add(whole if f"{whole}.json.part" in there or live["side"] is None else live["stem"])
    return stems


def _transcript(part: Path) -> Iterator[Repaired]:
    stem = part.name.removesuffix(".transcript.jsonl.part")
    try:
        done = transcript.repair(part)
    except FileNotFoundError:
        return
    except OSError as error:
        yield Repaired(stem, problem=str(error))
    else:
        if done:
            yield Repaired(stem, (part.name.removesuffix(".part"),))
        else:
            yield Repaired(stem, problem="in use", in_use=True)


def _repair(folder: Path, stem: str, now: Callable[[], float]) -> Repaired | None:
    told = sidecars.read(folder / f"{stem}.json.part")
    with contextlib.ExitStack() as stack:
        wavs = _reopened(folder, stem, told, now, stack)
        if wavs is None:
            return None
        if not wavs:
            # Another process may have named them since; what it had told by then counts.
            told = sidecars.read(folder / f"{stem}.json.part")
        finished = sidecars.read(folder / f"{stem}.json")
        if wavs and finished is not None and _is_there(folder, finished):
            # All that was left to do is to tidy up.
            return _tidied(folder, stem, finished, wavs)
        if told is not None and _named(folder, told):
            give_name(folder / f"{stem}.json.part", folder / f"{stem}.json")
            return _tidied(folder, stem, told, wavs)
        if not wavs:
            return _without_audio(folder, stem, told, now)
        if told is not None:
            _undo(folder, told)
        for wav in wavs:
            _discard(folder, wav.path.name)
        # From here on the segment closes them.
        stack.pop_all()
        return _finished(folder, stem, told, wavs)


def _reopened(
    folder: Path, stem: str, told: Sidecar | None, now: Callable[[], float], stack: contextlib.ExitStack
) -> list[WavPart] | None:
    """Take over the live files there are; None where one may only just have been made."""
    layouts = _layouts(told) if told is not None else {}
    wavs = []
    for side in ("", "inbound.", "outbound."):
        path = folder / f"{stem}.{side}wav"
        if side and os.path.lexists(folder / f"{stem}.{side}json.part"):
            # A stream whose own name ends like one side of this one's.
            continue
        part = path.with_name(f"{path.name}.part")
        if not os.path.lexists(part):
            continue
        found = part.lstat()
        if stat.S_ISREG(found.st_mode) and not found.st_size and now() - found.st_mtime < JUST_MADE:
            return None
        channels = layouts.get(path.stem, [["inbound"]])
        wav = WavPart.reopen(path, told.sample_rate if told is not None else 8000, len(channels))
        stack.callback(wav.close)
        wavs.append(wav)
    return wavs


def _is_there(folder: Path, told: Sidecar) -> bool:
    """Whether every file a sidecar tells of is there, as it was, and nobody holds it.

    Raises:
        BlockingIOError: Somebody does.
    """
    return bool(told.files) and all(_is(folder / file.name, file) for file in told.files)


def _is(path: Path, file: AudioFile) -> bool:
    """Whether what has a name is what the sidecar tells of.

    Raises:
        BlockingIOError: It is, or may be, and somebody holds it.
    """
    if file.sha256 is None or "/" in file.name:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # The live WAV under its final name is locked by whoever is about to name the sidecar; our own lock is on the
        # same file where it has yet to be named, or a crash came between its two names.
        if path.suffix != ".part" and not os.path.lexists(f"{path}.part"):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        *_, last = "", *digest(fd)
    finally:
        os.close(fd)
    return last == file.sha256


def _named(folder: Path, told: Sidecar) -> bool:
    """Go on with naming the files that were made, if all of them are there under one name or the other.

    Raises:
        BlockingIOError: Somebody holds them.
        FileExistsError: Another file has one's name.
    """
    waiting = [file for file in told.files if not _is(folder / file.name, file)]
    if not told.files or not all(_is(folder / f"{file.name}.part", file) for file in waiting):
        return False
    for file in waiting:
        give_name(folder / f"{file.name}.part", folder / file.name)
    return True


def _undo(folder: Path, told: Sidecar) -> None:
    """Begin anew with a recording whose files were made, and are not all there: what is there is made once more."""
    for file in told.files:
        if file.name.endswith(".wav"):
            continue
        for name in (file.name, f"{file.name}.part"):
            if _is(folder / name, file):
                (folder / name).unlink()
    if told.trimmed is not None:
        # It is cut again. What was cut off lies where it did.
        cut, told.trimmed = told.trimmed, None
        told.duration_seconds += cut.start_seconds + cut.end_seconds
        for gap in told.gaps:
            gap.start_seconds += cut.start_seconds
        for pause in told.pauses:
            pause.start_seconds += cut.start_seconds


def _discard(folder: Path, name: str) -> None:
    """Delete what was being made of a recording, or has its final name too: a crash came between the two."""
    for ending in _MADE:
        (folder / f"{Path(name).stem}.{ending}.part").unlink(missing_ok=True)


def _tidied(folder: Path, stem: str, told: Sidecar, wavs: list[WavPart]) -> Repaired:
    sync_folder(folder)
    for file in told.files:
        _discard(folder, file.name)
    for wav in wavs:
        wav.part.unlink(missing_ok=True)
    (folder / f"{stem}.json.part").unlink(missing_ok=True)
    return Repaired(stem, (*(file.name for file in told.files), f"{stem}.json"))


def _without_audio(folder: Path, stem: str, told: Sidecar | None, now: Callable[[], float]) -> Repaired | None:
    """A sidecar alone: an empty one is a reservation, which ends once nobody can be about to use it."""
    part = folder / f"{stem}.json.part"
    found = part.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(part))
    if (folder / f"{stem}.transcript.jsonl.part").exists() or now() - found.st_mtime < JUST_MADE:
        return None
    if told is None:
        part.unlink()
        return Repaired(stem)
    told.files, told.complete, told.duration_seconds, told.error = [], False, 0.0, "its audio is gone"
    sidecars.write(part, told, final=True)
    give_name(part, folder / f"{stem}.json")
    return Repaired(stem, (f"{stem}.json",))


def _finished(folder: Path, stem: str, told: Sidecar | None, wavs: list[WavPart]) -> Repaired:
    frames = max(wav.frames for wav in wavs)
    sidecar = told or _guessed(stem, wavs[0])
    if told is None or not told.complete or round(told.duration_seconds * wavs[0].sample_rate) != frames:
        sidecar.complete = False
        sidecar.error = sidecar.error or _LEFT
    known = _layouts(sidecar)
    sidecar.files = [
        AudioFile(wav.path.name, known.get(wav.path.stem) or _channels(wav.path.name, wav.channels)) for wav in wavs
    ]
    segment = Segment(folder, stem, sidecar, wavs, 0, None)
    rest = segment.finish()
    if rest is not None:
        rest()
    if not (folder / f"{stem}.json").exists() or os.path.lexists(segment.part):
        return Repaired(stem, problem=segment.sidecar.error)
    return Repaired(stem, (*(file.name for file in segment.sidecar.files), f"{stem}.json"))


def _layouts(told: Sidecar) -> dict[str, list[list[str]]]:
    """What is in the channels of each file, whatever it ends with by now."""
    return {Path(file.name).stem: file.channels for file in told.files}


def _channels(name: str, count: int) -> list[list[str]]:
    """What is in a file's channels, where only its name tells."""
    first = 1 if name.endswith(".outbound.wav") else 0
    return [["inbound"], ["outbound", "played"]][first : first + count]


def _guessed(stem: str, wav: WavPart) -> Sidecar:
    """What can be told where the sidecar is lost: the name, and what the WAV's header says."""
    match = _STEM.fullmatch(stem)
    started_at = datetime.fromtimestamp(wav.part.stat().st_mtime, UTC)
    if match is not None:
        with contextlib.suppress(ValueError):
            started_at = datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return Sidecar(
        stream_sid="",
        call_sid=None,
        account_sid=None,
        name=safe(match[2]) if match is not None else None,
        codec="",
        sample_rate=wav.sample_rate,
        started_at=started_at,
        duration_seconds=0.0,
        custom_parameters={},
        gaps=[],
        sha256=None,
        processors=["record"],
        close_code=None,
        close_reason="",
        complete=False,
    )

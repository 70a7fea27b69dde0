"""What a finished recording may be, and how it is made of the WAV file that was live: a block at a time, checked.

libsndfile does the work, without the GIL. What it wrote is read back before anybody may rely on it: its writers do not
complain when a disk runs full.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import soundfile
from numpy.typing import NDArray

from streamsink.codec import Resampler
from streamsink.processors.files import create
from streamsink.processors.wav import WavPart

FormatName = Literal["wav", "flac", "ogg", "opus", "mp3"]

BLOCK = 16_384
"""Samples a channel that are in memory at once."""
SILENT = 328
"""Samples below this are silence to `trim`: -40 dBFS."""
MARGIN = 0.1
"""Seconds of silence that `trim` leaves."""


class _Format(NamedTuple):
    container: str
    subtype: str
    lossless: bool = False
    rate: int | None = None
    """Hz, where none was asked for; None is the recording's own."""
    rates: tuple[int, ...] = ()
    """Hz that can be; none for all."""


_OPUS_RATES = (8000, 12_000, 16_000, 24_000, 48_000)
_MP3_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)

_FORMATS = {
    "wav": _Format("WAV", "PCM_16", lossless=True),
    "flac": _Format("FLAC", "PCM_16", lossless=True),
    "ogg": _Format("OGG", "VORBIS"),
    "opus": _Format("OGG", "OPUS", rate=48_000, rates=_OPUS_RATES),
    "mp3": _Format("MP3", "MPEG_LAYER_III", rates=_MP3_RATES),
}
assert tuple(_FORMATS) == get_args(FormatName)


def check_rate(name: FormatName, rate: int) -> None:
    """Check that a format can have a rate.

    Raises:
        ValueError: It cannot; the message names the ones that can be.
    """
    rates = _FORMATS[name].rates
    if rates and rate not in rates:
        raise ValueError(f"format={name} cannot have sample_rate={rate}: choose among {', '.join(map(str, rates))}")


def rate_of(name: FormatName, asked: int | None, native: int) -> int:
    """The rate of a finished file in Hz, given what was asked for and the stream's own."""
    return asked or _FORMATS[name].rate or native


def loud_part(wav: WavPart, *, head: bool, tail: bool) -> tuple[int, int]:
    """Find where a recording begins and ends without the silence at its ends, in samples; all of it if it is silent.

    Args:
        wav: The recording.
        head: Whether its beginning is cut.
        tail: Whether its end is.
    """
    first, last = None, 0
    for start in range(0, wav.frames, BLOCK):
        (loud,) = np.nonzero((np.abs(wav.read(start, BLOCK).astype(np.int32)) >= SILENT).any(axis=1))
        if len(loud):
            first = start + int(loud[0]) if first is None else first
            last = start + int(loud[-1]) + 1
    if first is None:
        return 0, wav.frames
    margin = round(MARGIN * wav.sample_rate)
    return (
        max(0, first - margin) if head else 0,
        min(wav.frames, last + margin) if tail else wav.frames,
    )


@contextlib.contextmanager
def encode(
    wav: WavPart, part: Path, name: str, rate: int, span: tuple[int, int], moved: Callable[[], None]
) -> Iterator[int]:
    """Make a file of another format; what the context gives is its descriptor, right and on the disk for good.

    What an earlier attempt left under that name is deleted; so is what this one made when it fails.

    Args:
        wav: What is recorded; nobody else may use it meanwhile.
        part: The file's name for now.
        name: Its format.
        rate: Hz.
        span: From which sample of the WAV to which.
        moved: Called after each block.

    Raises:
        OSError: The disk is full or broken.
        soundfile.SoundFileError: libsndfile cannot write it.
    """
    part.unlink(missing_ok=True)
    fd = create(part)
    try:
        form = _FORMATS[name]
        with soundfile.SoundFile(
            fd, "w", rate, wav.channels, form.subtype, format=form.container, closefd=False
        ) as file:
            wanted = 0
            for block in _resampled(wav, rate, span):
                # Not int16 where it can be helped: libsndfile 1.2.2 garbles that in stereo MP3.
                _write(file, block if form.lossless else block.astype(np.float32) / np.float32(32_768), part)
                wanted += len(block)
                moved()
        os.fsync(fd)
        _check(fd, part, wav, form, rate, span, wanted, moved)
        yield fd
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _write(file: soundfile.SoundFile, block: NDArray[np.int16] | NDArray[np.float32], part: Path) -> None:
    try:
        file.write(block)
    except AssertionError:
        # soundfile's way of saying that fewer were written than it was given.
        raise OSError(f"{part}: the disk took only a part of it") from None


def _resampled(wav: WavPart, rate: int, span: tuple[int, int]) -> Iterator[NDArray[np.int16]]:
    """The recording in blocks of shape ``(n, channels)``, exactly as long at the new rate as it should be."""
    first, last = span
    blocks = (wav.read(start, min(BLOCK, last - start)) for start in range(first, last, BLOCK))
    if rate == wav.sample_rate:
        yield from blocks
        return
    resamplers = [Resampler(wav.sample_rate, rate) for _ in range(wav.channels)]
    left = round((last - first) * rate / wav.sample_rate)
    for block in blocks:
        made = [r.push(np.ascontiguousarray(block[:, channel])) for channel, r in enumerate(resamplers)]
        piece = np.stack(made, axis=1)[:left]
        left -= len(piece)
        yield piece
    rest = np.stack([r.flush() for r in resamplers], axis=1)[:left]
    yield np.concatenate([rest, np.zeros((left - len(rest), wav.channels), np.int16)])


def _check(
    fd: int,
    part: Path,
    wav: WavPart,
    form: _Format,
    rate: int,
    span: tuple[int, int],
    wanted: int,
    moved: Callable[[], None],
) -> None:
    """Read a file back: its rate, its channels, every sample of it, and where nothing may differ, that nothing does.

    Raises:
        OSError: It is not what was to be written.
    """
    os.lseek(fd, 0, os.SEEK_SET)
    with soundfile.SoundFile(fd, closefd=False) as file:
        right = (file.samplerate, file.channels, file.frames) == (rate, wav.channels, wanted)
        source = _resampled(wav, rate, span) if form.lossless else None
        there = 0
        while right and len(block := file.read(BLOCK, "int16", always_2d=True)):
            there += len(block)
            if source is not None and rate == wav.sample_rate:
                right = np.array_equal(block, next(source))
            moved()
    if not right or there != wanted:
        raise OSError(f"{part}: what was written cannot be read back")

"""What a finished recording may be, and how it is made of the WAV file that was live: a block at a time, checked.

libsndfile does the work. What it wrote is read back before anybody may rely on it: its writers do not
complain when a disk runs full.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec
import numpy as np
import soundfile
from numpy.typing import NDArray

from streamsink.codec import Resampler
from streamsink.processors.files import create
from streamsink.processors.wav import WavFile, digest, view

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


class Source(msgspec.Struct):
    """A live WAV file, settled.

    Attributes:
        path: Where it is.
        sample_rate: Hz.
        channels: 1 or more.
        frames: Samples a channel.
    """

    path: str
    sample_rate: int
    channels: int
    frames: int


class Order(msgspec.Struct):
    """What to make of a segment.

    Attributes:
        sources: What it was recorded in, all equally long.
        parts: For each of them, what the file made of it is called for now.
        format: What they are to be.
        sample_rate: Hz, of the files made.
        trim: Whether silence is cut off the beginning, and whether off the end; None for neither.
    """

    sources: list[Source]
    parts: list[str]
    format: str
    sample_rate: int
    trim: tuple[bool, bool] | None = None


class Made(msgspec.Struct):
    """What was made.

    Attributes:
        span: From which sample of the sources to which.
        sha256: Of each file, in hex.
    """

    span: tuple[int, int]
    sha256: list[str]


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


def loud_part(wav: WavFile, *, head: bool, tail: bool) -> tuple[int, int] | None:
    """Find where a file begins and ends without the silence at its ends, in samples; None if there is nothing else.

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
        return None
    margin = round(MARGIN * wav.sample_rate)
    return (
        max(0, first - margin) if head else 0,
        min(wav.frames, last + margin) if tail else wav.frames,
    )


def make(order: Order) -> Iterator[Made | None]:
    """Make the files that are asked for; they are right and on the disk for good when it yields what it made.

    Yields None after each step before that. When it fails, what it made is left to whoever ordered it.

    Raises:
        FileExistsError: One of them is there already.
        OSError: The disk is full or broken.
        soundfile.SoundFileError: libsndfile cannot write it.
    """
    with contextlib.ExitStack() as stack:
        wavs = []
        for source in order.sources:
            wavs.append(view(Path(source.path), source.sample_rate, source.channels, source.frames))
            stack.callback(wavs[-1].close)
        span = 0, wavs[0].frames
        if order.trim is not None:
            head, tail = order.trim
            loud = [found for wav in wavs if (found := loud_part(wav, head=head, tail=tail)) is not None]
            if loud:
                span = min(first for first, _ in loud), max(last for _, last in loud)
        made = Made(span, [])
        for wav, part in zip(wavs, order.parts, strict=True):
            sha256 = ""
            for step in _encode(wav, Path(part), _FORMATS[order.format], order.sample_rate, span):
                sha256 = step or sha256
                yield None
            made.sha256.append(sha256)
    yield made


def _encode(wav: WavFile, part: Path, form: _Format, rate: int, span: tuple[int, int]) -> Iterator[str | None]:
    """Make one file a step at a time; the last thing it yields is the file's SHA-256, in hex."""
    fd = create(part)
    try:
        wanted = 0
        with soundfile.SoundFile(
            fd, "w", rate, wav.channels, form.subtype, format=form.container, closefd=False
        ) as file:
            for block in _resampled(wav, rate, span):
                # Not int16 where it can be helped: libsndfile 1.2.2 garbles that in stereo MP3.
                _write(file, fd, block if form.lossless else block.astype(np.float32) / np.float32(32_768))
                wanted += len(block)
                yield None
        os.fsync(fd)
        yield from _check(fd, wav, form, rate, span, wanted)
        yield from digest(fd)
    finally:
        os.close(fd)


def _write(file: soundfile.SoundFile, fd: int, block: NDArray[np.int16] | NDArray[np.float32]) -> None:
    try:
        file.write(block)
    except (AssertionError, soundfile.LibsndfileError):
        # What soundfile says when fewer were written than it was given, and libsndfile when none were: neither knows
        # why, the disk does.
        os.write(fd, bytes(4096))
        raise OSError(errno.EIO, "the disk took only a part of it") from None


def _resampled(wav: WavFile, rate: int, span: tuple[int, int]) -> Iterator[NDArray[np.int16]]:
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
    wav: WavFile,
    form: _Format,
    rate: int,
    span: tuple[int, int],
    wanted: int,
) -> Iterator[None]:
    """Read a file back, a block a step: rate, channels, every sample, and where nothing may differ, that nothing does.

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
            yield None
    if not right or there != wanted:
        raise OSError(errno.EIO, "what was written cannot be read back")

"""What a call sends, and when: from a sound file or from a capture."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import soundfile

from streamsink import wire
from streamsink.audio import Samples
from streamsink.codec import CodecSpec, Resampler
from streamsink.errors import BadMessage, CodecError, SimulationError
from streamsink.simulator.far_end import Durations

_DTMF_FIRST = 0.5
_DTMF_EVERY = 0.25


class Step(NamedTuple):
    """One message of a call's script."""

    at: float
    """Seconds since the call began."""
    text: bytes | None
    """The message; None where nothing is sent."""
    media: bool = False
    """It is a frame; without a text, one that is skipped."""


def read_audio(path: Path, rate: int) -> Samples:
    """Read a sound file as mono at a codec's rate.

    Args:
        path: Any format and sample width soundfile reads; channels are averaged.
        rate: Hz wanted.

    Returns:
        int16 samples, shape ``(n,)``, n > 0.

    Raises:
        SimulationError: The file is missing, unreadable, empty, or has a rate that cannot be converted.
    """
    if not path.is_file():
        raise SimulationError(f"there is no sound file {path}")
    blocks: list[Samples] = []
    try:
        with soundfile.SoundFile(path) as sound:
            resampler = Resampler(sound.samplerate, rate) if sound.samplerate != rate else None
            for block in sound.blocks(65_536, dtype="float32", always_2d=True):
                mono = np.nan_to_num(block.mean(axis=1, dtype=np.float32)) * np.float32(32768)
                samples = np.clip(np.rint(mono), -32768, 32767).astype(np.int16)
                blocks.append(samples if resampler is None else resampler.push(samples))
            if resampler is not None:
                blocks.append(resampler.flush())
    except (soundfile.SoundFileError, OSError) as error:
        formats = ", ".join(sorted(soundfile.available_formats()))
        raise SimulationError(f"{path} cannot be read as sound ({error}); readable are {formats}") from None
    except CodecError as error:
        raise SimulationError(f"{path} cannot be converted to {rate} Hz: {error}") from None
    if not any(len(block) for block in blocks):
        raise SimulationError(f"{path} holds no audio")
    return np.concatenate(blocks)


def encode_payloads(samples: Samples, codec: CodecSpec) -> list[bytes]:
    """Cut audio into frames of one ptime and encode them in one go, state crossing frames.

    The platform sends whole frames only, so the last one is filled up with silence.
    """
    padded = np.concatenate((samples, np.zeros(-len(samples) % codec.frame_samples, np.int16)))
    encoder = codec.encoder()
    return [encoder.encode(frame) for frame in padded.reshape(-1, codec.frame_samples)]


def call_script(
    writer: wire.PlatformWriter,
    payloads: Sequence[bytes],
    ptime: int,
    *,
    frames: int | None,
    dtmf: str = "",
    skip: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """A call's media and digits in the order of their times, from 0 on.

    Frame k is due at k × ptime, so that delays never add up. Chunks count from 1 and timestamps are milliseconds;
    both, and the sequence number, go on over a skipped frame. The last step is the end of the last frame.

    Args:
        writer: Writes this stream's messages.
        payloads: Encoded frames; after the last comes the first again.
        ptime: Milliseconds a frame lasts.
        frames: How many, None for no end.
        dtmf: Digits, the first after 0.5 s, then one each 0.25 s.
        skip: Says for each frame whether it is lost on the way.
    """
    digits = deque((_DTMF_FIRST + _DTMF_EVERY * place, digit) for place, digit in enumerate(dtmf))
    at, frame = 0.0, 0
    while frame != frames:
        while digits and digits[0][0] <= at:
            due, digit = digits.popleft()
            yield Step(due, writer.dtmf(digit))
        text = writer.media(payloads[frame % len(payloads)], chunk=frame + 1, timestamp_ms=frame * ptime)
        yield Step(at, None if skip() else text, media=True)
        frame += 1
        at = frame * ptime / 1000
    for due, digit in digits:
        at = max(at, due)
        yield Step(due, writer.dtmf(digit))
    yield Step(at, None)


def silence_script(
    writer: wire.PlatformWriter, payloads: Sequence[bytes], ptime: int, *, sent: int, over: Callable[[float], bool]
) -> Iterator[Step]:
    """Silence behind a call's media, in times from its end on. Not counted as media: nothing need come back for it.

    Args:
        writer: Writes this stream's messages.
        payloads: Its first frames; after them comes the last again.
        ptime: Milliseconds a frame lasts.
        sent: How many frames there were before.
        over: Says for each frame's time whether it and all further ones are wanted no more.
    """
    for frame in itertools.count():
        at = frame * ptime / 1000
        if over(at):
            return
        payload = payloads[min(frame, len(payloads) - 1)]
        yield Step(at, writer.media(payload, chunk=sent + frame + 1, timestamp_ms=(sent + frame) * ptime))


async def perform(
    script: Iterable[Step],
    act: Callable[[Step], None],
    late: Durations,
    *,
    begin: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Act on each step at ``begin`` plus its time on the clock: absolute deadlines, so that a late one delays no other.

    ``late`` takes how late each was. After a stall the steps are made up for, the event loop having its turn between.
    """
    for step in script:
        await sleep(max(0.0, begin + step.at - clock()))
        late.add(max(0.0, clock() - begin - step.at))
        act(step)


class _Head(msgspec.Struct):
    path: str


class _HeadLine(msgspec.Struct):
    head: _Head


class _MessageLine(msgspec.Struct):
    t: float
    text: str | None = None
    base64: bytes | None = None


class Capture(NamedTuple):
    """One stream as ``--capture`` kept it."""

    path: str
    """The upgrade request's."""
    codec: CodecSpec | None
    """What the start message says; None where there is none that can be read."""
    steps: tuple[Step, ...]
    """Every message, in seconds since the upgrade."""


def read_capture(path: Path) -> Capture:
    """Read a capture: JSON lines, the upgrade's head first, then one message a line.

    ``{"head": {"path": "/", …}, …}``, then ``{"t": seconds, "text": "…"}``, with ``"base64"`` instead of ``"text"``
    where the message is not UTF-8. Other keys are skipped. The messages themselves may be anything: a capture is for
    showing what a peer really sent.

    Raises:
        SimulationError: The file cannot be read, or a line is not of this form; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SimulationError(f"the capture {path} cannot be read: {error.strerror}") from None
    if not lines:
        raise SimulationError(f"the capture {path} is empty; its first line should hold the upgrade's head")
    steps: list[Step] = []
    codec = None
    number = 1  # of the line that is being read
    try:
        asked = msgspec.json.decode(lines[0], type=_HeadLine).head.path
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007 - the error tells it
            step, its_codec = _read_step(line, steps[-1].at if steps else 0.0)
            steps.append(step)
            codec = codec or its_codec
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise SimulationError(f"{path} is not a capture: line {number}: {error}") from None
    if not steps:
        raise SimulationError(f"the capture {path} holds no message")
    return Capture(asked, codec, tuple(steps))


def _read_step(line: bytes, not_before: float) -> tuple[Step, CodecSpec | None]:
    """One message's step, and the codec it tells if it is a start message."""
    entry = msgspec.json.decode(line, type=_MessageLine)
    text = entry.base64 if entry.text is None else entry.text.encode()
    if text is None or None not in (entry.text, entry.base64):
        raise ValueError("expected either `text` or `base64`")
    if not not_before <= entry.t < math.inf:
        raise ValueError(f"`t` is {entry.t:g}, earlier than the line before")
    media, codec = False, None
    with contextlib.suppress(BadMessage, CodecError):
        message = wire.decode(text)
        media = isinstance(message, wire.Media)
        if isinstance(message, wire.Start) and (told := message.start.media_format) and told.sample_rate:
            codec = CodecSpec.from_media_format(told.encoding, told.sample_rate, told.channels)
    return Step(entry.t, text, media), codec

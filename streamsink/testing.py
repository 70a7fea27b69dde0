"""A harness for people who write processors: a whole call, through the real session, in a fraction of its time.

result = await run_processor(Answer(), "question.wav", silence_seconds=5)
assert len(result.played) > 0
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import numpy as np
import soundfile

from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec, Resampler
from streamsink.config import Pipeline, Settings, SpeechSettings
from streamsink.endpoint import Endpoint
from streamsink.errors import ProcessorError
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin
from streamsink.processor import MarkOutcome, Processor
from streamsink.session import Session
from streamsink.speech.synthesis import Spoken, Synthesizer
from streamsink.stream import Stream
from streamsink.wire import PlatformWriter, decode_endpoint

if TYPE_CHECKING:
    from streamsink.speech.events import Speaker, Speech, Transcript
    from streamsink.status import StatusEvent

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

SPEED = 20
"""How much faster than life a call goes; what other threads do while it waits is given that share of the time."""
THREAD_TAKES = 1.0
"""Seconds that a thread's work lasts before the call goes on meanwhile."""
_RESOLUTION = 1e-6
"""Seconds."""


@dataclass(frozen=True)
class Dtmf:
    """A participant presses a digit, ``at`` seconds into the call."""

    at: float
    digit: str
    duration_ms: int = 200


@dataclass(frozen=True)
class Loss:
    """The messages of ``seconds``, from ``at`` seconds into the call, never arrive."""

    at: float
    seconds: float


@dataclass(frozen=True)
class Mark:
    """A mark of the processor's as the far end saw it: passed, or dropped by a clear, ``at`` seconds into the call."""

    name: str
    at: float
    outcome: MarkOutcome


@dataclass(frozen=True)
class Result:
    """What the far end got.

    Attributes:
        sample_rate: Hz, of the arrays: the codec's.
        played: What it played, back to back, shape ``(n,)``, int16.
        heard: The same where it belongs in the call, silence where nothing was played, from the call's start on.
        marks: In the order in which they were passed or cleared.
        dtmf: The digits sent.
        clears: How often what was queued was dropped.
        dropped: Frames a function was too slow to read.
        close_code: WebSocket close code the stream ended with.
        close_reason: The words that came with it.
    """

    sample_rate: int
    played: Samples
    heard: Samples
    marks: list[Mark]
    dtmf: str
    clears: int
    dropped: int
    close_code: int
    close_reason: str


async def run_processor(
    processor: Processor,
    audio: Samples | str | Path,
    sample_rate: int | None = None,
    *,
    codec: str | None = None,
    tracks: Sequence[Track] | None = None,
    custom_parameters: Mapping[str, Any] | None = None,
    name: str | None = None,
    events: Sequence[Dtmf | Loss] = (),
    silence_seconds: float = 0.0,
    recordings: Path | None = None,
    speech: SpeechSettings | None = None,
) -> Result:
    """Play a call to one processor and tell what came back.

    The call runs on an event loop of its own whose time jumps from one thing to do to the next: ``asyncio.sleep(2)``
    in a processor lasts two seconds of the call. Frames are sent once ``on_start`` is over. Voice activity is detected
    by level, whatever engine the processor asks for. Time stands still while an engine synthesizes what
    ``stream.say`` is given, and, for a second at most, while a thread works (``asyncio.to_thread``,
    ``stream.play_file``).

    Args:
        processor: A new instance.
        audio: Int16, shape ``(n,)``, or ``(n, tracks)``; or a sound file.
        sample_rate: Hz of an array; a file knows its own.
        codec: How the call is encoded, such as ``PCMU@40i``; L16 at the audio's rate when not given. Audio is
            resampled to it.
        tracks: Whose voice each column is; inbound, then outbound, when not given.
        custom_parameters: As the stream gives them.
        name: The stream's name.
        events: What happens during the call.
        silence_seconds: How long the call goes on after the audio.
        recordings: ``stream.recordings``; a folder that is deleted afterwards when not given.
        speech: What speaks, where the processor says something; ``espeak`` when not given.

    Returns:
        What the far end got. It plays what it has, even when the call ends first.

    Raises:
        Exception: Whatever the processor raised, wherever it did.
        ProcessorError: The processor was retired without raising: it was too slow, or cancelled itself.
        CodecError: The codec is unknown, or the audio's rate is not one L16 can have.
        ValueError: The audio is not of that type or shape.
    """
    columns, rate = _read(audio, sample_rate)
    spec = CodecSpec.parse(codec or f"L16@{rate}h")
    voices = tuple(tracks or (Track.INBOUND, Track.OUTBOUND)[: len(columns)])
    if len(voices) != len(columns):
        raise ValueError(f"the audio has {len(columns)} columns for {len(voices)} tracks: wanted one a track")
    if rate != spec.rate:
        columns = [_resampled(column, rate, spec.rate) for column in columns]
    silence: Samples = np.zeros(round(silence_seconds * spec.rate), np.int16)
    voiced = {track: np.concatenate([column, silence]) for track, column in zip(voices, columns, strict=True)}
    with contextlib.ExitStack() as stack:
        folder = recordings or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        call = _Call(
            _Watched(processor),
            spec,
            voiced,
            dict(custom_parameters or {}),
            name,
            events,
            folder,
            speech or SpeechSettings(),
        )
        return await asyncio.to_thread(call.run)


def _read(audio: Samples | str | Path, sample_rate: int | None) -> tuple[list[Samples], int]:
    if isinstance(audio, str | Path):
        audio, sample_rate = soundfile.read(audio, dtype="int16")
    if sample_rate is None:
        raise ValueError("an array says nothing of its rate: give sample_rate, in Hz")
    if not isinstance(audio, np.ndarray) or audio.dtype != np.int16 or audio.ndim not in (1, 2):
        got = f"{audio.dtype} of shape {audio.shape}" if isinstance(audio, np.ndarray) else type(audio).__name__
        raise ValueError(f"audio is {got}; wanted int16 of shape (n,) or (n, tracks), or a file's path")
    return [np.ascontiguousarray(column) for column in np.atleast_2d(audio.T)], sample_rate


def _resampled(samples: Samples, rate_in: int, rate_out: int) -> Samples:
    resampler = Resampler(rate_in, rate_out)
    return np.concatenate([resampler.push(samples), resampler.flush()])


class _VirtualTime(selectors.DefaultSelector):
    """Lets time jump to the next timer when nothing else is ready, but waits a little for other threads first."""

    now = 0.0
    # While it is not nought, something is waited for that takes no time of the call's.
    held = 0

    def __init__(self) -> None:
        super().__init__()
        # What threads do, and until when the call waits for it, in real time.
        self._working: dict[asyncio.Future[Any], float] = {}

    def wait_for(self, work: asyncio.Future[Any]) -> None:
        """Have time stand still for what a thread does; not for ever, since it may be waiting for the call."""
        self._working[work] = time.monotonic() + THREAD_TAKES
        work.add_done_callback(self._working.pop)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        still = math.inf if self.held else max(self._working.values(), default=0.0) - time.monotonic()
        if timeout and still > 0:
            return super().select(min(timeout, still))
        ready = super().select(timeout and timeout / SPEED)
        if not ready and timeout:
            self.now += timeout
        return ready


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = _VirtualTime()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Arguments], _Result], *args: *_Arguments
    ) -> asyncio.Future[_Result]:
        work = super().run_in_executor(executor, func, *args)
        self.virtual.wait_for(work)
        return work


class _TimelessSynthesizer(Synthesizer):
    """Has the call's time stand still while the engine works, so that a text is heard when it was said."""

    def __init__(self, engine: Synthesizer, virtual: _VirtualTime) -> None:
        self._engine = engine
        self._virtual = virtual

    def check(self, voice: str | None) -> None:
        self._engine.check(voice)

    async def open(self) -> None:
        await self._engine.open()

    async def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
        async with contextlib.aclosing(self._engine.speak(text, voice)) as pieces:
            while True:
                self._virtual.held += 1
                try:
                    piece = await anext(pieces, None)
                finally:
                    self._virtual.held -= 1
                if piece is None:
                    return
                yield piece

    async def close(self) -> None:
        await self._engine.close()


class _Watched(Processor):
    """Hands everything to the processor and keeps what it raises."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.sample_rate = processor.sample_rate
        self.speaks = processor.speaks
        self.vad = processor.vad
        self.raised: Exception | None = None
        self.started = asyncio.Event()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.raised = self.raised or error
            raise

    async def on_start(self, stream: Stream) -> None:
        try:
            with self._watching():
                await self.processor.on_start(stream)
        finally:
            self.started.set()

    def on_frame(self, frame: Frame) -> None:
        with self._watching():
            self.processor.on_frame(frame)

    def on_played(self, frame: Frame) -> None:
        with self._watching():
            self.processor.on_played(frame)

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        with self._watching():
            self.processor.on_dtmf(digit, duration_ms)

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        with self._watching():
            self.processor.on_mark(name, outcome)

    def on_speech(self, event: Speech) -> None:
        with self._watching():
            self.processor.on_speech(event)

    def on_transcript(self, transcript: Transcript) -> None:
        with self._watching():
            self.processor.on_transcript(transcript)

    def on_speaker(self, event: Speaker) -> None:
        with self._watching():
            self.processor.on_speaker(event)

    def on_status(self, event: StatusEvent) -> None:
        with self._watching():
            self.processor.on_status(event)

    async def on_stop(self, reason: str) -> None:
        with self._watching():
            await self.processor.on_stop(reason)


class _Metrics(Metrics):
    retired = False

    def processor_error(self, processor: str) -> None:
        super().processor_error(processor)
        self.retired = True


@dataclass(frozen=True)
class _Ready(Plugin):
    """A processor that needs no finding."""

    instance: Processor

    def build(self) -> Processor:
        return self.instance


@dataclass
class _FarEnd:
    """What the platform does with what it gets: plays audio in order, sends marks back when it comes to them."""

    codec: CodecSpec
    loop: asyncio.AbstractEventLoop
    session: Session | None = None
    started_at: float = 0.0
    # When each stretch of audio begins to play, and the samples.
    audio: list[tuple[float, Samples]] = field(default_factory=list)
    playing_until: float = 0.0
    # When each mark is come to, and its name.
    waiting: deque[tuple[float, str]] = field(default_factory=deque)
    marks: list[Mark] = field(default_factory=list)
    dtmf: str = ""
    clears: int = 0
    close_code: int = 1000
    close_reason: str = ""

    def __post_init__(self) -> None:
        self.decoder = self.codec.decoder()
        self.writer = PlatformWriter("run_processor")

    def send(self, text: bytes) -> None:
        message = decode_endpoint(text)
        now = self.loop.time()
        if message.media is not None:
            samples = self.decoder.decode(message.media.payload)
            start = max(now, self.playing_until)
            self.audio.append((start, samples))
            self.playing_until = start + len(samples) / self.codec.rate
        elif message.mark is not None:
            self.waiting.append((max(now, self.playing_until), message.mark.name))
            self.loop.call_at(self.waiting[-1][0], self.pass_marks)
        elif message.dtmf is not None:
            self.dtmf += message.dtmf.digit
        else:
            self.clear(now)

    def clear(self, now: float) -> None:
        self.clears += 1
        played = [(start, samples[: max(0, round((now - start) * self.codec.rate))]) for start, samples in self.audio]
        self.audio = [(start, samples) for start, samples in played if len(samples)]
        self.playing_until = min(self.playing_until, now)
        while self.waiting:
            self.loop.call_soon(self.send_mark_back, self.waiting.popleft()[1], MarkOutcome.CLEARED)

    def pass_marks(self) -> None:
        # The loop calls a timer up to its clock's resolution early.
        while self.waiting and self.waiting[0][0] <= self.loop.time() + _RESOLUTION:
            self.send_mark_back(self.waiting.popleft()[1], MarkOutcome.PLAYED)

    def send_mark_back(self, name: str, outcome: MarkOutcome) -> None:
        now = self.loop.time()
        self.marks.append(Mark(name, now - self.started_at, outcome))
        assert self.session is not None
        self.session.receive(self.writer.mark(name), now)

    def limit_unsent(self, octets: int) -> None:
        """Nothing waits here."""

    def close(self, code: int, reason: str) -> None:
        self.close_code, self.close_reason = code, reason

    def result(self, dropped: int) -> Result:
        rate = self.codec.rate
        nothing: Samples = np.zeros(0, np.int16)
        places = [(round((start - self.started_at) * rate), samples) for start, samples in self.audio]
        heard: Samples = np.zeros(max((at + len(samples) for at, samples in places), default=0), np.int16)
        for at, samples in places:
            heard[at : at + len(samples)] = samples
        return Result(
            sample_rate=rate,
            played=np.concatenate([nothing, *(samples for _, samples in self.audio)]),
            heard=heard,
            marks=self.marks,
            dtmf=self.dtmf,
            clears=self.clears,
            dropped=dropped,
            close_code=self.close_code,
            close_reason=self.close_reason,
        )


@dataclass
class _Call:
    """The platform's side of one call."""

    watched: _Watched
    codec: CodecSpec
    voices: dict[Track, Samples]
    custom_parameters: dict[str, Any]
    name: str | None
    events: Sequence[Dtmf | Loss]
    recordings: Path
    speech: SpeechSettings

    def run(self) -> Result:
        loop = _VirtualLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(self.play(loop))

    async def play(self, loop: _VirtualLoop) -> Result:
        name = type(self.watched.processor).__name__
        # A thread that listens cannot keep up with a call this fast: the energy detector does it on the way.
        settings = Settings(
            pipelines={"default": Pipeline(processors=[name])},
            recordings=self.recordings,
            vad_streams=0,
            speech=self.speech,
        )
        plugin = _Ready(name, type(self.watched.processor), {}, self.watched)
        metrics = _Metrics()
        endpoint = Endpoint(settings, {"default": [plugin]}, metrics, loop)
        endpoint.synthesizer = _TimelessSynthesizer(endpoint.synthesizer, loop.virtual)
        far_end = _FarEnd(self.codec, loop)
        session = far_end.session = Session(
            endpoint,
            far_end,
            path="/",
            pipeline="default",
            client="run_processor",
            token_name="",
            now=loop.time(),
        )
        self.start(session, far_end.writer, loop)
        await self.watched.started.wait()
        far_end.started_at = loop.time()
        await self.talk(session, far_end.writer, loop)
        session.receive(far_end.writer.stop(), loop.time())
        await session.done.wait()
        await endpoint.synthesizer.close()
        if self.watched.raised is not None:
            raise self.watched.raised
        if metrics.retired:
            raise ProcessorError(f"`{name}` was retired, since it was too slow or cancelled itself; the log says where")
        return far_end.result(getattr(self.watched.processor, "dropped", 0))

    def start(self, session: Session, writer: PlatformWriter, loop: asyncio.AbstractEventLoop) -> None:
        session.receive(writer.connected(), loop.time())
        text = writer.start(
            account_sid="account",
            call_sid="call",
            encoding=self.codec.name,
            sample_rate=self.codec.rate,
            tracks=[track.value for track in self.voices],
            custom_parameters=self.custom_parameters,
            name=self.name,
        )
        session.receive(text, loop.time())

    async def talk(self, session: Session, writer: PlatformWriter, loop: asyncio.AbstractEventLoop) -> None:
        """Send every frame when it has been spoken, and every event at its time."""
        started_at = loop.time()
        encoders = {track: self.codec.encoder() for track in self.voices}
        size = self.codec.frame_samples
        keys = sorted((event for event in self.events if isinstance(event, Dtmf)), key=lambda event: event.at)
        losses = [event for event in self.events if isinstance(event, Loss)]
        frames = -(-max(map(len, self.voices.values())) // size)
        for number in range(frames):
            at = number * self.codec.ptime / 1000
            spoken = at + self.codec.ptime / 1000
            while keys and keys[0].at < spoken:
                key = keys.pop(0)
                await asyncio.sleep(started_at + key.at - loop.time())
                session.receive(writer.dtmf(key.digit, key.duration_ms), loop.time())
            await asyncio.sleep(started_at + spoken - loop.time())
            if session.ended:
                return
            for track, voice in self.voices.items():
                piece = voice[number * size : (number + 1) * size]
                payload = encoders[track].encode(np.pad(piece, (0, size - len(piece))))
                if not any(loss.at <= at < loss.at + loss.seconds for loss in losses):
                    message = writer.media(
                        payload, chunk=number + 1, timestamp_ms=number * self.codec.ptime, track=track.value
                    )
                    session.receive(message, loop.time())

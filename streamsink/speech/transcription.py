"""What a transcription engine is: the contract between the engines and whoever wants to know what was said.

    Engine.open(voice) ─ Recognition.push(audio) … finish() ─ async for event in recognition

An engine that finds the ends of utterances itself gets one recognition a track. Any other gets one an utterance, cut
out by voice activity detection. The event loop is the only thread that touches any of it.
"""

from __future__ import annotations

import abc
import asyncio
import importlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from streamsink.errors import SpeechError, StreamsinkError
from streamsink.speech.events import EngineError, SpeechEnded, SpeechStarted, Transcript

log = structlog.get_logger(__name__)

Encoding = Literal["linear16", "mulaw", "alaw"]
Event = SpeechStarted | Transcript | SpeechEnded | EngineError

ENGINES = {
    "pocketsphinx": "streamsink.speech.stt.pocketsphinx:Pocketsphinx",
    "sherpa-onnx": "streamsink.speech.stt.sherpa_onnx:SherpaOnnx",
    "vosk": "streamsink.speech.stt.vosk:Vosk",
    "faster-whisper": "streamsink.speech.stt.faster_whisper:FasterWhisper",
    "openai": "streamsink.speech.stt.openai:OpenAI",
    "deepgram": "streamsink.speech.stt.deepgram:Deepgram",
}
"""Engines by name; imported only when asked for."""


class EngineOptions(msgspec.Struct, frozen=True):
    """What a user may choose; an engine refuses what it cannot do.

    Attributes:
        language: BCP 47, such as ``en-US``; the engine's own choice when None.
        model: A path, or a name at a vendor's; the engine's own when None.
        grammar: A JSGF file: nothing but its sentences is recognised.
        keywords: Phrases to listen for.
        interim: Whether interim transcripts are wanted.
        workers: Processes or threads that transcribe; the engine's own choice when None.
        url: Where a vendor's service is, when it is not where it usually is.
    """

    language: str | None = None
    model: str | None = None
    grammar: Path | None = None
    keywords: tuple[str, ...] = ()
    interim: bool = True
    workers: int | None = None
    url: str | None = None


class Capabilities(msgspec.Struct, frozen=True):
    """What an engine can do.

    Attributes:
        rates: Hz it takes ``linear16`` at (``mulaw`` and ``alaw`` are always 8000), ascending.
        encodings: What it takes: ``linear16`` is int16, little-endian; ``mulaw`` and ``alaw`` are G.711.
        interim: Whether it tells words while they are spoken.
        words: Whether it tells each word's times.
        endpointing: Whether it finds the ends of utterances itself, and so takes a track whole.
    """

    rates: tuple[int, ...]
    encodings: tuple[Encoding, ...] = ("linear16",)
    interim: bool = False
    words: bool = False
    endpointing: bool = False


class Voice(msgspec.Struct):
    """What an engine is told of what it will hear.

    Attributes:
        encoding: Of the audio pushed; one the engine takes.
        rate: Hz of the audio pushed; one the engine takes.
        call_rate: Hz of the call's own audio before it was resampled: at 8000 there is nothing above 4 kHz.
        memory: The engine's own notes on this track, kept from one recognition to the next.
    """

    encoding: Encoding
    rate: int
    call_rate: int
    memory: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def octets_per_second(self) -> int:
        """Of the audio pushed."""
        return self.rate * (2 if self.encoding == "linear16" else 1)


class Engine(abc.ABC):
    """What makes words of audio; one serves all streams that chose it with the same options.

    Making one checks what it needs (a package, a path, a key) and loads nothing; that must be quick.

    Args:
        options: What the user chose.

    Raises:
        SpeechError: Something is missing or cannot be done; one sentence that names the remedy.

    Attributes:
        capabilities: What it can do, with these options.
    """

    capabilities: Capabilities

    @abc.abstractmethod
    def __init__(self, options: EngineOptions) -> None: ...

    def check(self) -> None:  # noqa: B027  # an engine may have nothing to check
        """See at the endpoint's start, for as long as that takes, whether what was given can be used; may block.

        Raises:
            SpeechError: It cannot; the message says what is wrong.
        """

    async def start(self) -> None:  # noqa: B027 most have nothing to do
        """Load what must be loaded, off the event loop; once, before the first :meth:`open`.

        Raises:
            SpeechError: It cannot be loaded.
        """

    @abc.abstractmethod
    def open(self, voice: Voice) -> Recognition:
        """Begin to listen; on the event loop, at once."""

    async def close(self) -> None:  # noqa: B027 most have nothing to do
        """Let go of everything; every recognition is over by then."""


class Feed:
    """Audio on its way to an engine: bounded, the oldest is dropped when the engine does not keep up.

    Iterating gives ``(at, audio)``: audio as it was pushed, and how many seconds had been pushed before it, those that
    were dropped too. Ends after :meth:`end`, when all is read. For one reader.

    Args:
        octets_per_second: Of the audio.
        limit: Seconds it holds.

    Attributes:
        seconds: What was pushed so far.
        dropped: Seconds of it that were dropped.
    """

    def __init__(self, octets_per_second: int, limit: float) -> None:
        self.seconds = 0.0
        self.dropped = 0.0
        self._octets_per_second = octets_per_second
        self._limit = limit
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> float:
        """Seconds from the oldest audio that was not read yet to the newest."""
        return self.seconds - self._waiting[0][0] if self._waiting else 0.0

    def put(self, audio: bytes) -> None:
        """Add audio."""
        self._waiting.append((self.seconds, audio))
        self.seconds += len(audio) / self._octets_per_second
        while self.waiting > self._limit:
            _, oldest = self._waiting.popleft()
            self.dropped += len(oldest) / self._octets_per_second
        self._changed.set()

    def end(self) -> None:
        """Nothing more is pushed."""
        self._ended = True
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[tuple[float, bytes]]:
        return self

    async def __anext__(self) -> tuple[float, bytes]:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()


class Recognition(abc.ABC):
    """Audio pushed in, events coming out: one utterance, or a whole track where the engine does its own endpointing.

    An engine writes :meth:`run`. All its times are seconds since the first sample pushed, counting what the feed
    dropped; whoever opened it places them on the media clock. ``utterance`` need only tell utterances apart; it,
    ``revision``, ``track`` and ``speaker`` are filled in later. A final of an utterance ends it; one that has none when
    :meth:`run` returns or raises is marked as a hole.

    Args:
        voice: What will be heard.

    Attributes:
        audio: What was pushed; for :meth:`run`.
        most_waiting: Seconds of audio that wait for the engine at most; what is older is dropped.
    """

    most_waiting: float = 30.0

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self.audio = Feed(voice.octets_per_second, self.most_waiting)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._running = asyncio.ensure_future(self._run())
        # Also when it is cancelled before it began.
        self._running.add_done_callback(lambda _: self._events.put_nowait(None))

    @abc.abstractmethod
    async def run(self) -> None:
        """Read :attr:`audio` to its end and :meth:`emit` what was said; return when the last final is out.

        Raises:
            StreamsinkError: The engine cannot go on; the message becomes an ``EngineError`` that is not recoverable.
        """

    def emit(self, event: Event) -> None:
        """Tell an event."""
        self._events.put_nowait(event)

    def push(self, audio: bytes) -> None:
        """Give audio, in the voice's encoding; never blocks."""
        self.audio.put(audio)

    def finish(self) -> None:
        """No more audio comes: the events that are owed still do, and then the iteration ends."""
        self.audio.end()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event

    async def close(self) -> None:
        """Give up, whatever is owed; the iteration ends."""
        self._running.cancel()
        await asyncio.wait({self._running})

    async def _run(self) -> None:
        try:
            await self.run()
        except StreamsinkError as error:
            self.emit(EngineError(str(error), recoverable=False))
        except Exception as error:
            # Not its words: an engine's own errors may quote what was said.
            log.error("a transcription engine raised", error=type(error).__name__)
            self.emit(EngineError(f"the engine raised {type(error).__name__}", recoverable=False))


def find_engine(name: str, options: EngineOptions) -> Engine:
    """Find an engine and check that it can work; nothing is loaded.

    Args:
        name: One of :data:`ENGINES`, or ``package.module:Name`` of an :class:`Engine`.
        options: What the user chose.

    Raises:
        SpeechError: There is no such engine, or it lacks something; one sentence that names the remedy.
    """
    where = ENGINES.get(name, name)
    module, colon, attribute = where.partition(":")
    if not colon:
        known = ", ".join(ENGINES)
        raise SpeechError(f"there is no engine `{name}`; there are {known}, or write package.module:Name")
    try:
        engine = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpeechError(f"the engine `{name}` cannot be imported: {error}") from error
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise SpeechError(
            f"`{name}` is no engine: it must be a class derived from streamsink.speech.transcription.Engine"
        )
    return engine(options)

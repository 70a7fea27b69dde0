"""Transcribe: what was said on each track, told to the stream's other processors and kept in files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from streamsink.audio import Frame, Track
from streamsink.delivery import check_url
from streamsink.errors import SpeechError
from streamsink.processor import Processor
from streamsink.processors.transcript import Line, TranscriptPart, line_of
from streamsink.speech.diarization import Diarization, find_diarizer
from streamsink.speech.events import EngineError, Speech, SpeechChange, SpeechEnded, Transcript, VadSettings
from streamsink.speech.shared import Shared
from streamsink.speech.transcriber import Transcriber
from streamsink.speech.transcription import Engine, EngineOptions, Event, find_engine
from streamsink.speech.transcription_counts import counts
from streamsink.stem import reserve
from streamsink.stream import Stream

log = structlog.get_logger(__name__)

PATIENCE = 6.0
"""Seconds for what is owed when the stream ends; with the files it stays within what ``on_stop`` may take."""
LOADING = 8.0
"""Seconds the stream's start waits for an engine to load; with one that takes longer it begins without."""

_engines: Shared[Engine] = Shared()


class Transcribe(Processor):
    """Transcribes the stream: JSON lines as people speak, WebVTT and SubRip when it is over.

    Args:
        engine: ``pocketsphinx``, ``sherpa-onnx``, ``vosk``, ``faster-whisper``, ``openai``, ``deepgram``, or
            ``package.module:Name`` of your own.
        language: BCP 47, such as ``en-US``.
        model: A path, or a name at a vendor's.
        grammar: A JSGF file: nothing but its sentences is recognised.
        keywords: Phrases to listen for, with commas between.
        interim: Whether other processors get words while they are spoken.
        workers: Processes that transcribe; one less than there are cores.
        url: Where a vendor's service is, when it is not where it usually is.
        webhook: The ``https://`` URL that is told of each final transcript.
        diarization: ``package.module:Name`` of what tells voices of one track apart.
        vad: What finds the ends of utterances for an engine that does not.
        threshold: Probability from which it takes sound for speech.
        energy_dbfs: Level from which it does, for ``energy``.
        speech_ms: Speech must last so long to begin an utterance.
        hangover_ms: Silence must last so long to end one.
        directory: Where the files go; the endpoint's recordings folder when not given.

    Raises:
        SpeechError: The engine lacks something or cannot do what is asked; the sentence names the remedy.
        ConfigError: Nothing can be told to the webhook's URL.
    """

    speaks = False

    def __init__(
        self,
        engine: str = "pocketsphinx",
        language: str | None = None,
        model: str | None = None,
        grammar: Path | None = None,
        keywords: str = "",
        interim: bool = True,
        workers: int | None = None,
        url: str | None = None,
        webhook: str | None = None,
        diarization: str | None = None,
        vad: Literal["auto", "silero", "energy"] = "auto",
        threshold: float = 0.5,
        energy_dbfs: float = -45.0,
        speech_ms: int = 60,
        hangover_ms: int = 400,
        directory: Path | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise SpeechError(f"workers is {workers}; wanted 1 or more")
        if webhook is not None:
            check_url(webhook)
        self._webhook = webhook
        self._engine_name = engine
        self._options = EngineOptions(
            language=language,
            model=model,
            grammar=grammar,
            keywords=tuple(phrase for part in keywords.split(",") if (phrase := part.strip())),
            interim=interim,
            workers=workers,
            url=url,
        )
        # What is missing is told now; what is loaded is shared.
        found = find_engine(engine, self._options)
        found.check()
        capabilities = found.capabilities
        self._find_diarizer = None if diarization is None else find_diarizer(diarization)
        if not capabilities.endpointing:
            self.vad = VadSettings(vad, threshold, energy_dbfs, speech_ms, hangover_ms)
        self._directory = directory
        # None while it is loading.
        self._engine: Engine | None = None
        self._transcribers: dict[Track, Transcriber] = {}
        self._diarizations: dict[Track, Diarization] = {}
        # Who talks on a track that has no transcriber yet.
        self._talking: dict[Track, Speech] = {}
        # Seconds of each track that went by while the engine was loading.
        self._missed: dict[Track, float] = {}
        # When the talker of an utterance stopped, until its final comes.
        self._ends: dict[tuple[Track, int], float] = {}
        self._finals: asyncio.Queue[Transcript | None] = asyncio.Queue()

    async def on_start(self, stream: Stream) -> None:
        """Make the file and load the engine.

        Raises:
            SpeechError: The engine cannot be loaded.
            OSError: The file cannot be made.
        """
        self._stream = stream
        self._log = log.bind(stream=stream.sid, call=stream.call_sid)
        self._clock = asyncio.get_running_loop().time
        key = (self._engine_name, self._options)
        self._use = _engines.take(key, lambda: find_engine(*key))
        self._loading = asyncio.ensure_future(self._use.ready())
        try:
            await asyncio.wait({self._loading}, timeout=LOADING)
            if self._loading.done():
                self._engine = self._loading.result()
            self._part = await asyncio.to_thread(self._open)
        except BaseException:
            self._loading.cancel()
            self._use.end()
            raise
        self._keeping = asyncio.ensure_future(self._keep())

    def _open(self) -> TranscriptPart:
        stream = self._stream
        if self._directory is None:
            try:
                return TranscriptPart(stream.recordings, stream.stem, shared="record" in stream.processors)
            except FileExistsError:
                # Another engine transcribes this stream too.
                pass
        directory = self._directory or stream.recordings
        stem = reserve(directory, stream.started_at, stream.name or stream.sid)
        return TranscriptPart(directory, stem, shared=False)

    def on_frame(self, frame: Frame) -> None:
        """Give the track's engine the frame.

        Raises:
            SpeechError: The engine could not be loaded.
            OSError: A transcript could not be kept.
        """
        if self._keeping.done():
            self._keeping.result()
        if self._engine is None:
            if not self._loading.done():
                self._missed[frame.track] = (frame.start + len(frame.samples)) / frame.sample_rate
                return
            self._engine = self._loading.result()
            self._tell_missed()
        transcriber = self._transcribers.get(frame.track)
        if transcriber is None:
            transcriber = self._begin(self._engine, frame)
        if self._find_diarizer is not None:
            self._diarizations[frame.track].frame(frame)
        transcriber.frame(frame)
        if frame.track in self._talking:
            # Somebody began while the engine was loading.
            transcriber.speech(self._talking.pop(frame.track))

    def _begin(self, engine: Engine, frame: Frame) -> Transcriber:
        track = frame.track
        if self._find_diarizer is not None:
            self._diarizations[track] = Diarization(self._find_diarizer, track.value)
        transcriber = self._transcribers[track] = Transcriber(
            engine, track, frame.sample_rate, self._stream.codec.name, self._heard, self._clock
        )
        return transcriber

    def _tell_missed(self) -> None:
        """What was said while the engine was loading is a hole."""
        self._log.warning("nothing was transcribed while the engine was loading", seconds=self._missed)
        for track, end in self._missed.items():
            self._finals.put_nowait(Transcript(-1, 0, "", True, 0.0, end, track=track, dropped=True))

    def on_speech(self, event: Speech) -> None:
        """A talker started or stopped: begin or end an utterance."""
        transcriber = self._transcribers.get(event.track)
        if transcriber is not None:
            transcriber.speech(event)
        elif event.change is SpeechChange.STARTED:
            self._talking[event.track] = event
        else:
            self._talking.pop(event.track, None)

    def _heard(self, event: Event) -> None:
        """Take what an engine says, in order, on the media clock."""
        match event:
            case Transcript(final=False):
                self._stream.transcribed(msgspec.structs.replace(event, speaker=event.track.value))
            case Transcript():
                self._final(event)
            case SpeechEnded():
                self._ends[event.track, event.utterance] = event.at
            case EngineError():
                self._log.warning("transcription failed", cause=event.message, goes_on=event.recoverable)

    def _final(self, transcript: Transcript) -> None:
        end = self._ends.pop((transcript.track, transcript.utterance), transcript.end)
        if transcript.dropped:
            counts.dropped["utterance"] += 1
        elif not transcript.text and not transcript.revision:
            # A noise: nobody was told anything of it yet.
            return
        else:
            counts.finals[self._engine_name] += 1
            counts.answered(self._transcribers[transcript.track].ago(end))
        if not self._diarizations:
            # At once: nothing else is to be found out.
            transcript = msgspec.structs.replace(transcript, speaker=transcript.track.value)
            self._stream.transcribed(transcript)
        self._finals.put_nowait(transcript)

    async def _keep(self) -> None:
        """Name the speaker of each final transcript and keep it."""
        while (transcript := await self._finals.get()) is not None:
            if not transcript.speaker:
                transcript = await self._named(transcript)
            line = line_of(transcript)
            await asyncio.to_thread(self._part.append, [line])
            if self._webhook is not None:
                self._stream.delivery.post(self._webhook, self._told(line))

    def _told(self, line: Line) -> dict[str, Any]:
        stream = self._stream
        return {
            "event": "transcript",
            "stream_sid": stream.sid,
            "call_sid": stream.call_sid,
            "name": stream.name,
            "file": self._part.path.name,
            **msgspec.to_builtins(line),
        }

    async def _named(self, transcript: Transcript) -> Transcript:
        speaker = transcript.track.value
        diarization = self._diarizations.get(transcript.track)
        if diarization is not None and transcript.text:
            speaker = await diarization.speaker(transcript.start, transcript.end)
        transcript = msgspec.structs.replace(transcript, speaker=speaker)
        self._stream.transcribed(transcript)
        return transcript

    async def on_stop(self, reason: str) -> None:
        """Wait for what is owed, then write the files.

        Raises:
            OSError: They cannot be written.
        """
        self._loading.cancel()
        try:
            await asyncio.gather(*(transcriber.finish(PATIENCE) for transcriber in self._transcribers.values()))
        finally:
            self._use.end()
            self._finals.put_nowait(None)
            try:
                await self._keeping
            finally:
                await asyncio.to_thread(self._part.finish)
        self._log.info("transcribed", file=self._part.path.name)

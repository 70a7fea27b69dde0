"""Deepgram, by its live WebSocket: https://developers.deepgram.com/reference/speech-to-text/listen-streaming.

It finds the ends of utterances itself: a result that is ``speech_final``, or ``UtteranceEnd`` where noise hides the
pause (https://developers.deepgram.com/docs/understand-end-of-speech-detection).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import urlencode

import msgspec

from streamsink.errors import SpeechError
from streamsink.speech.events import SpeechEnded, SpeechStarted, Transcript, Word
from streamsink.speech.stt.link import Dialect, LinkRecognition, Timeline, read_key, service_url
from streamsink.speech.transcription import Capabilities, Engine, EngineOptions, Event, Voice

URL = "wss://api.deepgram.com/v1/listen"
MODEL = "nova-3"
ENDPOINTING_MS = 300
"""Silence that ends an utterance."""
UTTERANCE_END_MS = 1000
"""A gap between words that ends one where there is no silence; the least that Deepgram takes."""


class _Word(msgspec.Struct):
    word: str
    start: float
    end: float
    confidence: float | None = None
    punctuated_word: str | None = None


class _Alternative(msgspec.Struct):
    transcript: str = ""
    words: list[_Word] = []
    languages: list[str] | None = None


class _Channel(msgspec.Struct):
    alternatives: list[_Alternative] = []


class _Message(msgspec.Struct):
    """Any message of Deepgram's; only Results have what follows the type."""

    type: str
    # Elsewhere a list of numbers.
    channel: msgspec.Raw = msgspec.Raw(b"{}")
    start: float = 0.0
    duration: float = 0.0
    is_final: bool = False
    speech_final: bool = False


class _Part(msgspec.Struct, frozen=True):
    """A stretch of an utterance, placed in the recognition's audio."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...]
    confidences: tuple[float, ...]
    language: str | None


_decode = msgspec.json.Decoder(_Message).decode
_decode_channel = msgspec.json.Decoder(_Channel).decode


class Deepgram(Engine):
    """Deepgram's live transcription; the key is in ``DEEPGRAM_API_KEY``."""

    capabilities = Capabilities(
        rates=(8000, 16000, 24000, 32000, 48000),
        encodings=("linear16", "mulaw", "alaw"),
        interim=True,
        words=True,
        endpointing=True,
    )

    def __init__(self, options: EngineOptions) -> None:
        if options.grammar is not None or options.workers is not None:
            raise SpeechError("deepgram has neither a grammar nor workers of ours: leave both options out")
        self._options = options
        self._url = service_url("deepgram", options.url, URL)
        self._key = read_key("deepgram", "DEEPGRAM_API_KEY")

    def open(self, voice: Voice) -> LinkRecognition:
        """Begin to listen to a track."""
        return LinkRecognition(voice, Live(self._options, voice, self._url, self._key))


class Live(Dialect):
    """What is said to Deepgram and what it answers, for one track."""

    vendor = "Deepgram"
    # It closes after 10 s without a word (https://developers.deepgram.com/docs/audio-keep-alive).
    keep_alive = '{"type":"KeepAlive"}'
    remedies = {  # noqa: RUF012
        401: "check the key in DEEPGRAM_API_KEY",
        402: "the account has no credit left",
        403: "the key in DEEPGRAM_API_KEY may not use this model",
    }

    def __init__(self, options: EngineOptions, voice: Voice, url: str, key: str) -> None:
        self._key = key
        self._language = options.language
        self._interim = options.interim
        query: list[tuple[str, str | int]] = [
            ("model", options.model or MODEL),
            ("encoding", voice.encoding),
            ("sample_rate", voice.rate),
            ("channels", 1),
            ("punctuate", "true"),
            # UtteranceEnd is only sent with these two.
            ("interim_results", "true"),
            ("vad_events", "true"),
            ("endpointing", ENDPOINTING_MS),
            ("utterance_end_ms", UTTERANCE_END_MS),
        ]
        if options.language is not None:
            query.append(("language", options.language))
        query += [("keyterm", phrase) for phrase in options.keywords]
        self.url = f"{url}?{urlencode(query)}"
        self._settled = 0.0
        self._closing = False
        self._timeline = Timeline()
        self._utterances = 0
        # The utterance that is open; the parts of it that are certain outlive a connection.
        self._open = False
        self._certain: list[_Part] = []
        self._started = 0.0
        self._revision = 0

    @property
    def settled(self) -> float:
        """The end of the last result that will not change."""
        return self._settled

    def headers(self) -> dict[str, str]:
        """The key."""
        return {"Authorization": f"Token {self._key}"}

    def open(self) -> Iterable[str]:
        """Nothing is said first: the URL has said it all. A new connection counts its time from zero."""
        self._timeline = Timeline()
        self._closing = self.done = False
        return ()

    def audio(self, audio: bytes, start: float, seconds: float) -> bytes:
        """Audio goes as it is."""
        self._timeline.add(start, seconds)
        return audio

    def close(self) -> str:
        """Have the rest transcribed; Metadata is the last answer."""
        self._closing = True
        return '{"type":"CloseStream"}'

    def received(self, message: str) -> Iterator[Event]:
        """Take a message."""
        told = _decode(message)
        if told.type == "Results":
            yield from self._results(told)
        elif told.type == "UtteranceEnd":
            # After a `speech_final` nothing is open, and before a word is certain the end is not.
            if self._certain:
                yield from self._final()
        elif told.type == "Metadata" and self._closing:
            if self._open:
                yield from self._final()
            self.done = True
        elif told.type == "Error":
            raise ConnectionError("an error message")

    def _results(self, told: _Message) -> Iterator[Event]:
        part = self._part(told)
        if part.text and not self._open:
            self._open = True
            self._started = part.start
            self._revision = 0
            yield SpeechStarted(self._utterances, part.start)
        if told.is_final:
            self._settled = max(self._settled, self._timeline.place(told.start + told.duration))
            if part.text:
                self._certain.append(part)
            if self._open and (told.speech_final or not self._certain):
                yield from self._final()
                return
        if part.text and self._interim:
            parts = self._certain if told.is_final else [*self._certain, part]
            yield self._transcript(parts, final=False)
            self._revision += 1

    def _part(self, told: _Message) -> _Part:
        alternatives = _decode_channel(told.channel).alternatives
        heard = alternatives[0] if alternatives else _Alternative()
        place = self._timeline.place
        words = tuple(
            Word(word.punctuated_word or word.word, place(word.start), place(word.end)) for word in heard.words
        )
        return _Part(
            text=heard.transcript.strip(),
            start=words[0].start if words else place(told.start),
            end=words[-1].end if words else place(told.start + told.duration),
            words=words,
            confidences=tuple(word.confidence for word in heard.words if word.confidence is not None),
            language=heard.languages[0] if heard.languages else self._language,
        )

    def _final(self) -> Iterator[Event]:
        last = self._transcript(self._certain, final=True)
        yield SpeechEnded(self._utterances, last.end)
        yield last
        self._utterances += 1
        self._open = False
        self._certain = []

    def _transcript(self, parts: list[_Part], *, final: bool) -> Transcript:
        confidences = [confidence for part in parts for confidence in part.confidences]
        return Transcript(
            utterance=self._utterances,
            revision=self._revision,
            text=" ".join(part.text for part in parts),
            final=final,
            start=self._started,
            end=parts[-1].end if parts else self._started,
            words=tuple(word for part in parts for word in part.words),
            confidence=sum(confidences) / len(confidences) if confidences else None,
            language=parts[-1].language if parts else self._language,
        )

"""OpenAI's realtime transcription, by its WebSocket: https://developers.openai.com/api/docs/guides/realtime-transcription.

Most models find the ends of turns themselves (``server_vad``) and get a track whole. The two that tell words while they
are spoken do not: those get an utterance a connection, cut out by our own voice activity detection.
"""

from __future__ import annotations

import abc
import base64
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, SpeechEnded, SpeechStarted, Transcript
from streamsink.speech.stt.link import Dialect, LinkRecognition, Refused, Timeline, read_key, service_url
from streamsink.speech.transcription import Capabilities, Engine, EngineOptions, Event, Voice

URL = "wss://api.openai.com/v1/realtime"
MODEL = "gpt-transcribe"
WITHOUT_TURNS = ("gpt-live-transcribe", "gpt-realtime-whisper")
"""Models that find no ends of turns."""
WITH_KEYWORDS = ("gpt-transcribe", "gpt-live-transcribe")
"""Models that take phrases to expect, and a list of languages where others take one."""
PREFIX_MS, SILENCE_MS = 300, 500
"""What the server puts in a turn before speech, and the silence that ends one."""
UNHEARD = 3.0
"""Seconds; the server may not have told yet of speech that began so long ago."""
LEAST_COMMIT = 0.1
"""Seconds of audio below which a commit is an error."""

_HOPELESS = {
    "invalid_api_key": "check the key in OPENAI_API_KEY",
    "insufficient_quota": "the account has no credit left",
    "model_not_found": "check the model",
}
_FORMATS = {
    "linear16": {"type": "audio/pcm", "rate": 24000},
    "mulaw": {"type": "audio/pcmu"},
    "alaw": {"type": "audio/pcma"},
}
_CODE = re.compile(r"[a-z0-9_.]{1,64}")


class _Error(msgspec.Struct):
    type: str | None = None
    code: str | None = None

    @property
    def word(self) -> str:
        """A word for the cause that is fit for a message."""
        word = self.code or self.type or ""
        return word if _CODE.fullmatch(word) else "an error"


class _Language(msgspec.Struct):
    code: str


class _Message(msgspec.Struct):
    """Any message of OpenAI's; each has some of these."""

    type: str
    item_id: str = ""
    audio_start_ms: float = 0.0
    audio_end_ms: float = 0.0
    delta: str | None = None
    transcript: str = ""
    languages: list[_Language] | None = None
    error: _Error | None = None


class _Turn(msgspec.Struct):
    """A turn that has no final transcript yet.

    Attributes:
        utterance: Its number.
        heard: Where the server's audio of it begins, with what it put before the speech.
        start: Where its speech begins.
        end: Where its speech ends; None while it goes on.
        until: Where the server's audio of it ends, once that is known.
        text: What was told of it.
        revision: Interims told.
    """

    utterance: int
    heard: float
    start: float
    end: float | None = None
    until: float = 0.0
    text: str = ""
    revision: int = 0


_decode = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.encode


class OpenAI(Engine):
    """OpenAI's realtime transcription; the key is in ``OPENAI_API_KEY``."""

    def __init__(self, options: EngineOptions) -> None:
        if options.grammar is not None or options.workers is not None:
            raise SpeechError("openai has neither a grammar nor workers of ours: leave both options out")
        self._model = options.model or MODEL
        if options.keywords and self._model not in WITH_KEYWORDS:
            raise SpeechError(
                f"{self._model} takes no keywords: choose {' or '.join(WITH_KEYWORDS)}, or leave them out"
            )
        self._options = options
        self._url = service_url("openai", options.url, URL)
        self._key = read_key("openai", "OPENAI_API_KEY")
        self.capabilities = Capabilities(
            rates=(24000,),
            encodings=("linear16", "mulaw", "alaw"),
            interim=True,
            endpointing=self._model not in WITHOUT_TURNS,
        )

    def open(self, voice: Voice) -> LinkRecognition:
        """Begin to listen, to a track or to an utterance of one."""
        session = Turns if self.capabilities.endpointing else Utterance
        return LinkRecognition(voice, session(self._options, self._model, voice, self._url, self._key))


class _Session(Dialect):
    """What is said to OpenAI alike for all models."""

    vendor = "OpenAI"
    remedies = {  # noqa: RUF012
        401: "check the key in OPENAI_API_KEY",
        403: "the key in OPENAI_API_KEY may not be used for this, or not from here",
        404: "check the model",
    }

    def __init__(self, options: EngineOptions, model: str, voice: Voice, url: str, key: str) -> None:
        # A model in the URL would make it a conversation, which cannot be turned into a transcription.
        self.url = f"{url}?intent=transcription"
        self._key = key
        self._interim = options.interim
        self._language = options.language
        self._model = model
        self._configured = False
        # Updates of the session that the server has not answered.
        self._updates = 0
        transcription: dict[str, Any] = {"model": model}
        if options.language is not None:
            language = options.language.partition("-")[0].lower()
            transcription |= {"languages": [language]} if model in WITH_KEYWORDS else {"language": language}
        if options.keywords:
            transcription["keywords"] = options.keywords
        self._input = {"format": _FORMATS[voice.encoding], "transcription": transcription, "turn_detection": None}

    def headers(self) -> dict[str, str]:
        """The key."""
        return {"Authorization": f"Bearer {self._key}"}

    def open(self) -> Iterable[str]:
        """Tell what the session is; the server's answer is ``session.updated``."""
        self._configured = False
        self._updates = 1
        session = {"type": "transcription", "audio": {"input": self._input}}
        return (_encode({"type": "session.update", "session": session}).decode(),)

    def audio(self, audio: bytes, start: float, seconds: float) -> str:
        """Audio goes as base64."""
        return f'{{"type":"input_audio_buffer.append","audio":"{base64.b64encode(audio).decode()}"}}'

    def received(self, message: str) -> Iterator[Event]:
        """Take a message."""
        told = _decode(message)
        if told.type == "error":
            self._error(told.error or _Error())
            # It may be the answer to one.
            self._updates = 0
        elif told.type == "session.updated":
            self._configured = True
            self._updates -= 1
        else:
            yield from self._told(told)

    @abc.abstractmethod
    def _told(self, told: _Message) -> Iterator[Event]: ...

    def _error(self, error: _Error) -> None:
        """Most errors leave the session open (https://developers.openai.com/api/reference/resources/realtime)."""
        remedy = _HOPELESS.get(error.code or "")
        if remedy is None and not self._configured and error.type == "invalid_request_error":
            remedy = "check model and language"
        if remedy is not None:
            raise Refused(f"OpenAI refused with {error.word}: {remedy}")
        if (
            not self._configured
            or error.type == "server_error"
            or error.code in ("session_expired", "rate_limit_exceeded")
        ):
            raise ConnectionError(error.word)

    def _failure(self, error: _Error) -> EngineError:
        """One turn could not be transcribed."""
        if error.code in _HOPELESS:
            raise Refused(f"OpenAI refused with {error.word}: {_HOPELESS[error.code]}")
        return EngineError(f"OpenAI could not transcribe an utterance ({error.word})", recoverable=True)

    def _found(self, told: _Message) -> str | None:
        return told.languages[0].code if told.languages else self._language


class Turns(_Session):
    """A track whole: the server finds the turns."""

    def __init__(self, options: EngineOptions, model: str, voice: Voice, url: str, key: str) -> None:
        super().__init__(options, model, voice, url, key)
        self._input["turn_detection"] = {
            "type": "server_vad",
            "prefix_padding_ms": PREFIX_MS,
            "silence_duration_ms": SILENCE_MS,
        }
        self._timeline = Timeline()
        self._turns: dict[str, _Turn] = {}
        self._utterances = 0
        # Turns whose connection failed: their audio is sent again, from the floor on.
        self._again: deque[_Turn] = deque()
        self._floor = 0.0
        self._heard = 0.0
        # Whether no more audio comes, and whether the server has told what it made of the last.
        self._closing = self._flushed = False

    @property
    def settled(self) -> float:
        """Up to where no audio is needed any more."""
        if self._again:
            return self._floor
        if self._turns:
            return max(self._floor, min(turn.heard for turn in self._turns.values()))
        return max(self._floor, self._heard, self._timeline.place(self._timeline.sent) - UNHEARD)

    def open(self) -> Iterable[str]:
        """A new session counts its time from zero."""
        self._floor = self.settled
        self._again.extend(self._turns.values())
        self._turns = {}
        self._timeline = Timeline()
        self._closing = self._flushed = self.done = False
        return super().open()

    def audio(self, audio: bytes, start: float, seconds: float) -> str:
        """Audio goes as base64."""
        self._timeline.add(start, seconds)
        return super().audio(audio, start, seconds)

    def close(self) -> str:
        """Have an answer that comes after whatever the server tells of the audio: to an update of nothing."""
        self._closing = True
        self._updates += 1
        return '{"type":"session.update","session":{"type":"transcription"}}'

    def reply(self) -> str | None:
        """End the turn that is still open when all audio was heard. What is no turn by then was silence."""
        if not self._closing or self._flushed or self._updates > 0:
            return None
        self._flushed = True
        self._set_done()
        speaking = any(turn.end is None for turn in self._turns.values())
        return '{"type":"input_audio_buffer.commit"}' if speaking else None

    def _set_done(self) -> None:
        self.done = self._flushed and not self._turns

    def _told(self, told: _Message) -> Iterator[Event]:
        if told.type == "input_audio_buffer.speech_started":
            yield from self._started(told)
        elif told.type == "input_audio_buffer.speech_stopped":
            yield from self._stopped(told)
        elif told.type == "input_audio_buffer.committed":
            self._committed(told)
        elif told.item_id in self._turns:
            yield from self._transcribed(told, self._turns[told.item_id])

    def _started(self, told: _Message) -> Iterator[Event]:
        heard = self._timeline.place(told.audio_start_ms / 1000)
        start = heard + PREFIX_MS / 1000 if told.audio_start_ms else heard
        if self._again:
            before = self._again.popleft()
            self._turns[told.item_id] = _Turn(before.utterance, heard, before.start, revision=before.revision)
            return
        self._turns[told.item_id] = _Turn(self._utterances, heard, start)
        yield SpeechStarted(self._utterances, start)
        self._utterances += 1

    def _stopped(self, told: _Message) -> Iterator[Event]:
        turn = self._turns.get(told.item_id)
        if turn is not None:
            turn.until = self._timeline.place(told.audio_end_ms / 1000)
            turn.end = max(turn.start, turn.until - SILENCE_MS / 1000)
            yield SpeechEnded(turn.utterance, turn.end)

    def _committed(self, told: _Message) -> None:
        """A turn that we ended ourselves gets another id."""
        if told.item_id in self._turns:
            return
        for item, turn in self._turns.items():
            if turn.end is None:
                turn.end = turn.until = self._timeline.place(self._timeline.sent)
                self._turns[told.item_id] = self._turns.pop(item)
                return

    def _transcribed(self, told: _Message, turn: _Turn) -> Iterator[Event]:
        kind = told.type.removeprefix("conversation.item.input_audio_transcription.")
        if kind == "delta":
            turn.text += told.delta or ""
            if self._interim and turn.text.strip():
                yield self._transcript(turn, turn.text, final=False)
                turn.revision += 1
        elif kind == "completed":
            yield self._transcript(turn, told.transcript, final=True, language=self._found(told))
            self._over(told.item_id)
        elif kind == "failed":
            yield self._failure(told.error or _Error())
            yield self._transcript(turn, "", final=True, dropped=True)
            self._over(told.item_id)

    def _over(self, item: str) -> None:
        self._heard = max(self._heard, self._turns.pop(item).until)
        self._set_done()

    def _transcript(
        self, turn: _Turn, text: str, *, final: bool, dropped: bool = False, language: str | None = None
    ) -> Transcript:
        return Transcript(
            utterance=turn.utterance,
            revision=turn.revision,
            text=text.strip(),
            final=final,
            start=turn.start,
            end=turn.end if turn.end is not None else max(turn.start, self._timeline.place(self._timeline.sent)),
            language=language or self._language,
            dropped=dropped,
        )


class Utterance(_Session):
    """One utterance, which we end."""

    def __init__(self, options: EngineOptions, model: str, voice: Voice, url: str, key: str) -> None:
        super().__init__(options, model, voice, url, key)
        self._sent = 0.0
        self._text = ""
        self._revision = 0

    @property
    def settled(self) -> float:
        """The utterance is kept whole until it is transcribed."""
        return 0.0

    def open(self) -> Iterable[str]:
        """A new connection hears the utterance from its start."""
        self._text = ""
        return super().open()

    def audio(self, audio: bytes, start: float, seconds: float) -> str:
        """Audio goes as base64."""
        self._sent = start + seconds
        return super().audio(audio, start, seconds)

    def close(self) -> str | None:
        """The utterance is over."""
        self.done = self._sent < LEAST_COMMIT
        return None if self.done else '{"type":"input_audio_buffer.commit"}'

    def _told(self, told: _Message) -> Iterator[Event]:
        kind = told.type.removeprefix("conversation.item.input_audio_transcription.")
        if kind == "delta":
            self._text += told.delta or ""
            if self._interim and self._text.strip():
                yield self._transcript(self._text, final=False, language=None)
                self._revision += 1
        elif kind == "completed":
            yield self._transcript(told.transcript, final=True, language=self._found(told))
            self.done = True
        elif kind == "failed":
            # Without a final, whoever opened this marks a hole.
            yield self._failure(told.error or _Error())
            self.done = True

    def _transcript(self, text: str, *, final: bool, language: str | None) -> Transcript:
        return Transcript(
            utterance=0,
            revision=self._revision,
            text=text.strip(),
            final=final,
            start=0.0,
            end=self._sent,
            language=language or self._language,
        )

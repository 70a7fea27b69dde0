"""What speech stages tell processors: values only."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from streamsink.audio import Track


class SpeechChange(enum.Enum):
    """What a voice activity detector noticed."""

    STARTED = "started"
    STOPPED = "stopped"


class Speech(msgspec.Struct, frozen=True):
    """A talker started or stopped.

    Attributes:
        change: Which of the two.
        at: When, in seconds on the track's media clock: the first or the last moment of speech, not of noticing it.
        track: On which track.
    """

    change: SpeechChange
    at: float
    track: Track


class VadSettings(msgspec.Struct, frozen=True):
    """What a processor asks of voice activity detection.

    Attributes:
        engine: ``silero`` (extra ``speech``), ``energy``, or ``auto``: the first where it can be had.
        threshold: Probability from which Silero calls a window speech, 0 to 1.
        energy_dbfs: Least level that the energy detector calls speech, dBFS.
        speech_ms: Speech must last so long before it has started.
        hangover_ms: Silence must last so long before speech has stopped.
    """

    engine: Literal["auto", "silero", "energy"] = "auto"
    threshold: float = 0.5
    energy_dbfs: float = -45.0
    speech_ms: int = 60
    hangover_ms: int = 400


class Word(msgspec.Struct, frozen=True):
    """A word of a transcript; times in seconds on the track's media clock."""

    word: str
    start: float
    end: float


class Transcript(msgspec.Struct, frozen=True):
    """What was said.

    Attributes:
        utterance: Number of the utterance on its track, from 0.
        revision: Rises with each interim; the final one has the highest.
        text: The words.
        final: Whether nothing more comes of this utterance; exactly one transcript of each is final.
        start: When it begins, in seconds on the track's media clock.
        end: When it ends, likewise.
        words: Each word with its times, where the engine tells.
        confidence: 0 to 1, where the engine tells.
        language: BCP 47, where the engine tells.
        track: Whose voice it is.
        speaker: A name for who spoke: the track's, unless a diarization engine knows better.
        dropped: Whether this marks a hole: somebody spoke, and nobody could transcribe it. It is final and has no text.
    """

    utterance: int
    revision: int
    text: str
    final: bool
    start: float
    end: float
    words: tuple[Word, ...] = ()
    confidence: float | None = None
    language: str | None = None
    track: Track = Track.INBOUND
    speaker: str = ""
    dropped: bool = False


class SpeechStarted(msgspec.Struct, frozen=True):
    """A transcription engine heard an utterance begin.

    Attributes:
        utterance: Its number, as its transcripts give it.
        at: When, in seconds on the track's media clock.
        track: On which track.
    """

    utterance: int
    at: float
    track: Track = Track.INBOUND


class SpeechEnded(msgspec.Struct, frozen=True):
    """A transcription engine heard an utterance end; its final transcript may follow or have come.

    Attributes:
        utterance: Its number, as its transcripts give it.
        at: When, in seconds on the track's media clock.
        track: On which track.
    """

    utterance: int
    at: float
    track: Track = Track.INBOUND


class EngineError(msgspec.Struct, frozen=True):
    """A transcription engine failed.

    Attributes:
        message: What happened and how to mend it; without a word of what was said.
        recoverable: Whether the engine goes on by itself; what it missed comes as a transcript that is ``dropped``.
        track: On which track.
    """

    message: str
    recoverable: bool
    track: Track = Track.INBOUND


class Speaker(msgspec.Struct, frozen=True):
    """Who is talking in a room has changed.

    Attributes:
        sid: streamSid of the member who is the active speaker now; None when nobody talks.
        name: That stream's friendly name.
        since: When, in seconds on the room's clock.
        level_dbfs: How loud, dBFS.
    """

    sid: str | None
    name: str | None
    since: float
    level_dbfs: float

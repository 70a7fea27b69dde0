"""Speech synthesis: the contract of an engine, and a text on its way to be played.

The engines are modules beside this one; each is imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NamedTuple

from streamsink.audio import Samples
from streamsink.errors import SpeechError
from streamsink.speech.sentences import can_be_spoken, sentences

if TYPE_CHECKING:
    from streamsink.config import SpeechSettings

_ENGINES = {
    "espeak": ("streamsink.speech.espeak", "Espeak"),
    "piper": ("streamsink.speech.piper", "Piper"),
    "command": ("streamsink.speech.command", "Command"),
}


class Spoken(NamedTuple):
    """A piece of speech.

    Attributes:
        samples: Mono PCM, shape ``(n,)``, int16; may be empty.
        sample_rate: Hz; the same for all pieces of a text.
        text_end: So many characters of the text have been spoken when the samples have been played.
    """

    samples: Samples
    sample_rate: int
    text_end: int


class Synthesizer(ABC):
    """An engine that speaks; one serves all streams of an endpoint. For the event loop only."""

    def check(self, voice: str | None) -> None:  # noqa: B027  # an engine may have nothing to check
        """See at once, without starting anything, what stands in the way of speaking.

        Raises:
            SpeechError: The extra, the program or the voice is missing; the message says how to mend it.
        """

    @abstractmethod
    async def open(self) -> None:
        """Get ready, so that the first text does not wait; :meth:`speak` does it where nobody has.

        Raises:
            SpeechError: The engine or its default voice cannot be had.
        """

    async def try_voice(self, voice: str) -> None:  # noqa: B027  # an engine may know only when it speaks
        """See whether there is a voice that a text will ask for, once :meth:`open` is over.

        Raises:
            SpeechError: There is none of that name.
        """

    @abstractmethod
    def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
        """Speak one sentence. Closing the generator cancels it.

        Args:
            text: What to say, free of control characters.
            voice: In the engine's own words; None is the setting, else the engine's default.

        Yields:
            The speech, as soon as it is there; the last piece's ``text_end`` is the text's length.

        Raises:
            SpeechError: There is no such voice, or the engine failed. The next text has an engine that works, where
                that can be.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything; nothing can be spoken any more."""


def build(settings: SpeechSettings) -> Synthesizer:
    """Make the engine the settings name; nothing is started yet."""
    module, name = _ENGINES[settings.synthesizer]
    engine: Synthesizer = getattr(importlib.import_module(module), name)(settings)
    return engine


class Utterance:
    """A text on its way to be played: an async iterable of PCM that is synthesized sentence by sentence, as it is read.

    Args:
        synthesizer: Speaks it.
        text: What to say, of any length.
        voice: As `Synthesizer.speak` takes it.

    Attributes:
        sample_rate: Hz; None until the first samples are there.
        heard: Pairs of a position, in samples, and the text whose last sound ends there; grows as it is read.

    Raises:
        SpeechError: It is no text, or the engine knows already that it cannot speak it.
    """

    def __init__(self, synthesizer: Synthesizer, text: str, voice: str | None = None) -> None:
        if not isinstance(text, str):
            raise SpeechError(f"say() wants a text as str, got {type(text).__name__}")
        if voice is not None and (not isinstance(voice, str) or not voice):
            raise SpeechError("say() wants a voice as str that is not empty, or None for the one in the settings")
        synthesizer.check(voice)
        self.sample_rate: int | None = None
        self.heard: list[tuple[int, str]] = []
        self._synthesizer = synthesizer
        self._text = text
        self._voice = voice
        # Samples given so far, and characters whose end is in `heard`.
        self._position = 0
        self._told = 0

    @property
    def silent(self) -> bool:
        """Whether there is nothing in it to be spoken."""
        return not can_be_spoken(self._text)

    async def __aiter__(self) -> AsyncGenerator[Samples, None]:
        for start, sentence in sentences(self._text):
            async with contextlib.aclosing(self._synthesizer.speak(sentence, self._voice)) as pieces:
                async for piece in pieces:
                    self._take(piece, start, sentence)
                    if len(piece.samples):
                        yield piece.samples

    def _take(self, piece: Spoken, start: int, sentence: str) -> None:
        if self.sample_rate is None:
            self.sample_rate = piece.sample_rate
        elif piece.sample_rate != self.sample_rate:
            raise SpeechError(f"the engine went from {self.sample_rate} to {piece.sample_rate} Hz within one text")
        self._position += len(piece.samples)
        # Without the space behind it: that belongs to what follows.
        spoken = sentence[: piece.text_end].rstrip()
        end = start + len(spoken)
        if spoken and end > self._told:
            self.heard.append((self._position, self._text[self._told : end]))
            self._told = end

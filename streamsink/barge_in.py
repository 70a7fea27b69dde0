"""Barge-in: a talker makes what we play quieter, and after a while ends it."""

from __future__ import annotations

from collections.abc import Callable

from streamsink.audio import Frame, Track
from streamsink.playback import Playback
from streamsink.playout import BargeIn
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.speech.vad import Listening

HANGOVER_MS = 250
"""Milliseconds of silence after which a talker has given up, and what we play is as loud as before."""


class Interrupter:
    """Listens to the inbound track while something plays that a talker may barge in on, and at no other time.

    Its frames have been through the :class:`~streamsink.speech.echo.EchoGate`, so what we play is no talker.

    Args:
        playback: What is played.
        listening: Makes what listens.
        clear: Drops all that is queued, here and at the far end.
    """

    def __init__(self, playback: Playback, listening: Callable[[], Listening], clear: Callable[[], None]) -> None:
        self._playback = playback
        self._make = listening
        self._clear = clear
        self._listening: Listening | None = None
        self._wish: BargeIn | None = None

    def frame(self, frame: Frame) -> None:
        """Listen to a frame."""
        if frame.track is not Track.INBOUND:
            return
        wish = self._playback.barge_in
        if wish != self._wish:
            self.close()
            self._wish = wish
            if wish is not None:
                self._listening = self._make()
                self._listening.ask(VadSettings(hangover_ms=HANGOVER_MS), self._on_speech)
                self._listening.ask(VadSettings(hangover_ms=HANGOVER_MS, speech_ms=wish.clear_ms), self._on_enough)
        if self._listening is not None:
            self._listening.frame(frame)

    def close(self) -> None:
        """Nobody may barge in any more."""
        if self._listening is not None:
            self._listening.close()
            self._listening = self._wish = None
            self._playback.duck(0.0)

    def _on_speech(self, speech: Speech) -> None:
        # Nothing is told once it has been closed.
        assert self._wish is not None
        self._playback.duck(self._wish.duck_db if speech.change is SpeechChange.STARTED else 0.0)

    def _on_enough(self, speech: Speech) -> None:
        # What plays by now may be something else, which nobody may barge in on.
        if speech.change is SpeechChange.STARTED and self._playback.barge_in is not None:
            self.close()
            self._clear()

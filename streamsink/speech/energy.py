"""Voice activity by level: needs numpy alone, takes a few microseconds a frame, and calls any loud noise speech."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from streamsink.audio import Frame, Samples, Track
from streamsink.speech.events import VadSettings
from streamsink.speech.talk import Listener, Talk

WINDOW = 0.02
"""Seconds that are judged as one; longer frames are cut into pieces of about that."""
MARGIN = 8.0
"""dB above the noise from which a window is speech."""
STAY = 4.0
"""dB less are enough for a talker who has started."""
RISE = 4.0
"""dB a second that the noise may seem to rise: it takes a talker without a pause this long to become noise."""
FALL = 0.2
"""Share of the way down to a quieter window that the noise goes with it."""
FIRST = 6.0
"""dB above the least level of speech that a first window may be noise; more is a talker who is cut in the middle."""
_SILENT = -96.0
"""dBFS; what is quieter is digital silence."""
_FULL_SCALE = 32768.0**2


class EnergyDetector:
    """Compares each window's level with the noise, which it learns from the quietest windows.

    Args:
        settings: ``energy_dbfs`` of it: nothing quieter is speech.
        rate: Hz of the frames.
        track: Whose they are.
        listeners: Who wants to know.
        talking: For each, whether the talker has started already; nobody's has when left out.
    """

    def __init__(
        self,
        settings: VadSettings,
        rate: int,
        track: Track,
        listeners: Sequence[Listener],
        talking: Sequence[bool] = (),
    ) -> None:
        self.rate = rate
        self._talks = [
            Talk(listener, track, rate, talking=before)
            for listener, before in zip(listeners, talking or [False] * len(listeners), strict=True)
        ]
        self._least = settings.energy_dbfs
        self._window = round(WINDOW * rate)
        # dBFS; None before the first window.
        self._noise: float | None = None
        self._floats = np.empty(self._window, np.float32)
        self._closed = False

    def push(self, frame: Frame) -> None:
        """Judge a frame."""
        samples, start = frame.samples, frame.start
        pieces = round(len(samples) / self._window)
        if pieces <= 1:
            self._judge(samples, start)
            return
        size = -(-len(samples) // pieces)
        for offset in range(0, len(samples), size):
            self._judge(samples[offset : offset + size], start + offset)

    def close(self) -> None:
        """Nothing more is told, of the frame that is being judged neither."""
        self._closed = True

    def _judge(self, samples: Samples, start: int) -> None:
        level = self._level(samples)
        noise = self._noise
        if noise is None:
            noise = min(level, self._least + FIRST)
        elif level < noise:
            noise += FALL * (level - noise)
        else:
            noise = min(level, noise + RISE * len(samples) / self.rate)
        self._noise = noise
        above = level - max(self._least, noise + MARGIN)
        end = start + len(samples)
        for talk in self._talks:
            if self._closed:
                return
            talk.judged(above >= 0.0 or (talk.talking and above >= -STAY), start, end)

    def _level(self, samples: Samples) -> float:
        if len(samples) != len(self._floats):
            self._floats = np.empty(len(samples), np.float32)
        floats = self._floats
        floats[:] = samples
        power = float(np.dot(floats, floats)) / (len(floats) * _FULL_SCALE)
        return max(_SILENT, 10.0 * math.log10(power)) if power else _SILENT

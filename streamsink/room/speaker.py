"""Who is talking: the loudest member, with hysteresis, so that a cough changes nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

Who = TypeVar("Who", bound=Hashable)

QUIET = -50.0
"""dBFS below which nobody is taken to talk."""
LOUDER = 3.0
"""dB by which somebody must be louder than who talks to take over."""
TAKES = 0.5
"""Seconds they must be so."""
LEAVES = 1.0
"""Seconds of quiet after which nobody talks."""
ATTACK = 0.05
RELEASE = 0.15
"""Seconds in which a level follows what gets louder, and what gets quieter."""
FLOOR = -100.0


def dbfs(rms: float) -> float:
    """A root mean square in dB below a full-scale square wave; -100 at least."""
    return max(FLOOR, 20 * math.log10(rms / 32768)) if rms > 0 else FLOOR


class ActiveSpeaker(Generic[Who]):
    """The active speaker among those whose levels it is told."""

    def __init__(self) -> None:
        self.current: Who | None = None
        self._power: dict[Who, float] = {}
        self._rival: Who | None = None
        self._rival_since = 0.0
        self._quiet_since: float | None = None

    def forget(self, who: Who) -> None:
        """They are here no more; whoever has talked has not while they are gone."""
        self._power.pop(who, None)
        if self._rival == who:
            self._rival = None

    def level(self, who: Who) -> float:
        """How loud somebody is, dBFS."""
        return dbfs(math.sqrt(self._power.get(who, 0.0)))

    def observe(self, levels: dict[Who, float], now: float, seconds: float) -> float | None:
        """Take everybody's root mean square of the last ``seconds``.

        Returns:
            Since when the active speaker, who is in :attr:`current`, has been that; None when nothing has changed.
        """
        up, down = 1 - math.exp(-seconds / ATTACK), 1 - math.exp(-seconds / RELEASE)
        power = self._power
        loudest, most = None, 0.0
        for who, rms in levels.items():
            before = power.get(who, 0.0)
            squared = rms * rms
            after = power[who] = before + (squared - before) * (up if squared > before else down)
            if after > most:
                loudest, most = who, after
        current = self.current
        if loudest is None or dbfs(math.sqrt(most)) < QUIET:
            return self._fall_quiet(now) if current is not None else None
        self._quiet_since = None
        if loudest == current:
            self._rival = None
            return None
        if current is not None and current in power and most < power[current] * 10 ** (LOUDER / 10):
            self._rival = None
            return None
        if self._rival != loudest:
            self._rival, self._rival_since = loudest, now
        if now - self._rival_since < TAKES:
            return None
        self.current, self._rival = loudest, None
        return self._rival_since

    def _fall_quiet(self, now: float) -> float | None:
        self._rival = None
        if self._quiet_since is None:
            self._quiet_since = now
        if now - self._quiet_since < LEAVES:
            return None
        since, self._quiet_since, self.current = self._quiet_since, None, None
        return since

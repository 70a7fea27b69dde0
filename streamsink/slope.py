"""How fast the far end's clock runs against ours, told from the audio that comes from it.

A network only ever delays, so of the frames of a while the one that was delayed least tells the clock; a line through
the last 30 s of those is its slope. Clocks of machines are a few dozen ppm apart: what seems more than 500 is none.
"""

from __future__ import annotations

SAMPLE_EVERY = 0.5
"""Seconds between frames that are looked at."""
POINT = 3.0
"""Seconds of which the least delayed frame makes a point of the line."""
POINTS = 10
"""Points of the line: 30 s."""
POINTS_NEEDED = 5
"""Points before which the line is not believed."""
LIMIT = 500e-6
"""What a clock may be off."""
JUMP = 0.1
"""Seconds; points further apart than that are a pause or a congestion, after which the line starts anew."""


class Slope:
    """The slope of one track's media clock.

    Attributes:
        value: Seconds of audio that come in a second of ours; 1 until it is known.
        delay: Our time less the media clock's, in seconds, as of the last point.
    """

    __slots__ = ("_best", "_best_at", "_point_ends", "_points", "delay", "value")

    def __init__(self) -> None:
        self.value = 1.0
        self.delay = 0.0
        self._points: list[tuple[float, float]] = []
        self._best = 0.0
        self._best_at = 0.0
        # None before the first frame.
        self._point_ends: float | None = None

    def observe(self, now: float, media: float) -> bool:
        """A frame came whose end is at ``media`` seconds on its clock.

        Returns:
            Whether `value` may have changed.
        """
        delay = now - media
        if self._point_ends is None:
            self.delay = delay
        elif now < self._point_ends:
            if delay < self._best:
                self._best, self._best_at = delay, now
            return False
        else:
            self._add(self._best_at, self._best)
        self._best, self._best_at = delay, now
        self._point_ends = now + POINT
        return True

    def _add(self, at: float, delay: float) -> None:
        points = self._points
        if points and abs(delay - points[-1][1]) > JUMP:
            points.clear()
        points.append((at, delay))
        if len(points) > POINTS:
            del points[0]
        if len(points) < POINTS_NEEDED:
            self.delay = min(each for _, each in points)
            return
        # Least squares, counted from the newest point.
        x = y = xx = xy = 0.0
        for then, late in points:
            dx, dy = then - at, late - delay
            x += dx
            y += dy
            xx += dx * dx
            xy += dx * dy
        count = len(points)
        grows = (count * xy - x * y) / (count * xx - x * x)
        self.value = 1 - min(LIMIT, max(-LIMIT, grows))
        self.delay = delay + (y - grows * x) / count

"""Where each frame of a track belongs in time, told from its ``chunk`` number and from counting samples.

Arrival times place nothing: a stall would stretch the audio and silence shrink it. They only bound how much silence a
jump of the counter may claim.
"""

from __future__ import annotations

import math

from streamsink.audio import Track
from streamsink.codec import Decoder
from streamsink.slope import Slope

DUPLICATE_STEP = 50
"""Chunks; a step back of up to this many repeats what was heard, a larger one is a new count."""
GAP_ALLOWANCE = 1.0
"""Seconds by which a track with its gaps may run ahead of the time since its first frame."""
_REMEMBERED = 256
"""Chunks; how far back the tracks' numbers are compared."""


class TrackClock:
    """One track's media clock.

    Attributes:
        track: Which track.
        decoder: Its decoder; state crosses frames.
        due: The chunk number that would continue the count; None before the first.
        position: Samples at the codec's rate from the stream's start to the next expected sample.
        length: Samples of the last frame; 0 before the first.
        pending: Samples lost since the last frame.
        octets: Payload bytes that came, duplicates too.
        slope: How the clock runs against ours, and where it stands.
        slope_due: When the slope wants to be told of a frame again; never, unless somebody follows it.
    """

    __slots__ = (
        "_first_at",
        "_origin",
        "_rate",
        "decoder",
        "due",
        "length",
        "octets",
        "pending",
        "position",
        "slope",
        "slope_due",
        "track",
    )

    def __init__(self, track: Track, decoder: Decoder, rate: int, position: int, now: float) -> None:
        self.track = track
        self.decoder = decoder
        self.position = position
        self.length = 0
        self.pending = 0
        self.octets = 0
        self.slope = Slope()
        self.slope_due = math.inf
        self._rate = rate
        self.due: int | None = None
        self._first_at = now
        self._origin = position

    def missing(self, chunk: int) -> int | None:
        """How many chunks are missing before this one; None when it repeats one, 0 when the count starts anew."""
        if self.due is None:
            return 0
        if chunk >= self.due:
            return chunk - self.due
        return None if self.due - chunk <= DUPLICATE_STEP + 1 else 0

    def accept(self, chunk: int, lost: int, now: float) -> int:
        """Take a chunk as the newest, with ``lost`` chunks missing before it.

        Returns:
            The chunks that become a gap: no more than the time since the track's first frame allows.
        """
        self.due = chunk + 1
        if not lost or not self.length:
            return 0
        room = self._origin + int((now - self._first_at + GAP_ALLOWANCE) * self._rate) - self.position
        lost = max(0, min(lost, -(-room // self.length)))
        samples = max(0, min(lost * self.length, room))
        self.position += samples
        self.pending += samples
        return lost

    def advance(self, samples: int) -> tuple[int, int]:
        """Place a frame of ``samples`` samples.

        Returns:
            Its start and the samples lost just before it.
        """
        start, lost = self.position, self.pending
        self.position += samples
        self.length = samples
        self.pending = 0
        return start, lost


class SharedCounter:
    """Tells whether several tracks count their chunks together, and which track a missing chunk belonged to.

    No published word says whether ``chunk`` counts per track or per stream. A number seen on two tracks settles for
    one count a track; a jump whose missing numbers another track has used settles for one count together.
    """

    __slots__ = ("_owners", "together")

    def __init__(self) -> None:
        # Chunk number → the track that used it, oldest first.
        self._owners: dict[int, Track] = {}
        self.together: bool | None = None

    def saw(self, chunk: int, track: Track) -> None:
        """Note who used a number."""
        if self._owners.get(chunk, track) is not track:
            self.together = False
        self._owners[chunk] = track
        if len(self._owners) > _REMEMBERED:
            del self._owners[next(iter(self._owners))]

    def lost(self, clock: TrackClock, chunk: int, missing: int, others: list[TrackClock]) -> int:
        """How many of the ``missing`` chunks before ``chunk`` were this track's own."""
        if self.together is False or not missing:
            return missing
        recent = range(max(clock.due or 0, chunk - _REMEMBERED), chunk)
        used = sum(1 for number in recent if self._owners.get(number, clock.track) is not clock.track)
        if used:
            self.together = True
        if not self.together:
            return missing
        # Tracks take turns, so each lost its share; the odd one belongs to a track that has fallen behind.
        share, odd = divmod(missing - used, len(others) + 1)
        behind = any(other.position > clock.position for other in others)
        return share + (1 if odd and behind else 0)

"""One clock for the outgoing audio of all streams."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

import structlog

from streamsink.playback import Playback

log = structlog.get_logger(__name__)


class Pacer:
    """One clock for all streams' outgoing audio: it wakes at the earliest due time, on absolute deadlines.

    Args:
        loop: The event loop whose ``call_at`` and ``time`` it uses.
        on_late: Told how many seconds after its due time each frame left.
        on_lead: Told how many seconds of audio the far end still had when it did.
    """

    SLACK = 0.001
    """Seconds: what falls due this soon after a tick goes out with it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_late: Callable[[float], None],
        on_lead: Callable[[float], None],
    ) -> None:
        self._loop = loop
        self._on_late = on_late
        self._on_lead = on_lead
        self._heap: list[tuple[float, int, Playback]] = []
        # What each playback is waiting for; a heap entry that differs is stale.
        self._due: dict[Playback, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed_at = 0.0
        self._count = 0

    def wake(self, playback: Playback) -> None:
        """Look at a playback's due time again."""
        due = playback.due
        known = self._due.get(playback)
        if due is None:
            self._due.pop(playback, None)
        elif known is None or due < known:
            self._push(playback, due)
            self._arm()

    def forget(self, playback: Playback) -> None:
        """A playback has ended."""
        self._due.pop(playback, None)

    def tick(self, now: float) -> None:
        """Advance everything that is due by now."""
        horizon = now + self.SLACK
        while self._heap and self._heap[0][0] <= horizon:
            due, _, playback = heapq.heappop(self._heap)
            if self._due.get(playback) != due:
                continue
            del self._due[playback]
            ahead, sent = playback.ahead(now), playback.frames_sent
            try:
                playback.advance(max(now, due))
            except Exception:
                log.exception("a stream's outgoing audio failed")
                continue
            if playback.frames_sent != sent:
                self._on_late(max(0.0, now - due))
                self._on_lead(ahead)
            following = playback.due
            if following is not None:
                # Never twice in one tick: what stays due waits for the next.
                self._push(playback, max(following, horizon + self.SLACK))

    def _push(self, playback: Playback, due: float) -> None:
        self._count += 1
        self._due[playback] = due
        heapq.heappush(self._heap, (due, self._count, playback))

    def _arm(self) -> None:
        if not self._heap:
            return
        at = self._heap[0][0]
        if self._timer is not None:
            if self._armed_at <= at:
                return
            self._timer.cancel()
        # Kept here: uvloop's handle for a time that has come does not tell it.
        self._armed_at = at
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick(self._loop.time())
        self._arm()

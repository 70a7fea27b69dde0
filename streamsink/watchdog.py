"""Tells what blocks the event loop: a heartbeat on it, and a thread that watches the heartbeat."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

BEAT = 0.05
"""Seconds between heartbeats."""
BLOCKED = 0.1
"""Seconds the loop may be late before the stack of what it does is logged."""


class Watchdog:
    """Measures how late the event loop is and logs the stack of whatever blocks it.

    Args:
        loop: The event loop, running in the calling thread.
        on_lag: Told, at each beat, how many seconds late it was.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lag: Callable[[float], None]) -> None:
        self._loop = loop
        self._on_lag = on_lag
        self._loop_thread = threading.get_ident()
        self._beaten_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="streamsink-watchdog", daemon=True)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin."""
        self._beat(self._loop.time())
        self._thread.start()

    def stop(self) -> None:
        """End; the thread is gone when this returns."""
        if self._timer is not None:
            self._timer.cancel()
        self._stopped.set()
        self._thread.join()

    def _beat(self, due: float) -> None:
        now = self._loop.time()
        self._on_lag(max(0.0, now - due))
        self._beaten_at = time.monotonic()
        self._timer = self._loop.call_at(now + BEAT, self._beat, now + BEAT)

    def _watch(self) -> None:
        reported = 0.0
        while not self._stopped.wait(BEAT):
            reported = self.look(time.monotonic(), reported)

    def look(self, now: float, reported: float) -> float:
        """Log the loop's stack when its last beat is too old; once for each beat.

        Args:
            now: Seconds, monotonic.
            reported: The beat that was reported last.

        Returns:
            The beat that is reported now.
        """
        beaten_at = self._beaten_at
        if now - beaten_at <= BEAT + BLOCKED or beaten_at == reported:
            return reported
        frame = sys._current_frames().get(self._loop_thread)
        stack = "".join(traceback.format_stack(frame)[-8:]) if frame is not None else ""
        log.error("event loop blocked", seconds=round(now - beaten_at - BEAT, 3), exception=stack)
        return beaten_at

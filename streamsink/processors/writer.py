"""The threads of recordings: one writes all that are live, a few wait for the disk, fewer have files encoded.

A job runs in the writing thread; what it returns is its rest, which runs in a finishing thread; what that returns runs
in an encoding one. Each thus takes as long as its kind does, and holds up only its kind.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import structlog
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsink.disk import give_way

log = structlog.get_logger(__name__)

FLUSH_INTERVAL = 0.5
"""Seconds between two writes of a stream: a crash loses no more audio than that."""
FINISHERS = 8
"""Recordings finished at once: disks take many fsyncs in the time of one."""
SYNCERS = 4
"""Live recordings brought to the disk at once; they wait for no other that is finished."""
ENCODERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Recordings encoded at once."""
STALLED = 10.0
"""Seconds without any progress after which an exiting process takes the disk for hung."""
ENCODING_AT_EXIT = 10.0
"""Seconds an exiting process goes on encoding; the next start makes what is left."""

Job = Callable[[], Any]
"""Returns the job of the next kind of thread that ends it, or None."""


class Live(Protocol):
    """What is written again and again."""

    def flush(self) -> bool:
        """Write what is pending; whether there will be more."""


class _Failures(Collector):
    """What the disk did not take. Any thread may count."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "streamsink_recording_errors", "Recordings that ended early, or are not as asked.", value=self.count
        )


failures = _Failures()
"""Of all recordings of the process."""


class Writer:
    """The threads; they start with the first job."""

    def __init__(self) -> None:
        kinds = [queue.SimpleQueue[tuple[Job, Future[None]]]() for _ in range(4)]
        self._jobs, self._finishing, self._encoding, self._syncing = self._kinds = kinds
        # They take turns, spread over the interval, and the first one's is at that time. The writing thread's own.
        self._live: deque[Live] = deque()
        self._next = 0.0
        self._started = False
        self._starting = threading.Lock()
        # Jobs that are not over, rest and all, and how many of those are with the encoders.
        self._owed = 0
        self._to_encode = 0
        self._moved = threading.Condition()

    def run(self, job: Job) -> asyncio.Future[None]:
        """Run a job, rest and all; for the event loop. It runs to its end, also when what this returns is cancelled."""
        return asyncio.wrap_future(self._put(job, 0))

    def finish(self, job: Job) -> Future[None]:
        """Run a job that waits for the disk; for any thread."""
        future = self._put(job, 1)
        future.add_done_callback(_tell)
        return future

    def encode(self, job: Job) -> Future[None]:
        """Run a job that computes; for any thread."""
        return self._put(job, 2)

    def sync(self, job: Job) -> Future[None]:
        """Run a job that brings what is live to the disk for good; for any thread."""
        return self._put(job, 3)

    def add(self, live: Live) -> None:
        """Write this from now on, until its ``flush`` says that it is over; for jobs."""
        self._live.append(live)
        soon = time.monotonic() + FLUSH_INTERVAL / len(self._live)
        self._next = soon if len(self._live) == 1 else min(self._next, soon)

    def moved(self) -> None:
        """Tell who waits that the disk does something; for jobs."""
        with self._moved:
            self._moved.notify_all()

    def _put(self, job: Job, kind: int) -> Future[None]:
        with self._starting:
            if not self._started:
                self._start()
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._moved:
            self._owed += 1
            self._to_encode += kind == 2
        self._kinds[kind].put((job, future))
        return future

    def _start(self) -> None:
        # All now: while the process exits none can be started. Daemonic: a disk that hangs must not keep it for ever.
        threads = [("streamsink-record", self._write)]
        threads += [(f"streamsink-record-{n}", self._finish) for n in range(FINISHERS)]
        threads += [(f"streamsink-record-sync-{n}", self._sync) for n in range(SYNCERS)]
        threads += [(f"streamsink-encode-{n}", self._encode) for n in range(ENCODERS)]
        for name, target in threads:
            threading.Thread(target=target, name=name, daemon=True).start()
        atexit.register(self._wait)
        self._started = True

    def _write(self) -> None:
        while True:
            if self._live and self._next <= time.monotonic():
                self._flush()
            wait = max(0.0, self._next - time.monotonic()) if self._live else None
            with contextlib.suppress(queue.Empty):
                self._run(*self._jobs.get(timeout=wait), 0)

    def _flush(self) -> None:
        """Write those whose turn it is: a few at a time, since all at once would keep the event loop waiting."""
        now = time.monotonic()
        for _ in range(len(self._live)):
            if self._next > now:
                return
            live = self._live.popleft()
            give_way()
            if self._goes_on(live):
                self._live.append(live)
                # One that is over costs no time, or those that are left would wait for theirs.
                self._next += FLUSH_INTERVAL / len(self._live)
        # All had their turn, so nothing is left to make up for, were the disk late by many rounds.
        self._next = max(self._next, now)

    def _goes_on(self, live: Live) -> bool:
        try:
            return live.flush()
        except Exception:
            # Whatever it is: the thread writes for others too.
            failures.add()
            log.exception("a recording is not written any more")
            return False

    def _finish(self) -> None:
        while True:
            self._run(*self._finishing.get(), 1)

    def _sync(self) -> None:
        while True:
            self._run(*self._syncing.get(), 3)

    def _encode(self) -> None:
        while True:
            self._run(*self._encoding.get(), 2)

    def _run(self, job: Job, future: Future[None], kind: int) -> None:
        rest = None
        give_way()
        try:
            rest = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            if rest is None:
                future.set_result(None)
        with self._moved:
            self._owed -= rest is None
            self._to_encode += (kind == 1 and rest is not None) - (kind == 2)
            self._moved.notify_all()
        if rest is not None:
            self._kinds[kind + 1].put((rest, future))

    def _wait(self) -> None:
        """Let what is owed come to its end before the process does, for as long as the disk does something."""
        deadline = time.monotonic() + ENCODING_AT_EXIT
        with self._moved:
            while self._owed:
                only_encoding = self._owed == self._to_encode
                if only_encoding and time.monotonic() >= deadline:
                    log.warning("recordings are left as .part: the next start encodes them", recordings=self._owed)
                    return
                left = deadline - time.monotonic() if only_encoding else STALLED
                moved = self._moved.wait(max(0.0, left))
                if not moved and not only_encoding:
                    log.error("recordings keep .part: the disk hangs", recordings=self._owed)
                    return


def _tell(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        log.error("recording not finished", exc_info=error)


writer = Writer()

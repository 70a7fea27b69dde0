"""Processors: the contract, the easy way in, and the guard that keeps one from hurting the call.

A processor is one object per stream. Frames reach it by a plain call on the event loop; everything it does wrong
(raising, hanging, being slow) retires it from that one stream and touches nothing else.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import structlog

from streamsink.audio import Frame, Track
from streamsink.codec import Resampler
from streamsink.errors import ProcessorError, SpeechError, StreamClosed, TalkBackOff
from streamsink.speech.echo import EchoGate
from streamsink.speech.vad import Detectors, Listening

if TYPE_CHECKING:
    from streamsink.speech.events import Speaker, Speech, Transcript, VadSettings
    from streamsink.status import StatusEvent
    from streamsink.stream import Stream

log = structlog.get_logger(__name__)

HOOK_TIMEOUT = 10.0
"""Seconds ``on_start`` and ``on_stop`` may take."""
SLOW_CALL = 0.005
"""Seconds; an ``on_frame`` call above this is too slow for the event loop."""
SLOW_CALLS = 5
SLOW_WITHIN = 10.0
"""So many slow calls within so many seconds retire a processor. Over an hour, a busy machine alone makes as many."""


class MarkOutcome(enum.Enum):
    """What became of a mark."""

    PLAYED = "played"
    CLEARED = "cleared"
    UNCONFIRMED = "unconfirmed"
    """Its echo never came."""


class Processor:
    """What a user writes: override what you need. One instance serves one stream.

    Keyword arguments of ``__init__`` are the processor's options; their annotations convert what a SPEC says.

    Attributes:
        sample_rate: Ask for a rate in Hz and get it; None takes audio as it comes.
        speaks: Whether the processor may send audio back.
        says: Whether it says texts: what speaks is then started with the endpoint, which says so where that cannot be.
            None: it is started ahead, if it can be, where the processor's code calls ``say``.
        vad: Ask for voice activity detection and get ``on_speech``; read once ``__init__`` is over.
    """

    sample_rate: int | None = None
    speaks: bool = True
    says: bool | None = None
    vad: VadSettings | None = None

    async def on_start(self, stream: Stream) -> None:
        """The stream begins. What arrives meanwhile is held (10 s at most) and then delivered in order."""

    def on_frame(self, frame: Frame) -> None:
        """Audio arrived. On the event loop: return in well under a millisecond."""

    def on_played(self, frame: Frame) -> None:
        """The far end has certainly heard this of ours (``Track.OUTBOUND``), placed on the inbound media clock."""

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        """A participant pressed a digit (``0-9 * # A-D``)."""

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        """A mark of ours was played or cleared, or the stream ended before its echo came."""

    def on_speech(self, event: Speech) -> None:
        """A talker started or stopped; for processors that ask for it with :attr:`vad`.

        It comes after ``on_frame`` of the frame in which it was noticed, so behind ``event.at`` by ``speech_ms`` or
        ``hangover_ms``; Silero works in a thread, and a few frames more may have come meanwhile. Started and stopped
        take turns. The end of the stream tells nothing: a talker it cuts off gets ``on_stop`` alone.
        """

    def on_transcript(self, transcript: Transcript) -> None:
        """Words were recognised by a processor of this stream that transcribes.

        What is still owed when the stream ends comes into the transcript's files and its webhook alone.
        """

    def on_speaker(self, event: Speaker) -> None:
        """The active speaker of the room this stream is in has changed."""

    def on_status(self, event: StatusEvent) -> None:
        """A status webhook about this stream arrived."""

    async def on_stop(self, reason: str) -> None:
        """The stream ended: ``stop``, ``closed``, ``lost``, ``policy``, ``shutdown`` or ``error``. Runs once, last."""


class Frames:
    """The frames of one stream as an async iterator; ends when the stream does.

    The queue is bounded: a reader that falls behind loses the oldest frames, and ``dropped`` counts them.
    """

    def __init__(self, limit: int) -> None:
        self._queue: deque[Frame] = deque()
        self._limit = limit
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self.dropped = 0

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self

    async def __anext__(self) -> Frame:
        while not self._queue:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._queue.popleft()

    def put(self, frame: Frame) -> None:
        """Add a frame, dropping the oldest when full."""
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(frame)
        self._wake()

    def end(self) -> None:
        """Let the reader finish what is queued, then stop."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class FunctionProcessor(Processor):
    """A processor made of an async function; :func:`processor` builds subclasses of it."""

    function: ClassVar[Callable[..., Awaitable[None]]]
    queue_frames: ClassVar[int] = 250

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._frames = Frames(self.queue_frames)
        self._task: asyncio.Task[None] | None = None

    @property
    def dropped(self) -> int:
        """Frames the function was too slow to read."""
        return self._frames.dropped

    async def on_start(self, stream: Stream) -> None:
        """Start the function."""
        self._task = asyncio.ensure_future(self._run(stream))

    async def _run(self, stream: Stream) -> None:
        await type(self).function(stream, self._frames, **self._options)

    def on_frame(self, frame: Frame) -> None:
        """Queue the frame; what the function raised surfaces here, so that the guard sees it."""
        assert self._task is not None
        if self._task.done():
            self._task.result()
        else:
            self._frames.put(frame)

    async def on_stop(self, reason: str) -> None:
        """End the iterator and wait for the function to return; one that does not is cancelled by the timeout."""
        self._frames.end()
        assert self._task is not None
        await self._task


def processor(
    *, sample_rate: int | None = None, speaks: bool = True, queue_frames: int = 250
) -> Callable[[Callable[..., Awaitable[None]]], type[FunctionProcessor]]:
    """Make a processor of ``async def f(stream, frames, *, option=…)``.

    Args:
        sample_rate: Hz wanted; None takes audio as it comes.
        speaks: Whether it may send audio back.
        queue_frames: Frames held for a function that falls behind; beyond that the oldest are dropped and counted.

    Raises:
        TypeError: The function is not ``async def`` or does not take ``(stream, frames)``.
    """

    def decorate(function: Callable[..., Awaitable[None]]) -> type[FunctionProcessor]:
        parameters = list(inspect.signature(function).parameters.values())
        if not inspect.iscoroutinefunction(function) or len(parameters) < 2:
            raise TypeError(f"@processor wants `async def f(stream, frames)`, got {function!r}")
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        options = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters[2:] if p.kind in by_keyword]
        members = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            # What reads a processor's options reads the function's.
            "__signature__": inspect.Signature(options),
            "function": staticmethod(function),
            "sample_rate": sample_rate,
            "speaks": speaks,
            "queue_frames": queue_frames,
        }
        return type(function.__name__, (FunctionProcessor,), members)

    return decorate


class Tally(Protocol):
    """Where a chain counts what its processors do wrong."""

    def processor_error(self, name: str) -> None:
        """A processor was retired."""

    def processor_dropped(self, name: str, frames: int) -> None:
        """A processor was too slow for this many frames."""


# What a processor's own tasks were cancelled with is no reason to cancel anything else.
_FAILURES = (Exception, asyncio.CancelledError, SystemExit)


class _Guard:
    """One processor on one stream: holds what comes before it is ready, and retires it when it fails."""

    __slots__ = (
        "alive",
        "clock",
        "held",
        "log",
        "name",
        "on_frame",
        "processor",
        "retired",
        "slow",
        "started",
        "stopping",
        "tally",
    )

    def __init__(self, name: str, processor: Processor, tally: Tally, clock: Callable[[], float]) -> None:
        self.name = name
        self.processor = processor
        self.on_frame = processor.on_frame
        self.tally = tally
        self.clock = clock
        # What arrived during on_start; None once it is over.
        self.held: deque[Callable[[], None]] | None = deque()
        self.alive = True
        self.retired = False
        self.slow: deque[float] = deque(maxlen=SLOW_CALLS)
        self.started: asyncio.Task[None] | None = None
        self.stopping: asyncio.Task[None] | None = None
        self.log = log

    async def start(self, stream: Stream) -> None:
        self.log = log.bind(stream=stream.sid, call=stream.call_sid, processor=self.name)
        if not await self._run("on_start", stream):
            return
        held, self.held = self.held, None
        for call in held or ():
            call()

    def frame(self, frame: Frame) -> None:
        if self.held is not None:
            self.held.append(lambda: self.frame(frame))
            return
        if not self.alive:
            return
        before = self.clock()
        try:
            self.on_frame(frame)
        except StreamClosed:
            # It was held until after the end: there is nobody to answer any more.
            return
        except _FAILURES as error:
            self._retire("on_frame", error)
            return
        after = self.clock()
        if after - before > SLOW_CALL:
            self.slow.append(after)
            if len(self.slow) == SLOW_CALLS and after - self.slow[0] <= SLOW_WITHIN:
                limits = f"{SLOW_CALL * 1000:g} ms {SLOW_CALLS} times within {SLOW_WITHIN:g} s"
                self._retire("on_frame", f"took longer than {limits}")

    def call(self, hook: str, *args: Any) -> None:
        """Call any other hook that is a plain function."""
        if self.held is not None:
            self.held.append(lambda: self.call(hook, *args))
        elif self.alive:
            try:
                getattr(self.processor, hook)(*args)
            except StreamClosed:
                return
            except _FAILURES as error:
                self._retire(hook, error)

    async def stop(self, reason: str) -> None:
        if self.started is not None:
            await self.started
        if self.alive:
            self.alive = False
            await self._on_stop(reason)
        elif self.stopping is not None:
            await self.stopping

    async def _run(self, hook: str, *args: Any) -> bool:
        """Await an async hook for as long as it may take; a failure retires the processor.

        In a task of its own, to be left behind: a hook that swallows its cancellation holds nobody up.
        """
        task = asyncio.ensure_future(self._call_async(hook, args))
        try:
            await asyncio.wait({task}, timeout=HOOK_TIMEOUT)
        finally:
            task.cancel()
        if not task.done():
            # What it still raises has been told already.
            task.add_done_callback(lambda left: left.cancelled() or left.exception())
            self._retire(hook, f"took longer than {HOOK_TIMEOUT:g} s")
        elif task.cancelled():
            self._retire(hook, "cancelled itself")
        elif (error := task.exception()) and not isinstance(error, StreamClosed):
            self._retire(hook, error)
        else:
            return True
        return False

    async def _call_async(self, hook: str, args: tuple[Any, ...]) -> None:
        try:
            await getattr(self.processor, hook)(*args)
        except SystemExit as error:
            # A task would end the whole process with it.
            raise RuntimeError("it asked for the process to exit") from error

    async def _on_stop(self, reason: str) -> None:
        await self._run("on_stop", reason)
        if isinstance(self.processor, FunctionProcessor) and self.processor.dropped:
            self.tally.processor_dropped(self.name, self.processor.dropped)

    def _retire(self, hook: str, cause: BaseException | str) -> None:
        """Take the processor off this stream; one that had started gets its on_stop, to let go of what it holds."""
        if self.retired:
            # What is broken may not let go cleanly either: one failure is told once.
            return
        self.retired = True
        self.tally.processor_error(self.name)
        if isinstance(cause, str):
            self.log.error("processor retired", hook=hook, cause=cause)
        elif isinstance(cause, SpeechError | ProcessorError | TalkBackOff):
            # A sentence that says all there is to know.
            self.log.error("processor retired", hook=hook, cause=str(cause))
        else:
            self.log.error("processor retired", hook=hook, exc_info=cause)
        was_alive, self.alive, self.held = self.alive, False, None
        if was_alive and hook != "on_start":
            self.stopping = asyncio.ensure_future(self._on_stop("error"))


class Ear(Protocol):
    """What hears the frames of a chain besides its processors."""

    def frame(self, frame: Frame) -> None:
        """Hear a frame of any track."""

    def close(self) -> None:
        """The stream has ended."""


class Chain:
    """All processors of one stream.

    Processors that ask for the same sample rate share one resampler a track.

    Args:
        processors: Name and instance of each, in order.
        tally: Where failures are counted.
        clock: Seconds, monotonic; times the calls.
        detectors: Where voice activity detectors come from; the energy detector for all when left out.
    """

    def __init__(
        self,
        processors: Iterable[tuple[str, Processor]],
        tally: Tally,
        clock: Callable[[], float] = time.perf_counter,
        detectors: Detectors | None = None,
    ) -> None:
        self._guards = [_Guard(name, processor, tally, clock) for name, processor in processors]
        self._as_it_comes = [g for g in self._guards if g.processor.sample_rate is None]
        self._by_rate: dict[int, list[_Guard]] = {}
        for guard in self._guards:
            if guard.processor.sample_rate is not None:
                self._by_rate.setdefault(guard.processor.sample_rate, []).append(guard)
        self._taps: dict[tuple[str, Track, int], _Tap] = {}
        self.wants_played = any(type(g.processor).on_played is not Processor.on_played for g in self._guards)
        # What knows our own voice when it comes back; without it, that is a talker too.
        self.echo: EchoGate | None = None
        self._detectors = detectors
        # Empty where nobody asks for voice activity.
        self._ears: list[Ear] = []
        asking = [guard for guard in self._guards if guard.processor.vad is not None]
        if asking:
            self.listen(listening := self.listening())
        for guard in asking:
            assert guard.processor.vad is not None
            listening.ask(guard.processor.vad, functools.partial(guard.call, "on_speech"))

    @property
    def names(self) -> list[str]:
        """The processors' names, in order."""
        return [guard.name for guard in self._guards]

    @property
    def speaks(self) -> bool:
        """Whether any of them may send audio."""
        return any(guard.processor.speaks for guard in self._guards)

    def start(self, stream: Stream) -> None:
        """Begin every processor's on_start."""
        for guard in self._guards:
            guard.started = asyncio.ensure_future(guard.start(stream))

    def frame(self, frame: Frame) -> None:
        """Hand an incoming frame to every processor, each at the rate it asked for."""
        for guard in self._as_it_comes:
            guard.frame(frame)
        for rate, guards in self._by_rate.items():
            at_rate = self._at_rate(frame, rate, "on_frame")
            if at_rate is not None:
                for guard in guards:
                    guard.frame(at_rate)
        if self._ears:
            self._hear(frame)

    @property
    def listens(self) -> bool:
        """Whether anybody wants to know of voice activity."""
        return bool(self._ears)

    def listening(self) -> Listening:
        """Voice activity detection for this stream, to be asked and then listened with."""
        if self._detectors is None:
            self._detectors = Detectors()
        return Listening(self._detectors, self._cleaned_at_rate)

    def listen(self, ear: Ear) -> None:
        """Let one more hear every frame, without what is only our own voice, after the processors have had it."""
        self._ears.append(ear)

    def _hear(self, frame: Frame) -> None:
        if self.echo is not None and frame.track is Track.INBOUND:
            frame = self.echo.clean(frame)
        for ear in self._ears.copy():
            try:
                ear.frame(frame)
            except Exception as error:
                # What listens is no reason to end the call.
                log.error("voice activity detection failed; this stream goes on without", exc_info=error)
                self._ears.remove(ear)

    def played(self, frame: Frame) -> None:
        """Hand what the far end heard of ours to every processor, each at the rate it asked for."""
        for guard in self._as_it_comes:
            guard.call("on_played", frame)
        for rate, guards in self._by_rate.items():
            at_rate = self._at_rate(frame, rate, "on_played")
            if at_rate is not None:
                for guard in guards:
                    guard.call("on_played", at_rate)

    def _cleaned_at_rate(self, frame: Frame, rate: int) -> Frame | None:
        # As long as nothing is cleaned, processors at that rate have it already.
        return self._at_rate(frame, rate, "on_frame" if self.echo is None else "on_speech")

    def _at_rate(self, frame: Frame, rate: int, hook: str) -> Frame | None:
        if rate == frame.sample_rate:
            return frame
        key = (hook, frame.track, rate)
        tap = self._taps.get(key)
        if tap is None:
            tap = self._taps[key] = _Tap(frame, rate)
        return tap.push(frame)

    def call(self, hook: str, *args: Any) -> None:
        """Call a plain hook of every processor."""
        for guard in self._guards:
            guard.call(hook, *args)

    async def stop(self, reason: str) -> None:
        """Run every processor's on_stop, once each, after its on_start is over."""
        for ear in self._ears:
            ear.close()
        await asyncio.gather(*(guard.stop(reason) for guard in self._guards))


class _Tap:
    """One track at one more rate: the resampler and where its output stands on the media clock."""

    __slots__ = ("expected", "latest", "lost", "made", "position", "rate_in", "rate_out", "resampler")

    def __init__(self, first: Frame, rate_out: int) -> None:
        self.rate_in = first.sample_rate
        self.rate_out = rate_out
        self.resampler = Resampler(self.rate_in, rate_out)
        # Of the next input sample at rate_in, and of the next output sample at rate_out.
        self.expected = first.start
        # At rate_out, not told yet.
        self.lost = 0
        self.position = first.start * rate_out // self.rate_in
        # Whoever asks again for the newest frame gets what was made of it.
        self.latest: Frame | None = None
        self.made: Frame | None = None

    def push(self, frame: Frame) -> Frame | None:
        if frame is not self.latest:
            self.latest = frame
            self.made = self._push(frame)
        return self.made

    def _push(self, frame: Frame) -> Frame | None:
        gap = frame.start - self.expected
        if gap > 0:
            silence = self._silence(gap)
            self.lost += silence if frame.lost else 0
        self.expected = frame.start + len(frame.samples)
        samples = self.resampler.push(frame.samples)
        start = self.position
        self.position += len(samples)
        if not len(samples):
            return None
        samples.setflags(write=False)
        lost, self.lost = self.lost, 0
        return Frame(samples, self.rate_out, frame.track, start, lost, frame.sequence)

    def _silence(self, gap: int) -> int:
        """Feed zeros for what is missing: they keep filter and clock in step; what comes out of them is the gap.

        A whole second in is a whole second out, and no filter remembers more: further seconds are only counted.
        """
        seconds = max(0, gap // self.rate_in - 1)
        zeros = np.zeros(gap - seconds * self.rate_in, np.int16)
        silence = seconds * self.rate_out + len(self.resampler.push(zeros))
        self.position += silence
        return silence

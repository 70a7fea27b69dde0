"""One piece of audio on its way out: what it is made of, how far it has got, and how it ended.

An array is the caller's own: nothing of it is converted, resampled or encoded before it falls due. A source that
makes its audio as it goes is pulled in a task of its own, little ahead of the listener.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from streamsink.audio import Samples
from streamsink.errors import CodecError

log = structlog.get_logger(__name__)

PULL_AHEAD = 1.0
"""Seconds by which a source is pulled ahead of what is due."""
RATES = range(8000, 192_001)
"""Hz; what can be played."""

Audio: TypeAlias = NDArray[np.int16] | NDArray[np.float32]
"""Mono PCM, shape ``(n,)``: int16, or float32 from -1 to 1. What is beyond saturates, NaN is silence."""

INT16 = np.dtype(np.int16)
_FLOAT32 = np.dtype(np.float32)
NOTHING: Samples = np.zeros(0, np.int16)
# The event loop keeps no hold on its tasks.
_running: set[asyncio.Task[None]] = set()


class Outcome(enum.Enum):
    """How a playout ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """A clear dropped it: somebody's own, or that of a talker who barged in."""
    CLOSED = "closed"
    """The stream ended first."""
    FAILED = "failed"
    """Its source raised; what it had given before was played."""


class Played(NamedTuple):
    """What became of a playout.

    Attributes:
        outcome: How it ended.
        played_ms: Milliseconds of it that were heard.
        text_heard: Of the text that came with it, what was certainly heard.
        error: What its source raised, where it failed.
    """

    outcome: Outcome
    played_ms: int
    text_heard: str = ""
    error: BaseException | None = None


class BargeIn(msgspec.Struct, frozen=True):
    """What a talker may do to a playout.

    Attributes:
        duck_db: When the talker starts, the playout becomes this much quieter.
        clear_ms: When the talker has gone on for so long, it is cleared and ends as ``INTERRUPTED``.

    Raises:
        ValueError: One of them is below 0, or beyond what makes sense: 96 dB, a minute.
    """

    duck_db: float = 12.0
    clear_ms: int = 300

    def __post_init__(self) -> None:
        if not 0 <= self.duck_db <= 96:
            raise ValueError(f"duck_db is {self.duck_db!r}; wanted 0 to 96 dB")
        if not 0 <= self.clear_ms <= 60_000:
            raise ValueError(f"clear_ms is {self.clear_ms!r}; wanted 0 to 60000 milliseconds")


class Owner(Protocol):
    """What a playout needs of the playback it is on."""

    lag: float

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, monotonic."""

    @property
    def wake(self) -> Callable[[], None]:
        """Have what is due looked at again."""

    def cancel(self, playout: Playout, /) -> None:
        """Take it out."""

    def fed(self, seconds: float, /) -> None:
        """So much more of a source is there, or it has come to its end."""


class Playout:
    """One piece of audio on its way out. Await it to learn how it ended; that never raises.

    Attributes:
        feed: The source it is pulled from; None for an array.
        barge_in: What a talker may do to it; None: nothing.
        text: Pairs of a position, in samples at the playout's rate, and the text whose last sound ends there; in order.
            May grow while it plays.
    """

    __slots__ = ("_future", "_heard", "_playback", "_result", "end", "offset", "rate", "samples", "sent")

    feed: Feed | None = None
    barge_in: BargeIn | None = None
    text: Sequence[tuple[int, str]] = ()

    def __init__(self, playback: Owner, samples: Audio, rate: int) -> None:
        self._playback = playback
        # What is taken next, and how many samples of it are taken.
        self.samples = samples
        self.rate = rate
        self.offset = 0
        # Samples handed to the far end, at its rate, and when the last of them will have been played there.
        self.sent = 0
        self.end = 0.0
        # Played to its end, with nobody waiting to hear of it.
        self._heard = False
        self._result: Played | None = None
        self._future: asyncio.Future[Played] | None = None

    @property
    def played_ms(self) -> int:
        """Milliseconds of it the far end has played by now."""
        if self._result is not None:
            return self._result.played_ms
        return self._played(self._playback.clock())[0]

    def cancel(self) -> None:
        """Take out what has not been sent yet; what is queued behind it moves up."""
        self._playback.cancel(self)

    def __await__(self) -> Generator[object, None, Played]:
        if self._heard:
            self.finish(Outcome.FINISHED, self.end)
        if self._result is None:
            if self._future is None:
                self._future = asyncio.get_running_loop().create_future()
                self._playback.wake()
            # Shielded: several may wait, and one that gives up must not end it for the others.
            return (yield from asyncio.shield(self._future).__await__())
        return self._result

    # --- What the playback calls ---

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for its end."""
        return self._future is not None

    @property
    def taken(self) -> int:
        """Samples taken so far."""
        return self.offset

    @property
    def waiting(self) -> float:
        """Seconds of it that are here and not taken yet."""
        return (len(self.samples) - self.offset) / self.rate

    @property
    def starved(self) -> bool:
        """Whether its source has more to come, but nothing is here."""
        return False

    def take(self, count: int) -> Audio:
        """Up to so many of its next samples; none when there are none."""
        piece = self.samples[self.offset : self.offset + count]
        self.offset += len(piece)
        return piece

    @property
    def exhausted(self) -> bool:
        """Whether everything is taken, and nothing more comes."""
        return self.offset >= len(self.samples)

    def be_heard(self, now: float) -> None:
        """It was played to its end; a result is made only where somebody asks for it."""
        if self._future is not None or self.feed is not None:
            self.finish(Outcome.FINISHED, now)
        else:
            self._heard = True
            self.samples = NOTHING

    def finish(self, outcome: Outcome, now: float) -> None:
        """It has ended."""
        if self._result is not None:
            return
        played_ms, text = self._played(now)
        error = None
        if self.feed is not None:
            self.feed.stop()
            error = self.feed.error
            if error is not None and outcome is Outcome.FINISHED:
                outcome = Outcome.FAILED
        self.samples = NOTHING
        self._result = Played(outcome, played_ms, text, error)
        if self._future is not None and not self._future.done():
            self._future.set_result(self._result)

    def _played(self, now: float) -> tuple[int, str]:
        """Milliseconds and text that have been heard."""
        if not self.sent:
            return 0, ""
        unheard = 0.0 if self._heard else max(0.0, self.end + self._playback.lag - now)
        seconds = max(0.0, self.sent / self.rate - unheard)
        heard = round(seconds * self.rate)
        return round(seconds * 1000), "".join(text for position, text in self.text if position <= heard)


class RichPlayout(Playout):
    """A playout with a source, with text, or that a talker may barge in on; the plain one is kept small."""

    __slots__ = ("_base", "barge_in", "feed", "text")

    def __init__(
        self,
        playback: Owner,
        samples: Audio | AsyncIterable[Audio],
        rate: int,
        barge_in: BargeIn | None,
        text: Sequence[tuple[int, str]],
    ) -> None:
        self.feed = None
        if not isinstance(samples, np.ndarray):
            self.feed = Feed(playback, self, samples)
            samples = NOTHING
        super().__init__(playback, samples, rate)
        # Samples of the chunks before the one that is taken from now.
        self._base = 0
        self.barge_in = barge_in
        self.text = text

    @property
    def taken(self) -> int:
        """Samples taken so far."""
        return self._base + self.offset

    @property
    def waiting(self) -> float:
        """Seconds of it that are here and not taken yet."""
        count = len(self.samples) - self.offset + (self.feed.count if self.feed is not None else 0)
        return count / self.rate if count else 0.0

    @property
    def starved(self) -> bool:
        """Whether its source has more to come, but nothing is here."""
        feed = self.feed
        return feed is not None and not feed.ended and not feed.count and self.offset >= len(self.samples)

    def take(self, count: int) -> Audio:
        """Up to so many of its next samples; none when there are none."""
        if self.offset >= len(self.samples) and self.feed is not None and self.feed.chunks:
            self._base += len(self.samples)
            self.samples = self.feed.pop()
            self.offset = 0
        return super().take(count)

    @property
    def exhausted(self) -> bool:
        """Whether everything is taken, and nothing more comes."""
        feed = self.feed
        return self.offset >= len(self.samples) and (feed is None or (feed.ended and not feed.count))


class Feed:
    """Pulls a source of audio in a task, and holds what it gave until that is taken.

    Attributes:
        chunks: What is here, in order; none is empty.
        count: Samples in them.
        ended: Whether nothing more comes.
        error: What the source raised.
    """

    __slots__ = (
        "_entered",
        "_playback",
        "_playout",
        "_source",
        "_stopped",
        "_task",
        "_wanted",
        "chunks",
        "count",
        "ended",
        "error",
    )

    def __init__(self, playback: Owner, playout: RichPlayout, source: AsyncIterable[Audio]) -> None:
        self._playback = playback
        self._playout = playout
        self._source = source
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._entered = False
        self._stopped = False
        self.chunks: deque[Audio] = deque()
        self.count = 0
        self.ended = False
        self.error: BaseException | None = None

    def want(self) -> None:
        """The listener is near: pull on."""
        if not self.ended and not self._wanted.is_set():
            self._wanted.set()
            self._start()

    def pop(self) -> Audio:
        """The next chunk."""
        chunk = self.chunks.popleft()
        self.count -= len(chunk)
        return chunk

    def stop(self) -> None:
        """Nothing more is wanted: the source is closed."""
        self.chunks.clear()
        self.count = 0
        stopped, self._stopped = self._stopped, True
        if stopped or self.ended:
            # It is closed, or about to be.
            return
        if self._entered:
            assert self._task is not None
            self._task.cancel()
        else:
            # A task that is cancelled before its first step would close nothing.
            self._start()

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
            _running.add(self._task)
            self._task.add_done_callback(_running.discard)

    async def _run(self) -> None:
        self._entered = True
        iterator: AsyncIterator[Audio] | None = None
        try:
            iterator = aiter(self._source)
            if not self._stopped:
                await self._pull(iterator)
        except (Exception, asyncio.CancelledError) as error:
            if not self._stopped:
                self.error = error
                # Its words may hold what was to be said.
                log.error("a source of audio failed", error=type(error).__name__)
        self.ended = True
        await _close(iterator)
        if not self._stopped:
            self._stopped = True
            self._playback.fed(0.0)

    async def _pull(self, iterator: AsyncIterator[Audio]) -> None:
        async for chunk in iterator:
            if self._stopped:
                # The source has swallowed it.
                raise asyncio.CancelledError
            check_samples("an iterator of audio", chunk)
            if not self._playout.rate:
                self._playout.rate = check_rate(getattr(self._source, "sample_rate", None))
            if len(chunk):
                self.chunks.append(chunk)
                self.count += len(chunk)
                self._wanted.clear()
                self._playback.fed(len(chunk) / self._playout.rate)
                await self._wanted.wait()


async def _close(iterator: object) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        try:
            await close()
        except Exception as error:
            log.error("a source of audio did not close", error=type(error).__name__)


def check_samples(who: str, samples: object) -> Audio:
    """See that an array can be played.

    Raises:
        CodecError: It cannot.
    """
    if isinstance(samples, np.ndarray):
        if samples.dtype in (INT16, _FLOAT32) and samples.ndim == 1:
            return samples
        got = f"{samples.dtype} array of shape {samples.shape}"
    else:
        got = str(type(samples))
    raise CodecError(f"{who} wants a mono int16 array of shape (n,), or a float32 one from -1 to 1; got {got}")


def check_wishes(barge_in: object, text: object) -> None:
    """See that what comes along with audio is what is wanted: it is looked at while a call goes on.

    Raises:
        TypeError: It is something else.
    """
    if barge_in is not None and not isinstance(barge_in, BargeIn):
        raise TypeError(f"play() wants barge_in=BargeIn() or None; got {barge_in!r}")
    if isinstance(text, str) or not isinstance(text, Sequence) or not all(map(_is_said, text)):
        raise TypeError("play() wants text as pairs of a position in samples and the words that end there")


def _is_said(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int) and isinstance(item[1], str)


def check_rate(rate: object) -> int:
    """See that a rate can be played.

    Raises:
        CodecError: It cannot.
    """
    if not isinstance(rate, int) or rate not in RATES:
        raise CodecError(f"play() wants a rate of {RATES[0]} to {RATES[-1]} Hz, got {rate!r}")
    return rate


def to_int16(samples: Audio) -> Samples:
    """A piece as int16, contiguous: what is beyond full scale saturates, NaN is silence."""
    if samples.dtype == INT16:
        return np.ascontiguousarray(samples)
    # Clipped first: a float's largest times 32,768 is none any more.
    scaled = np.nan_to_num(np.clip(samples, -1.0, 1.0)) * np.float32(32768)
    converted: Samples = np.minimum(np.rint(scaled), 32767).astype(np.int16)
    return converted

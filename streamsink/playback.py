"""Outgoing audio: what is due when, marks, clear, and what the far end has heard.

A :class:`Playback` is one stream's queue and does no I/O: it is told the time and hands encoded messages to ``send``.
A :class:`Pacer` is the one clock that drives all of them.

The far end queues what it gets and plays it in order, so a frame starts there at max(sent, end of the one before).
That model says how much audio lies ahead of the listener: sending keeps it at :data:`LEAD`, enough to bridge a late
tick, little enough that a clear is prompt even where the platform ignores it.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator
from typing import Literal, NamedTuple

import numpy as np
import structlog

from streamsink.audio import Samples
from streamsink.codec import CodecSpec, Encoder, Resampler
from streamsink.errors import CodecError, StreamClosed
from streamsink.wire import Writer

log = structlog.get_logger(__name__)

LEAD = 0.1
"""Seconds of audio kept queued at the far end."""
LIVE_LEAD = 0.02
"""The same for a live source: what is pulled now is as fresh as can be."""
_EPSILON = 1e-6
"""Seconds; swallows the rounding of sums of durations."""

_INT16 = np.dtype(np.int16)
_SILENCE: Samples = np.zeros(0, np.int16)


class Outcome(enum.Enum):
    """How a playout ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """A clear dropped it."""
    CLOSED = "closed"
    """The stream ended first."""


class Played(NamedTuple):
    """What became of a playout: its outcome and how many milliseconds of it were heard."""

    outcome: Outcome
    played_ms: int


class Playout:
    """One piece of audio on its way out. Await it to learn how it ended; that never raises."""

    __slots__ = ("_end", "_future", "_heard", "_offset", "_playback", "_rate", "_result", "_samples", "_sent")

    def __init__(self, playback: Playback, samples: Samples, rate: int) -> None:
        self._playback = playback
        self._samples = samples
        self._rate = rate
        self._offset = 0
        # Samples handed to the far end, at _rate, and when the last of them will have been played there.
        self._sent = 0
        self._end = 0.0
        # Played to its end, with nobody waiting to hear of it.
        self._heard = False
        self._result: Played | None = None
        self._future: asyncio.Future[Played] | None = None

    @property
    def played_ms(self) -> int:
        """Milliseconds of it the far end has played by now."""
        if self._result is not None:
            return self._result.played_ms
        return self._played_ms(self._playback.clock())

    def cancel(self) -> None:
        """Take out what has not been sent yet; what is queued behind it moves up."""
        self._playback.cancel(self)

    def __await__(self) -> Generator[object, None, Played]:
        if self._heard:
            self._finish(Outcome.FINISHED, self._end)
        if self._result is None:
            if self._future is None:
                self._future = asyncio.get_running_loop().create_future()
                self._playback.wake()
            # Shielded: several may wait, and one that gives up must not end it for the others.
            return (yield from asyncio.shield(self._future).__await__())
        return self._result

    def _played_ms(self, now: float) -> int:
        unheard = 0.0 if self._heard or not self._sent else max(0.0, self._end + self._playback.lag - now)
        return max(0, round(self._sent * 1000 / self._rate - unheard * 1000))

    def _be_heard(self, now: float) -> None:
        """It was played to its end; a result is made only where somebody asks for it."""
        if self._future is not None:
            self._finish(Outcome.FINISHED, now)
        else:
            self._heard = True
            self._samples = _SILENCE

    def _finish(self, outcome: Outcome, now: float) -> None:
        if self._result is None:
            played = self._played_ms(now)
            self._samples = _SILENCE
            self._result = Played(outcome, played)
            if self._future is not None and not self._future.done():
                self._future.set_result(self._result)


class _QueuedMark(NamedTuple):
    name: str


class _Sent(NamedTuple):
    """A frame the far end has, at the stream's rate, and when it plays there."""

    start: float
    end: float
    samples: Samples


class Playback:
    """One stream's outgoing audio.

    Args:
        codec: What the stream is encoded in; its ptime is the length of a frame.
        writer: Makes the messages.
        send: Takes each message for the socket.
        wake: Called when :attr:`due` has moved up and the pacer should look again.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        codec: CodecSpec,
        writer: Writer,
        send: Callable[[bytes], None],
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._set_codec(codec)
        self.clock = clock
        self.wake = wake
        # Whoever wants to know what was heard sets this; frames are kept only then.
        self.on_played: Callable[[Samples, float], None] | None = None
        self.frames_sent = 0
        # False while the socket takes no more: what is queued waits.
        self._writable = True
        self._writer = writer
        self._send = send
        self._encoder: Encoder = codec.encoder()
        self._queue: deque[Playout | _QueuedMark] = deque()
        # At the stream's rate: made but less than a frame.
        self._partial: Samples = _SILENCE
        self._resampler: Resampler | None = None
        self._resampler_rate = codec.rate
        self._sending: list[Playout] = []
        self._marks_behind_partial: list[str] = []
        self._far_end = 0.0
        # When audio was last queued.
        self._fed_at = 0.0
        # How much later than modelled the far end plays, learned from mark echoes, in seconds.
        self.lag = 0.0
        self._pending_marks: deque[tuple[str, float]] = deque()
        self._cleared_marks: Counter[str] = Counter()
        self._finishing: deque[Playout] = deque()
        self._sent: deque[_Sent] = deque()
        self._live: Callable[[int], Samples] | None = None
        self._closed = False

    # --- What a stream calls ---

    def play(self, samples: Samples, rate: int) -> Playout:
        """Queue audio; what is due leaves at once.

        Args:
            samples: Mono PCM, shape ``(n,)``, int16. Must not change until the playout ends.
            rate: Hz.

        Raises:
            CodecError: The array or the rate cannot be used.
            StreamClosed: The stream has ended.
        """
        self._check_open()
        _check_samples("play()", samples)
        if not isinstance(rate, int) or not 8000 <= rate <= 192_000:
            raise CodecError(f"play() wants a rate of 8000 to 192000 Hz, got {rate!r}")
        playout = Playout(self, np.ascontiguousarray(samples), rate)
        now = self.clock()
        if len(samples) == self._frame_samples and rate == self.codec.rate and self._takes_a_frame(now):
            # What a relay does for every frame: nothing to cut, to join or to wait for.
            playout._offset = playout._sent = len(samples)
            self._send_frame(playout._samples, now)
            playout._end = self._far_end
            self._finishing.append(playout)
            self._settle_heard(now)
            if self.on_played is not None:
                self.wake()
            return playout
        self._queue.append(playout)
        self._fed_at = now
        self._advance_and_wake()
        return playout

    def play_live(self, source: Callable[[int], Samples] | None) -> None:
        """Pull audio from ``source`` for each frame, whenever nothing is queued; None ends that.

        Args:
            source: Given a number of samples, returns as many: mono PCM at the codec's rate, shape ``(n,)``, int16. One
                that raises, or returns something else, is logged and dropped.

        Raises:
            StreamClosed: The stream has ended.
        """
        self._check_open()
        self._live = source
        self._advance_and_wake()

    def mark(self, name: str) -> None:
        """Queue a mark behind the audio queued so far.

        Raises:
            StreamClosed: The stream has ended.
        """
        self._check_open()
        self._queue.append(_QueuedMark(name))
        self._advance_and_wake()

    def clear(self) -> list[str]:
        """Drop all that is queued, here and at the far end, in one step.

        Returns:
            The marks that are thereby cleared, in order.

        Raises:
            StreamClosed: The stream has ended.
        """
        self._check_open()
        now = self.clock()
        cleared = self._drop(Outcome.INTERRUPTED, now)
        self._send(self._writer.clear())
        return cleared

    def dtmf(self, digit: str) -> None:
        """Send one digit, ahead of whatever audio is queued.

        Raises:
            StreamClosed: The stream has ended.
        """
        self._check_open()
        self._send(self._writer.dtmf(digit))

    def cancel(self, playout: Playout) -> None:
        """Take one playout's unsent audio out of the queue; what followed moves up."""
        if playout in self._queue:
            self._queue.remove(playout)
            if playout in self._sending:
                self._sending.remove(playout)
            playout._finish(Outcome.CANCELLED, self.clock())
            self._advance_and_wake()

    def close(self) -> list[str]:
        """End everything: the stream is over.

        Returns:
            The marks whose echo never came, in order.
        """
        self._closed = True
        self._live = None
        now = self.clock()
        self._report_played(now)
        return self._drop(Outcome.CLOSED, now)

    # --- What the session and the pacer call ---

    def mark_echoed(self, name: str, now: float) -> bool:
        """A mark came back.

        Returns:
            Whether it tells that the audio before it has been played. An echo of a cleared mark, or of none of ours,
            does not.
        """
        if self._cleared_marks[name]:
            # Subtracting keeps no key at nought.
            self._cleared_marks -= Counter((name,))
            return False
        for index, (pending, end) in enumerate(self._pending_marks):
            if pending == name:
                del self._pending_marks[index]
                self.lag = max(0.0, now - end)
                return True
        return False

    def set_writable(self, flag: bool) -> None:
        """The socket takes no more, or takes more again."""
        self._writable = flag
        self._advance_and_wake()

    def set_ptime(self, ptime: int) -> None:
        """Send frames of this many milliseconds from now on."""
        self._set_codec(self.codec.with_ptime(ptime))

    def _set_codec(self, codec: CodecSpec) -> None:
        self.codec = codec
        self._frame_samples = codec.frame_samples
        self._frame_seconds = codec.ptime / 1000
        # The far end may have this much queued when a frame is sent.
        self._room = max(LEAD, 2 * self._frame_seconds) - self._frame_seconds + _EPSILON

    def set_byteorder(self, byteorder: Literal["little", "big"]) -> None:
        """Encode L16 in this byte order from now on."""
        self._encoder = self.codec.encoder(byteorder)

    @property
    def due(self) -> float | None:
        """When :meth:`advance` wants to be called next; None when nothing is waiting."""
        times = []
        if self._writable and self._queue:
            times.append(self._far_end - self._room + _EPSILON)
        elif self._writable and (len(self._partial) or self._resampler is not None):
            times.append(self._flush_at)
        elif self._writable and self._live is not None:
            times.append(self._far_end - LIVE_LEAD)
        if self._sent:
            times.append(self._sent[0].end + self.lag)
        times += [playout._end + self.lag for playout in self._finishing if playout._future is not None][:1]
        return min(times, default=None)

    def advance(self, now: float) -> None:
        """Send every frame and mark that is due, and settle what has been heard."""
        while self._writable and self._far_end - now <= self._room:
            frame = self._next_frame(now)
            if frame is None:
                break
            self._send_frame(frame, now)
        if self._sending and not len(self._partial):
            self._settle_sent()
        if self._live is not None:
            self._pull(now)
        self._settle_heard(now)

    # --- Inside ---

    def _pull(self, now: float) -> None:
        """Send what the live source has, as far as its lead allows and nothing queued comes first."""
        while self._live is not None and self._far_end - now <= LIVE_LEAD + _EPSILON and self._takes_a_frame(now):
            try:
                samples = self._live(self._frame_samples)
                _check_samples("a live source", samples)
                if len(samples) != self._frame_samples:
                    raise CodecError(f"a live source was asked for {self._frame_samples} samples, got {len(samples)}")
            except Exception:
                log.exception("live source dropped")
                self._live = None
            else:
                self._send_frame(np.ascontiguousarray(samples), now)

    def _takes_a_frame(self, now: float) -> bool:
        """Whether a whole frame may leave at once, with nothing before it."""
        return (
            self._writable
            and self._far_end - now <= self._room
            and not self._queue
            and not len(self._partial)
            and self._resampler is None
        )

    def _settle_heard(self, now: float) -> None:
        """Report and end what has been heard by now."""
        if self._sent:
            self._report_played(now)
        heard = now - self.lag + _EPSILON
        while self._finishing and self._finishing[0]._end <= heard:
            self._finishing.popleft()._be_heard(now)

    @property
    def _flush_at(self) -> float:
        """When less than a frame leaves, with silence behind it.

        By then the listener is about to hear the queue's end, and whoever fills the queue in small pieces has had a
        frame's time for the next one.
        """
        return max(self._far_end - self._frame_seconds, self._fed_at + self._frame_seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the stream has ended: nothing more can be sent on it")

    def _advance_and_wake(self) -> None:
        self.advance(self.clock())
        if self.due is not None:
            self.wake()

    def _next_frame(self, now: float) -> Samples | None:
        """The next frame's samples, or None when none is due; marks with no audio before them leave here."""
        wanted = self._frame_samples
        if not self._queue and not len(self._partial) and self._resampler is None:
            return None
        while len(self._partial) < wanted and self._queue:
            item = self._queue[0]
            if isinstance(item, _QueuedMark):
                self._queue.popleft()
                if len(self._partial):
                    self._marks_behind_partial.append(item.name)
                else:
                    self._send_mark(item.name)
                continue
            self._take(item, wanted)
        if len(self._partial) >= wanted:
            frame, self._partial = self._partial[:wanted], self._partial[wanted:]
            return frame
        unfinished = len(self._partial) or self._resampler is not None
        if not unfinished or now < self._flush_at - _EPSILON:
            return None
        if self._resampler is not None:
            self._append(self._resampler.flush())
            self._resampler = None
        if len(self._partial) < wanted:
            self._append(np.zeros(wanted - len(self._partial), np.int16))
        frame, self._partial = self._partial[:wanted], self._partial[wanted:]
        return frame

    def _take(self, playout: Playout, wanted: int) -> None:
        """Move samples of the queue's first playout towards the frame, at the stream's rate."""
        rate = playout._rate
        if rate != self._resampler_rate:
            if self._resampler is not None:
                self._append(self._resampler.flush())
            self._resampler = None
            self._resampler_rate = rate
        missing = wanted - len(self._partial)
        count = min(len(playout._samples) - playout._offset, max(1, -(-missing * rate // self.codec.rate)))
        piece = playout._samples[playout._offset : playout._offset + count]
        if rate != self.codec.rate:
            if self._resampler is None:
                self._resampler = Resampler(rate, self.codec.rate)
            piece = self._resampler.push(piece)
        playout._offset += count
        self._append(piece)
        if playout not in self._sending:
            self._sending.append(playout)
        if playout._offset >= len(playout._samples):
            self._queue.popleft()

    def _append(self, piece: Samples) -> None:
        self._partial = np.concatenate((self._partial, piece)) if len(self._partial) else piece

    def _send_frame(self, frame: Samples, now: float) -> None:
        self._send(self._writer.media(self._encoder.encode(frame)))
        self.frames_sent += 1
        start = max(now, self._far_end)
        self._far_end = start + len(frame) / self.codec.rate
        if self.on_played is not None:
            self._sent.append(_Sent(start, self._far_end, frame))
        if self._sending:
            self._settle_sent()
        if self._marks_behind_partial:
            for name in self._marks_behind_partial:
                self._send_mark(name)
            self._marks_behind_partial.clear()

    def _settle_sent(self) -> None:
        """Note how far each playout has got; one that is sent to its end waits to be heard."""
        still_sending: list[Playout] = []
        for playout in self._sending:
            playout._sent = playout._offset
            playout._end = self._far_end
            (still_sending if playout._offset < len(playout._samples) else self._finishing).append(playout)
        self._sending = still_sending

    def _send_mark(self, name: str) -> None:
        self._send(self._writer.mark(name))
        self._pending_marks.append((name, self._far_end))

    def _report_played(self, now: float) -> None:
        while self._sent and self._sent[0].end + self.lag <= now + _EPSILON:
            frame = self._sent.popleft()
            assert self.on_played is not None
            self.on_played(frame.samples, frame.start + self.lag)

    def _drop(self, outcome: Outcome, now: float) -> list[str]:
        """Forget all that is queued here and, as far as it is not played yet, at the far end."""
        sent_marks = [name for name, _ in self._pending_marks]
        self._cleared_marks.update(sent_marks)
        marks = [*sent_marks, *self._marks_behind_partial]
        marks += [item.name for item in self._queue if isinstance(item, _QueuedMark)]
        playouts = [*self._finishing, *self._sending]
        playouts += [item for item in self._queue if isinstance(item, Playout)]
        for playout in playouts:
            finished = playout in self._finishing and playout._end + self.lag <= now
            playout._finish(Outcome.FINISHED if finished else outcome, now)
        self._report_played(now)
        if self._sent and self.on_played is not None:
            # The frame being heard at this moment is cut where the listener is.
            start, _, samples = self._sent[0]
            heard = int((now - start - self.lag) * self.codec.rate)
            if heard > 0:
                self.on_played(samples[:heard], start + self.lag)
        self._queue.clear()
        self._finishing.clear()
        self._sending.clear()
        self._sent.clear()
        self._pending_marks.clear()
        self._marks_behind_partial.clear()
        self._partial = _SILENCE
        self._resampler = None
        self._resampler_rate = self.codec.rate
        self._far_end = min(self._far_end, now)
        return marks


def _check_samples(who: str, samples: object) -> None:
    if not isinstance(samples, np.ndarray) or samples.dtype != _INT16 or samples.ndim != 1:
        got = f"{samples.dtype} array of shape {samples.shape}" if isinstance(samples, np.ndarray) else type(samples)
        raise CodecError(f"{who} wants a mono int16 array of shape (n,), got {got}")


class Pacer:
    """One clock for all streams' outgoing audio: it wakes at the earliest due time, on absolute deadlines.

    Args:
        loop: The event loop whose ``call_at`` and ``time`` it uses.
        on_late: Told of each tick how many seconds after a frame's due time it came.
    """

    SLACK = 0.001
    """Seconds: what falls due this soon after a tick goes out with it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_late: Callable[[float], None]) -> None:
        self._loop = loop
        self._on_late = on_late
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
            self._on_late(max(0.0, now - due))
            try:
                playback.advance(max(now, due))
            except Exception:
                log.exception("a stream's outgoing audio failed")
                continue
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

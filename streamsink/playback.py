"""Outgoing audio: what is due when, marks, clear, and what the far end has heard.

A :class:`Playback` is one stream's queue and does no I/O: it is told the time and hands encoded messages to ``send``.

The far end queues what it gets and plays it in order, so a frame starts there at max(sent, end of the one before).
That model says how much audio lies ahead of the listener: sending keeps it at a lead, enough to bridge a late tick,
little enough that a clear is prompt even where the platform ignores it. The far end's clock is not ours: how long a
frame lasts there follows the slope of the audio that comes from it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import structlog

from streamsink.audio import Samples
from streamsink.codec import CodecSpec, Encoder, Resampler
from streamsink.errors import CodecError, PlayoutFull, StreamClosed
from streamsink.gain import Gain, factor, mixed
from streamsink.playout import (
    INT16,
    NOTHING,
    PULL_AHEAD,
    Audio,
    BargeIn,
    Outcome,
    Played,
    Playout,
    RichPlayout,
    check_rate,
    check_samples,
    check_wishes,
    to_int16,
)
from streamsink.wire import Writer

__all__ = ["LEAD", "LIVE_LEAD", "BargeIn", "Outcome", "Playback", "Played", "Playout"]

log = structlog.get_logger(__name__)

LEAD = 0.1
"""Seconds of audio kept queued at the far end, unless the settings say otherwise."""
LIVE_LEAD = 0.02
"""The same while there is a live source: what is pulled now is as fresh as can be."""
LIVE_DUCK_DB = 12.0
"""How much quieter a live source is while queued audio plays."""
QUEUE_LIMIT = 600.0
"""Seconds of audio that may be queued on one stream."""
ITEMS_LIMIT = 100_000
"""Pieces it may be queued in: ten minutes of the shortest frames and then some."""
MARKS_LIMIT = 10_000
"""Marks of one stream whose echo has not come."""
MARK_NAME_LIMIT = 1000
"""Characters of a mark's name: it comes back in a message, which may not be longer than any."""
UNCONFIRMED_AFTER = 5.0
"""Seconds after its audio must have ended that a mark's echo is waited for; the same for one that was cleared."""
_EPSILON = 1e-6
"""Seconds; swallows the rounding of sums of durations."""


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
        lead: Seconds of audio to keep queued at the far end.

    Attributes:
        on_played: Given samples the far end has certainly heard, and when they began; frames are kept only while set.
        on_sent: Given each frame as it is sent, and when it begins to play there as far as is known; for whoever must
            know our own voice when it comes back. It may not call anything here.
        on_barge_in: Called when something is queued that a talker may barge in on.
        on_unconfirmed: Given the name of each mark whose echo has not come in time.
        frames_sent: Media messages sent.
        underruns: How often the far end had nothing left to play in the middle of something.
        lag: How much later than modelled the far end plays, learned from mark echoes, in seconds.
    """

    __slots__ = (
        "_cleared_marks",
        "_closed",
        "_encoder",
        "_far_end",
        "_fed_at",
        "_feeds",
        "_finishing",
        "_frame_samples",
        "_frame_seconds",
        "_frame_shape",
        "_gain",
        "_lead",
        "_live",
        "_live_from",
        "_live_gain",
        "_marks",
        "_marks_behind_partial",
        "_more",
        "_partial",
        "_pending_marks",
        "_queue",
        "_queued",
        "_rate",
        "_resampler",
        "_resampler_rate",
        "_room",
        "_seconds_a_sample",
        "_send",
        "_sending",
        "_sent",
        "_slope",
        "_writable",
        "_writable_since",
        "_writer",
        "clock",
        "codec",
        "frames_sent",
        "lag",
        "on_barge_in",
        "on_played",
        "on_sent",
        "on_unconfirmed",
        "underruns",
        "wake",
    )

    def __init__(
        self,
        codec: CodecSpec,
        writer: Writer,
        send: Callable[[bytes], None],
        wake: Callable[[], None],
        clock: Callable[[], float],
        lead: float = LEAD,
    ) -> None:
        self._lead = lead
        self._slope = 1.0
        self._set_codec(codec)
        self.clock = clock
        self.wake = wake
        self.on_played: Callable[[Samples, float], None] | None = None
        self.on_sent: Callable[[Samples, float], None] | None = None
        self.on_barge_in: Callable[[], None] | None = None
        self.on_unconfirmed: Callable[[str], None] | None = None
        self.frames_sent = 0
        self.underruns = 0
        self.lag = 0.0
        # False while the socket takes no more: what is queued waits.
        self._writable = True
        self._writable_since = 0.0
        self._writer = writer
        self._send = send
        self._encoder: Encoder = codec.encoder()
        self._queue: deque[Playout | _QueuedMark] = deque()
        # Seconds of audio in it, sources in it, and all marks that are neither echoed nor cleared.
        self._queued = 0.0
        self._feeds = 0
        self._marks = 0
        # At the stream's rate: made but less than a frame.
        self._partial: Samples = NOTHING
        self._resampler: Resampler | None = None
        self._resampler_rate = codec.rate
        self._sending: list[Playout] = []
        self._marks_behind_partial: list[str] = []
        self._far_end = 0.0
        # Whether there was more to send after what was sent last.
        self._more = False
        # When audio was last queued.
        self._fed_at = 0.0
        self._pending_marks: deque[tuple[str, float]] = deque()
        # And when they were cleared.
        self._cleared_marks: deque[tuple[str, float]] = deque(maxlen=MARKS_LIMIT)
        self._finishing: deque[Playout] = deque()
        self._sent: deque[_Sent] = deque()
        # None as long as queued audio goes out as loud as it is.
        self._gain: Gain | None = None
        self._live: Callable[[int], Samples] | None = None
        self._live_from = 0.0
        self._live_gain: Gain | None = None
        self._closed = False

    # --- What a stream calls ---

    def play(
        self,
        samples: Audio | AsyncIterable[Audio],
        rate: int | None,
        barge_in: BargeIn | None = None,
        text: Sequence[tuple[int, str]] = (),
    ) -> Playout:
        """Queue audio; what is due leaves at once.

        Args:
            samples: Mono PCM, shape ``(n,)``, int16 or float32 from -1 to 1, which must not change until the playout
                ends; or an async iterator of such arrays, which is pulled at most `PULL_AHEAD` seconds before its
                audio is due, and closed when the playout has ended.
            rate: Hz. None with an iterator: its attribute ``sample_rate`` tells, once the first array has come.
            barge_in: What a talker may do to it.
            text: See :attr:`Playout.text`.

        Raises:
            CodecError: The array or the rate cannot be used.
            PlayoutFull: More would be queued than `QUEUE_LIMIT`.
            StreamClosed: The stream has ended.
            TypeError: ``barge_in`` or ``text`` is something else.
        """
        if self._closed:
            self._check_open()
        now = self.clock()
        if (
            isinstance(samples, np.ndarray)
            and samples.shape == self._frame_shape
            and samples.dtype == INT16
            and rate == self._rate
            and self._far_end - now <= self._room
            and self._writable
            and not self._queue
            and not len(self._partial)
            and self._resampler is None
            and self._live is None
            and barge_in is None
            and not text
        ):
            # What a relay does for every frame: nothing to cut, to join or to wait for.
            playout = Playout(self, samples, rate)
            playout.offset = playout.sent = len(samples)
            frame: Samples = np.ascontiguousarray(samples)
            self._send_frame(frame if self._gain is None else self._ducked(frame), now)
            playout.end = self._far_end
            self._finishing.append(playout)
            self._settle_heard(now)
            if self.on_played is not None:
                self.wake()
            return playout
        if barge_in is not None or text:
            check_wishes(barge_in, text)
        if isinstance(samples, AsyncIterable):
            playout = RichPlayout(self, samples, 0 if rate is None else check_rate(rate), barge_in, text)
        else:
            samples, rate = check_samples("play()", samples), check_rate(rate)
            if barge_in is None and not text:
                playout = Playout(self, samples, rate)
            else:
                playout = RichPlayout(self, samples, rate, barge_in, text)
        self._check_room(playout.waiting)
        if barge_in is not None and self.on_barge_in is not None:
            self.on_barge_in()
        self._feeds += playout.feed is not None
        self._queue.append(playout)
        self.fed(playout.waiting)
        return playout

    def play_live(self, source: Callable[[int], Samples] | None, after: float = 0.0) -> None:
        """Pull audio from ``source`` for each frame; None ends that.

        While queued audio plays the source is `LIVE_DUCK_DB` quieter and both are heard.

        Args:
            source: Given a number of samples, returns as many: mono PCM at the codec's rate, shape ``(n,)``, int16. One
                that raises, or returns something else, is logged and dropped.
            after: Seconds until it is pulled first; what is queued waits with it.

        Raises:
            StreamClosed: The stream has ended.
            TypeError: It cannot be called.
        """
        self._check_open()
        if source is not None and not callable(source):
            raise TypeError(f"play_live() wants a function that is given a number of samples; got {source!r}")
        self._live = source
        self._live_from = self.clock() + after
        self._advance_and_wake()

    def duck(self, db: float) -> None:
        """Make what is queued, and all that follows, ``db`` quieter; 0 makes it as loud as it is again.

        A live source stays as it is. A clear ends it.

        Args:
            db: 0 or more.
        """
        if self._gain is None:
            if not db:
                return
            self._gain = Gain(self._rate)
        self._gain.slide(factor(db))

    def mark(self, name: str) -> None:
        """Queue a mark behind the audio queued so far.

        Raises:
            PlayoutFull: `MARKS_LIMIT` marks have not come back.
            StreamClosed: The stream has ended.
            ValueError: The name is no text of 1 to `MARK_NAME_LIMIT` characters.
        """
        self._check_open()
        if not isinstance(name, str) or not 0 < len(name) <= MARK_NAME_LIMIT:
            got = f"{len(name):,} characters" if isinstance(name, str) else type(name).__name__
            raise ValueError(f"mark() wants a name as str, 1 to {MARK_NAME_LIMIT:,} characters long; got {got}")
        if self._marks >= MARKS_LIMIT:
            raise PlayoutFull(f"{MARKS_LIMIT:,} marks of this stream have not come back: wait for on_mark")
        self._marks += 1
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
        unheard, cleared = self._drop(Outcome.INTERRUPTED, now)
        self._send(self._writer.clear())
        # Told last: whoever answers it at once is behind the clear.
        self._report_cut(unheard, now)
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
            self._left(playout)
            if playout in self._sending:
                self._sending.remove(playout)
            playout.finish(Outcome.CANCELLED, self.clock())
            self._advance_and_wake()

    def close(self) -> list[str]:
        """End everything: the stream is over.

        Returns:
            The marks whose echo never came, in order.
        """
        self._closed = True
        self._live = None
        now = self.clock()
        unheard, marks = self._drop(Outcome.CLOSED, now)
        self._report_cut(unheard, now)
        return marks

    # --- What the session, the pacer and sources call ---

    def fed(self, seconds: float) -> None:
        """So much more audio is there, or a source has come to its end."""
        self._queued += seconds
        self._fed_at = self.clock()
        self._advance_and_wake()

    def mark_echoed(self, name: str, now: float) -> bool:
        """A mark came back.

        Returns:
            Whether it tells that the audio before it has been played. An echo of a cleared mark, or of none of ours,
            does not.
        """
        while self._cleared_marks and self._cleared_marks[0][1] + UNCONFIRMED_AFTER < now:
            self._cleared_marks.popleft()
        for index, (cleared, _) in enumerate(self._cleared_marks):
            if cleared == name:
                del self._cleared_marks[index]
                return False
        for index, (pending, end) in enumerate(self._pending_marks):
            if pending == name:
                del self._pending_marks[index]
                self._marks -= 1
                self.lag = max(0.0, now - end)
                return True
        return False

    def set_writable(self, flag: bool) -> None:
        """The socket takes no more, or takes more again."""
        self._writable = flag
        # Nothing to do when it takes no more: it says so while a frame is being sent.
        if flag:
            self._writable_since = self.clock()
            self._advance_and_wake()

    def set_ptime(self, ptime: int) -> None:
        """Send frames of this many milliseconds from now on."""
        self._set_codec(self.codec.with_ptime(ptime))

    def set_slope(self, slope: float) -> None:
        """The far end plays so many seconds of audio in a second of ours."""
        self._slope = slope
        self._seconds_a_sample = 1 / (self._rate * slope)

    def _set_codec(self, codec: CodecSpec) -> None:
        self.codec = codec
        self._rate = codec.rate
        self._frame_samples = codec.frame_samples
        self._frame_shape = (codec.frame_samples,)
        self._frame_seconds = codec.ptime / 1000
        # The far end may have this much queued when a frame is sent.
        self._room = max(self._lead, 2 * self._frame_seconds) - self._frame_seconds + _EPSILON
        self.set_slope(self._slope)

    def set_byteorder(self, byteorder: Literal["little", "big"]) -> None:
        """Encode L16 in this byte order from now on."""
        self._encoder = self.codec.encoder(byteorder)

    @property
    def due(self) -> float | None:
        """When :meth:`advance` wants to be called next; None when nothing is waiting."""
        times = []
        if self._writable:
            if self._live is not None:
                times.append(max(self._far_end - LIVE_LEAD, self._live_from))
            elif self._queue and not self._starved:
                times.append(self._far_end - self._room + _EPSILON)
            elif len(self._partial) or self._resampler is not None:
                times.append(self._flush_at)
            if self._pending_marks:
                times.append(self._gives_up_at)
        if self._sent:
            times.append(self._sent[0].end + self.lag)
        times += [playout.end + self.lag for playout in self._finishing if playout.awaited][:1]
        return min(times, default=None)

    def advance(self, now: float) -> None:
        """Send every frame and mark that is due, and settle what has been heard."""
        if self._live is not None:
            self._pull(now)
        if self._live is None:
            while self._writable and self._far_end - now <= self._room:
                frame = self._next_frame(now)
                if frame is None:
                    break
                self._send_frame(frame if self._gain is None else self._ducked(frame), now)
        if self._sending and not len(self._partial):
            self._settle_sent()
        if self._feeds:
            self._want()
        self._more = self._live is not None or (bool(self._queue) and not self._unbegun)
        self._settle_heard(now)
        while self._writable and self._pending_marks and self._gives_up_at <= now:
            name, _ = self._pending_marks.popleft()
            self._marks -= 1
            if self.on_unconfirmed is not None:
                self.on_unconfirmed(name)

    def ahead(self, now: float) -> float:
        """Seconds of audio the far end has left to play."""
        return max(0.0, self._far_end - now)

    @property
    def barge_in(self) -> BargeIn | None:
        """What a talker may do to what is played at this moment."""
        heard = self.clock() - self.lag
        sent = itertools.chain((playout for playout in self._finishing if playout.end > heard), self._sending)
        playing = next(sent, None)
        return None if playing is None else playing.barge_in

    # --- Inside ---

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the stream has ended: nothing more can be sent on it")

    def _check_room(self, seconds: float) -> None:
        if self._queued + seconds > QUEUE_LIMIT or len(self._queue) >= ITEMS_LIMIT:
            raise PlayoutFull(
                f"{self._queued:.0f} s of audio in {len(self._queue)} pieces are queued, {seconds:.0f} s more are too"
                f" much: a stream takes {QUEUE_LIMIT:.0f} s; await a playout first, or give an async iterator"
            )

    def _advance_and_wake(self) -> None:
        self.advance(self.clock())
        if self.due is not None:
            self.wake()

    def _ducked(self, frame: Samples) -> Samples:
        assert self._gain is not None
        quieter = self._gain.apply(frame)
        if self._gain.idle:
            self._gain = None
        return quieter

    def _pull(self, now: float) -> None:
        """Send what the live source has, as far as its lead allows, and what is queued along with it."""
        if now < self._live_from:
            return
        while self._writable and self._far_end - now <= LIVE_LEAD + _EPSILON:
            frame = self._from_live()
            if frame is None:
                return
            queued = self._next_frame(now)
            if queued is not None or self._queue or len(self._partial):
                if self._live_gain is None:
                    self._live_gain = Gain(self._rate)
                self._live_gain.slide(factor(LIVE_DUCK_DB))
            elif self._live_gain is not None:
                self._live_gain.slide(1.0)
            if self._live_gain is not None:
                frame = self._live_gain.apply(frame)
                if self._live_gain.idle:
                    self._live_gain = None
            if queued is not None:
                frame = mixed(frame, queued if self._gain is None else self._ducked(queued))
            self._send_frame(frame, now)

    def _from_live(self) -> Samples | None:
        """The live source's next frame; None when it failed, which is its end."""
        assert self._live is not None
        try:
            samples = self._live(self._frame_samples)
            if not isinstance(samples, np.ndarray) or samples.dtype != INT16 or samples.shape != self._frame_shape:
                got = f"{samples.dtype} of shape {samples.shape}" if isinstance(samples, np.ndarray) else type(samples)
                raise CodecError(f"a live source was asked for int16 of shape {self._frame_shape}, got {got}")
        except Exception:
            log.exception("live source dropped")
            self._live = self._live_gain = None
            return None
        return np.ascontiguousarray(samples)

    @property
    def _starved(self) -> bool:
        """Whether what comes next is waited for."""
        head = self._queue[0]
        return isinstance(head, Playout) and head.starved

    @property
    def _unbegun(self) -> bool:
        """Whether what comes next is waited for and nothing of it has been sent yet."""
        head = self._queue[0]
        return isinstance(head, Playout) and not head.sent and head.starved

    def _want(self) -> None:
        """Have the sources pulled whose audio is soon due."""
        ahead = 0.0
        for item in self._queue:
            if isinstance(item, Playout):
                ahead += item.waiting
                if ahead >= PULL_AHEAD:
                    return
                if item.feed is not None and not item.feed.ended:
                    item.feed.want()
                    # How long it is nobody knows.
                    return

    def _left(self, playout: Playout) -> None:
        """A playout is no longer in the queue."""
        self._queued = self._queued - playout.waiting if self._queue else 0.0
        self._feeds -= playout.feed is not None

    def _settle_heard(self, now: float) -> None:
        """Report and end what has been heard by now."""
        if self._sent:
            self._report_played(now)
        heard = now - self.lag + _EPSILON
        while self._finishing and self._finishing[0].end <= heard:
            self._finishing.popleft().be_heard(now)

    @property
    def _flush_at(self) -> float:
        """When less than a frame leaves, with silence behind it.

        By then the listener is about to hear the queue's end, and whoever fills the queue in small pieces has had a
        frame's time for the next one.
        """
        return max(self._far_end - self._frame_seconds, self._fed_at + self._frame_seconds)

    @property
    def _gives_up_at(self) -> float:
        """When the first mark's echo is no longer waited for; a socket that takes no more has not sent it."""
        return max(self._pending_marks[0][1] + self.lag, self._writable_since) + UNCONFIRMED_AFTER

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
                    self._send_mark(item.name, now)
            elif item.starved:
                break
            else:
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
        rate = playout.rate
        if rate and not playout.exhausted:
            if rate != self._resampler_rate:
                if self._resampler is not None:
                    self._append(self._resampler.flush())
                self._resampler = None
                self._resampler_rate = rate
            missing = wanted - len(self._partial)
            piece = playout.take(max(1, -(-missing * rate // self._rate)))
            self._queued -= len(piece) / rate
            samples = to_int16(piece)
            if rate != self._rate:
                if self._resampler is None:
                    self._resampler = Resampler(rate, self._rate)
                samples = self._resampler.push(samples)
            self._append(samples)
        if playout not in self._sending:
            self._sending.append(playout)
        if playout.exhausted:
            self._queue.popleft()
            self._left(playout)

    def _append(self, piece: Samples) -> None:
        self._partial = np.concatenate((self._partial, piece)) if len(self._partial) else piece

    def _send_frame(self, frame: Samples, now: float) -> None:
        self._send(self._writer.media(self._encoder.encode(frame)))
        self.frames_sent += 1
        start = self._far_end
        if start < now:
            if self._more and start + _EPSILON < now:
                self.underruns += 1
            start = now
        self._far_end = start + len(frame) * self._seconds_a_sample
        if self.on_sent is not None:
            self.on_sent(frame, start + self.lag)
        if self.on_played is not None:
            self._sent.append(_Sent(start, self._far_end, frame))
        if self._sending:
            self._settle_sent()
        if self._marks_behind_partial:
            for name in self._marks_behind_partial:
                self._send_mark(name, now)
            self._marks_behind_partial.clear()

    def _settle_sent(self) -> None:
        """Note how far each playout has got; one that is sent to its end waits to be heard."""
        still_sending: list[Playout] = []
        for playout in self._sending:
            playout.sent = playout.taken
            playout.end = self._far_end
            (self._finishing if playout.exhausted else still_sending).append(playout)
        self._sending = still_sending

    def _send_mark(self, name: str, now: float) -> None:
        self._send(self._writer.mark(name))
        self._pending_marks.append((name, max(self._far_end, now)))

    def _report_played(self, now: float) -> None:
        while self._sent and self._sent[0].end + self.lag <= now + _EPSILON:
            frame = self._sent.popleft()
            assert self.on_played is not None
            self.on_played(frame.samples, frame.start + self.lag)

    def _drop(self, outcome: Outcome, now: float) -> tuple[deque[_Sent], list[str]]:
        """Forget all that is queued here and, as far as it is not played yet, at the far end.

        Returns:
            What was sent and is not reported as heard, and the marks that will not come back.
        """
        sent_marks = [name for name, _ in self._pending_marks]
        self._cleared_marks.extend((name, now) for name in sent_marks)
        marks = [*sent_marks, *self._marks_behind_partial]
        marks += [item.name for item in self._queue if isinstance(item, _QueuedMark)]
        playouts = [*self._finishing, *self._sending]
        playouts += [item for item in self._queue if isinstance(item, Playout)]
        for playout in playouts:
            finished = playout in self._finishing and playout.end + self.lag <= now
            playout.finish(Outcome.FINISHED if finished else outcome, now)
        unheard, self._sent = self._sent, deque()
        self._queue.clear()
        self._queued = 0.0
        self._feeds = self._marks = 0
        self._finishing.clear()
        self._sending.clear()
        self._pending_marks.clear()
        self._marks_behind_partial.clear()
        self._partial = NOTHING
        self._resampler = None
        self._resampler_rate = self._rate
        self._gain = None
        self._far_end = min(self._far_end, now)
        self._more = False
        return unheard, marks

    def _report_cut(self, sent: deque[_Sent], now: float) -> None:
        """Report what was heard of what a clear dropped: the frame being heard is cut where the listener is."""
        for start, end, samples in sent:
            heard = len(samples) if end + self.lag <= now + _EPSILON else int((now - start - self.lag) * self._rate)
            if heard <= 0:
                break
            assert self.on_played is not None
            self.on_played(samples[:heard], start + self.lag)

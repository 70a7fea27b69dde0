"""Mixing: on each tick of one clock everybody's audio is summed once, and each hears the sum less their own.

A mixer does no I/O, keeps no timer and reads no clock: it is told the time, and works off the ticks that are due.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import structlog
from numpy.typing import NDArray

from streamsink.audio import Frame, Samples
from streamsink.codec import Resampler
from streamsink.room.jitter import SPARE, JitterBuffer
from streamsink.room.limiter import Limiter
from streamsink.room.speaker import FLOOR, ActiveSpeaker
from streamsink.speech.events import Speaker

log = structlog.get_logger(__name__)

Mode = Literal["both", "listen", "speak"]
"""What a member does in a room."""

TICK = 0.02
"""Seconds between two sums."""
MOST_BEHIND = 1.0
"""Seconds a mixer catches up with; what is further behind is left out."""
FETCH = 0.003
"""Seconds after a tick that its mix is best fetched."""
OUT_DELAY = FETCH + SPARE
"""Seconds that the mix waits at least for a member to fetch it; more where the two clocks stand otherwise."""
MOST_GAIN_DB = 20.0


class Member:
    """One member's side of a mixer: audio goes in with :meth:`hear` and comes out with :meth:`source`.

    Args:
        mixer: What it is part of.
        sid: Who it is: the stream's streamSid. Of one that is far who of its members talks, empty until that is known.
        name: The stream's name.
        rate: Hz of its audio, both ways.
        mode: Whether it speaks, listens, or both.
        far: Whether it is another mixer, with the members it has.

    Attributes:
        on_block: Where set, each tick's mix goes there at once, at the member's rate: samples, their position on the
            mixer's clock in samples at that rate, and when; a few more where the mixer's rate changes. :meth:`source`
            is not for such a member: its leg lives elsewhere, and so does the buffer that its clock is followed with.
        on_speaker: Told of each change of the active speaker.
        gone: Whether it has left.
    """

    def __init__(self, mixer: Mixer, sid: str, name: str | None, rate: int, mode: Mode, *, far: bool = False) -> None:
        self.far = far
        self.sid = sid
        self.name = name
        self.rate = rate
        self.mode: Mode = mode
        self.on_block: Callable[[Samples, int, float], None] | None = None
        self.on_speaker: Callable[[Speaker], None] | None = None
        self.gone = False
        self.jitter = JitterBuffer(rate)
        self.out = JitterBuffer(rate, OUT_DELAY, OUT_DELAY)
        self._mixer = mixer
        self._block = round(rate * TICK)
        self._muted = False
        self._gain = 1.0
        # What is applied now, and slid to in one tick.
        self._in_level = self._in_target = 1.0
        self._out_level = self._out_target = 1.0
        self._position = 0
        # Nothing is kept before: how long it has to wait is known when the first has been fetched.
        self._fetched = False
        self._in: Resampler | None = None
        self._out: Resampler | None = None
        self._to_rate(mixer.rate)

    @property
    def speaks(self) -> bool:
        """Whether the others may hear it."""
        return self.mode != "listen"

    @property
    def listens(self) -> bool:
        """Whether it may hear the others."""
        return self.mode != "speak"

    # --- At run time ---

    @property
    def muted(self) -> bool:
        """Whether nobody hears it."""
        return self._muted

    @muted.setter
    def muted(self, muted: bool) -> None:
        self._muted = muted
        self._in_target = 0.0 if muted else self._gain

    @property
    def deafened(self) -> bool:
        """Whether it hears nobody."""
        return self._out_target == 0.0

    @deafened.setter
    def deafened(self, deafened: bool) -> None:
        self._out_target = 0.0 if deafened else 1.0

    @property
    def gain_db(self) -> float:
        """How much louder than it is the others hear it; dB, 20 at most."""
        return 20 * math.log10(self._gain)

    @gain_db.setter
    def gain_db(self, db: float) -> None:
        if not -100 <= db <= MOST_GAIN_DB:
            raise ValueError(f"gain_db is {db}; wanted -100 to {MOST_GAIN_DB:g} dB (mute with muted = True)")
        self._gain = 10 ** (db / 20)
        if not self._muted:
            self._in_target = self._gain

    @property
    def level_dbfs(self) -> float:
        """How loud it is at the moment, dBFS."""
        return self._mixer.level_of(self)

    # --- Audio ---

    def hear(self, frame: Frame, now: float) -> None:
        """Take a frame of what this member says, at its rate; what is missing before it is made up."""
        if self.speaks and not self.gone:
            self.jitter.push(frame.samples, frame.start, now)

    def source(self, n: int, now: float) -> Samples:
        """The next ``n`` samples of what this member hears, at its rate: shape ``(n,)``, int16, an array of its own."""
        self._mixer.advance(now)
        self._fetched = True
        return self.out.pull(n, now).copy()

    def leave(self) -> None:
        """Be no member any more; once is enough."""
        if not self.gone:
            self.gone = True
            self._in_target = 0.0
            self._mixer.left(self)

    # --- For the mixer ---

    def _to_rate(self, rate: int) -> None:
        """The mixer works at another rate from now on; what goes in and out is silent at this moment."""
        if self is self._mixer.uplink:
            # Whoever gets it takes any rate: what the mixer has is what it gives.
            self.rate = rate
            self._block = round(rate * TICK)
            self._position = 0
        tail = self._out.flush() if self._out is not None else None
        if tail is not None and len(tail):
            self._give(tail, self._mixer.now)
        self._in = None if rate == self.rate else Resampler(self.rate, rate)
        self._out = None if rate == self.rate else Resampler(rate, self.rate)

    def _said(self, at: float) -> NDArray[np.int32] | Samples:
        """What it says in this tick, at the mixer's rate."""
        samples: NDArray[np.int32] | Samples = self.jitter.pull(self._block, at)
        if self._in is not None:
            samples = self._in.push(samples)  # type: ignore[arg-type]
        level, target = self._in_level, self._in_target
        if level == target == 1.0:
            return samples
        self._in_level = target
        louder: NDArray[np.int32] = np.rint(samples * _ramp(level, target, len(samples))).astype(np.int32)
        return louder

    def _hears(self, mix: Samples, at: float) -> None:
        level, target = self._out_level, self._out_target
        if level != 1.0 or target != 1.0:
            self._out_level = target
            mix = np.rint(mix * _ramp(level, target, len(mix))).astype(np.int16)
        if self._out is not None:
            mix = self._out.push(mix)
        self._give(mix, at)

    def _give(self, samples: Samples, at: float) -> None:
        position = self._position
        self._position += len(samples)
        if self.on_block is not None:
            self.on_block(samples, position, at)
        elif self._fetched:
            self.out.push(samples, position, at)


def _ramp(level: float, target: float, n: int) -> NDArray[np.float32]:
    if level == target:
        return np.full(n, level, np.float32)
    return np.linspace(level, target, n, dtype=np.float32)


class Mixer:
    """Everybody's audio, summed once a tick.

    Args:
        rate: Hz it works at; it rises to that of a member who has more, unless ``fixed``.
        now: Seconds, when its clock begins.
        fixed: Whether the rate stays.

    Attributes:
        rate: Hz it works at now.
        began: Seconds, when its clock began.
        now: When the last tick was.
        members: Who is part of it.
        uplink: Where set, who hears what those say that are not far: what other mixers are sent.
        on_mix: Given each tick's whole mix, its position in samples at the rate the mixer began with, and when; an
            array of its own.
        on_speaker: Told of each change of the active speaker.
        failed: Told of a member whose audio could not be had or delivered; it has left.
    """

    def __init__(self, rate: int, now: float, *, fixed: bool = False) -> None:
        self.rate = self.first_rate = rate
        self.fixed = fixed
        self.began = self.now = now
        self.members: list[Member] = []
        self.uplink: Member | None = None
        self.on_mix: Callable[[Samples, int, float], None] | None = None
        self.on_speaker: Callable[[Speaker], None] | None = None
        self.failed: Callable[[Member, Exception], None] | None = None
        self.ticks = 0
        self._next = now + TICK
        # The members that leave speak for one tick more, ever softer.
        self._speaking: list[Member] = []
        self._hearing: list[Member] = []
        self._same = True
        # Rows among those who hear, and among those who speak, of who does both.
        self._own: tuple[list[int], list[int]] = ([], [])
        # Row of the uplink among those who hear, and rows of those who are far among those who speak.
        self._near: tuple[int, list[int]] | None = None
        self._speaker: ActiveSpeaker[Member] = ActiveSpeaker()
        # The streamSid of whom everybody was told of.
        self._told: str | None = None
        self._limiter = Limiter(round(rate * TICK))
        self._limiter.add()
        self._to_stream: Resampler | None = None
        self._wanted_rate = rate
        self._rising = False

    @property
    def due(self) -> float:
        """When the next tick is due."""
        return self._next

    @property
    def speaker(self) -> Member | None:
        """The active speaker."""
        return self._speaker.current

    def tap(self, take: Callable[[Samples, int, float], None]) -> Member:
        """Give what is said here, but not by those who are far, to other mixers at each tick.

        Args:
            take: See :attr:`Member.on_block`; at whatever rate the mixer has.
        """
        uplink = self.uplink = Member(self, "", None, self.rate, "listen")
        uplink.on_block = take
        self._add(uplink)
        return uplink

    def join(self, sid: str, name: str | None, rate: int, mode: Mode = "both", *, far: bool = False) -> Member:
        """Add a member."""
        if rate > self._wanted_rate and not self.fixed:
            self._wanted_rate = rate
            if not self.members and not self._speaking:
                self._change_rate()
        member = Member(self, sid, name, rate, mode, far=far)
        self._add(member)
        return member

    def _add(self, member: Member) -> None:
        self.members.append(member)
        if member.speaks:
            self._speaking.append(member)
        if member.listens:
            self._hearing.append(member)
            self._limiter.add()
        self._index()

    def left(self, member: Member) -> None:
        """A member leaves."""
        self.members.remove(member)
        if member in self._hearing:
            row = self._hearing.index(member)
            del self._hearing[row]
            self._limiter.remove(row + 1)
        self._index()

    def level_of(self, member: Member) -> float:
        """How loud a member is at the moment, dBFS."""
        return self._speaker.level(member) if member in self._speaking else FLOOR

    def advance(self, now: float) -> None:
        """Do all ticks that are due by now."""
        if now - self._next > MOST_BEHIND:
            missed = int((now - self._next - MOST_BEHIND) / TICK)
            self.ticks += missed
            self._next += missed * TICK
        while self._next <= now:
            at = self.now = self._next
            # From the clock's beginning: sums of 0.02 drift.
            self.ticks += 1
            self._next = self.began + (self.ticks + 1) * TICK
            self._tick(at)

    # --- A tick ---

    def _tick(self, at: float) -> None:
        speaking, hearing = self._speaking, self._hearing
        block = round(self.rate * TICK)
        said = np.empty((len(speaking), block), np.int32)
        broken: list[tuple[Member, Exception]] = []
        for row, member in enumerate(speaking):
            try:
                said[row] = member._said(at)
            except Exception as error:
                said[row] = 0
                broken.append((member, error))
        sums = np.empty((len(hearing) + 1, block), np.int32)
        np.sum(said, axis=0, dtype=np.int32, out=sums[0])
        if self._same:
            np.subtract(sums[0], said, out=sums[1:])
        else:
            sums[1:] = sums[0]
            rows, own = self._own
            sums[1:][rows] -= said[own]
            if self._near is not None:
                uplink, far = self._near
                sums[1 + uplink] -= said[far].sum(axis=0, dtype=np.int32)
        mixes = self._limiter.push(sums)
        if self._rising or self._wanted_rate != self.rate:
            mixes = self._faded(mixes)
        for row, member in enumerate(hearing, 1):
            try:
                member._hears(mixes[row], at)
            except Exception as error:
                broken.append((member, error))
        if self.on_mix is not None:
            self._whole(mixes[0], at)
        self._listen(speaking, said, at)
        if any(member.gone for member in speaking):
            for member in [member for member in speaking if member.gone]:
                self._speaking.remove(member)
                self._speaker.forget(member)
            self._index()
        for member, failure in broken:
            self._drop(member, failure)
        if self._wanted_rate != self.rate:
            self._change_rate()

    def _whole(self, mix: Samples, at: float) -> None:
        assert self.on_mix is not None
        if self._to_stream is not None:
            mix = self._to_stream.push(mix)
        self.on_mix(
            mix if self._to_stream is not None else mix.copy(), (self.ticks - 1) * round(self.first_rate * TICK), at
        )

    def _listen(self, speaking: list[Member], said: NDArray[np.int32], at: float) -> None:
        if not speaking:
            return
        loud = said.astype(np.float32)
        levels = np.sqrt(np.einsum("ij,ij->i", loud, loud) / loud.shape[1]).tolist()
        heard = dict(zip(speaking, levels, strict=True))
        since = self._speaker.observe(heard, at - self.began, TICK)
        who = self._speaker.current
        if who is not None and who.far:
            if since is None and who.sid != self._told:
                # The same mixer, another one of its members.
                since = at - self.began
            if not who.sid:
                return
        if since is None:
            return
        self._told = None if who is None else who.sid
        event = Speaker(
            None if who is None else who.sid,
            None if who is None else who.name,
            since,
            FLOOR if who is None else self._speaker.level(who),
        )
        if self.on_speaker is not None:
            self.on_speaker(event)
        for member in list(self.members):
            if member.on_speaker is not None:
                member.on_speaker(event)

    def _drop(self, member: Member, error: Exception) -> None:
        if member.gone:
            return
        member.leave()
        if member in self._speaking:
            self._speaking.remove(member)
            self._speaker.forget(member)
        self._index()
        if self.failed is not None:
            self.failed(member, error)

    # --- Who and how fast ---

    def _index(self) -> None:
        self._same = self._speaking == self._hearing
        both = [(row, self._speaking.index(m)) for row, m in enumerate(self._hearing) if m in self._speaking]
        self._own = ([row for row, _ in both], [own for _, own in both])
        far = [row for row, member in enumerate(self._speaking) if member.far]
        self._near = (self._hearing.index(self.uplink), far) if self.uplink in self._hearing else None

    def _faded(self, mixes: Samples) -> Samples:
        """Where the rate changes sound fades and swells, 20 ms each: no filter is cut in mid-sound."""
        n = mixes.shape[1]
        shape = np.ones(n, np.float32)
        if self._rising:
            shape *= _ramp(0.0, 1.0, n)
        if self._wanted_rate != self.rate:
            shape *= _ramp(1.0, 0.0, n)
        self._rising = False
        faded: Samples = np.rint(mixes * shape).astype(np.int16)
        return faded

    def _change_rate(self) -> None:
        rate = self.rate = self._wanted_rate
        for member in {*self.members, *self._speaking}:
            member._to_rate(rate)
        self._limiter = Limiter(round(rate * TICK))
        for _ in range(len(self._hearing) + 1):
            self._limiter.add()
        self._to_stream = Resampler(rate, self.first_rate) if rate != self.first_rate else None
        self._rising = self.ticks > 0

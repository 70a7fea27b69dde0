"""A room that spans processes: what each of them needs of the others, over the bus.

Every process mixes its own members and sends the others what these say, summed: one leg a process, whatever happens to
anybody else. So the members of one process hear each other with no bus at all, and nobody is mixed twice. The oldest
process of a room owns it: its room processors listen, everybody else's rest. Each is heard of once a second, and the
oldest of those heard of lately is the owner: nothing has to be elected when a process dies, when a network is cut in
two, and when it is whole again.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import numpy as np
import structlog

from streamsink.audio import Frame, Samples, Track
from streamsink.bus import Bus, Message
from streamsink.room.jitter import JitterBuffer
from streamsink.room.mixer import Member, Mixer

log = structlog.get_logger(__name__)

BEAT = 1.0
"""Seconds between two beats."""
SILENT = 3.0
"""Seconds without a beat after which a process is taken for dead."""
ANSWERS = 0.3
"""Seconds that a new process waits for others to show themselves before it takes the room for its own."""
LEG_DELAY = 0.02
"""Seconds of delay a leg starts with: its ticks are a clock's, only the way of one jitters."""
LEG_LEAST = 0.01
RATES = range(8000, 48_001)
"""Hz a leg may have."""
MOST_SAMPLES = 48_000
"""Samples of a message at most."""
MOST_POSITION = 1 << 53
"""Where a message can begin at most: half a million years."""


class Attendant(NamedTuple):
    """A member as other processes are told of it."""

    sid: str
    name: str | None


class _Beat(msgspec.Struct, array_like=True):
    sender: str
    # Seconds since the epoch, when the sender's room began, by its own clock. Where machines' clocks differ another
    # than the oldest may own the room, but it is the same one for all of them.
    since: float
    members: list[tuple[str, str | None]]
    # The sender has just come and wants to be answered.
    asking: bool = False
    leaving: bool = False


class _Audio(msgspec.Struct, array_like=True):
    sender: str
    sample_rate: int
    # Where the first sample stands on the sender's clock, at that rate.
    position: int
    samples: bytes
    # The sender's active speaker, to be told as ours.
    sid: str | None
    name: str | None


_encode = msgspec.msgpack.encode
_beat = msgspec.msgpack.Decoder(_Beat).decode
_audio = msgspec.msgpack.Decoder(_Audio).decode


class Peer:
    """Another process in which the room has members.

    Attributes:
        since: When its room began, seconds since the epoch.
        members: Who is in it there.
    """

    def __init__(self, since: float) -> None:
        self.since = since
        self.members: list[Attendant] = []
        self.heard_at = 0.0
        self.leg: Member | None = None


class Link:
    """One room's tie to its other processes; for the event loop.

    Args:
        name: The room's.
        bus: What carries it.
        mixer: This process's part of the room.
        clock: Seconds, monotonic: the mixer's.
        loop: The event loop.
        members: Who is in the room here.
        changed: Called when :attr:`owner` or :attr:`peers` may have changed.

    Attributes:
        peers: The other processes, by what they call themselves.
        ignored: Messages that no process of ours can have sent.
        owner: Whether the room's processors listen here; None until that is known.
    """

    def __init__(
        self,
        name: str,
        bus: Bus,
        mixer: Mixer,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        members: Callable[[], Iterable[Attendant]],
        changed: Callable[[], None],
    ) -> None:
        self.peers: dict[str, Peer] = {}
        self.owner: bool | None = None
        self.ignored = 0
        self._name = name
        self._id = uuid.uuid4().hex
        self._since = time.time()
        self._bus = bus
        self._mixer = mixer
        self._clock = clock
        self._loop = loop
        self._members = members
        self._changed = changed
        # Whatever letters a room's name has, a subject's words have few.
        subject = f"streamsink.room.{name.encode().hex()}"
        self._beats, self._audio = f"{subject}.beat", f"{subject}.audio"
        self._uplink = mixer.tap(self._send)
        self._subscriptions = [bus.subscribe(self._beats, self._on_beat), bus.subscribe(self._audio, self._on_audio)]
        self._tell(asking=True)
        self._wake(ANSWERS if bus.connected else 0.0)

    def close(self) -> None:
        """Leave: the others hear of it at once."""
        self._timer.cancel()
        self._tell(leaving=True)
        for subscription in self._subscriptions:
            subscription.close()
        self._uplink.leave()
        self.peers.clear()

    def tell(self) -> None:
        """Tell the others who is here now."""
        self._tell()

    def _tell(self, *, asking: bool = False, leaving: bool = False) -> None:
        members = [(member.sid, member.name) for member in self._members()]
        self._bus.publish(self._beats, _encode(_Beat(self._id, self._since, members, asking, leaving)))

    # --- Beats ---

    def _wake(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        # After a standstill of our own what the others told meanwhile has yet to be read.
        stood_still = self._loop.time() > self._due + BEAT
        self._wake(BEAT)
        now = self._clock()
        for sender, peer in list(self.peers.items()):
            # With no bus nobody is to be waited for.
            if (now - peer.heard_at > SILENT and not stood_still) or not self._bus.connected:
                self._drop(sender)
        self._tell()
        self._decide()

    def _decide(self) -> None:
        oldest = min([(self._since, self._id), *((peer.since, sender) for sender, peer in self.peers.items())])
        self.owner = oldest[1] == self._id
        self._changed()

    def _on_beat(self, message: Message) -> None:
        try:
            beat = _beat(message.payload)
        except msgspec.MsgspecError:
            return self._ignore()
        if not math.isfinite(beat.since):
            return self._ignore()
        if beat.sender == self._id:
            return
        if beat.leaving:
            self._drop(beat.sender)
            if self.owner is not None:
                self._decide()
            return
        peer = self.peers.get(beat.sender)
        if peer is None:
            peer = self.peers[beat.sender] = Peer(beat.since)
        peer.heard_at = self._clock()
        peer.members = [Attendant(*member) for member in beat.members]
        if beat.asking:
            self._tell()
        if self.owner is not None:
            self._decide()

    def _ignore(self) -> None:
        self.ignored += 1
        if self.ignored == 1:
            log.warning("something else writes on the bus: messages about a room are ignored", room=self._name)

    def _drop(self, sender: str) -> None:
        peer = self.peers.pop(sender, None)
        if peer is not None and peer.leg is not None:
            peer.leg.leave()

    # --- Audio ---

    def _send(self, samples: Samples, position: int, at: float) -> None:
        if not self.peers:
            return
        who = self._mixer.speaker
        audio = _Audio(
            self._id,
            self._uplink.rate,
            position,
            samples.astype("<i2", copy=False).tobytes(),
            None if who is None or who.far else who.sid,
            None if who is None or who.far else who.name,
        )
        self._bus.publish(self._audio, _encode(audio))

    def _on_audio(self, message: Message) -> None:
        try:
            audio = _audio(message.payload)
        except msgspec.MsgspecError:
            return self._ignore()
        if (
            audio.sample_rate not in RATES
            or len(audio.samples) % 2
            or len(audio.samples) > 2 * MOST_SAMPLES
            or not 0 <= audio.position < MOST_POSITION
        ):
            return self._ignore()
        peer = self.peers.get(audio.sender)
        if peer is None:
            return
        leg = peer.leg
        if leg is None or leg.gone or leg.rate != audio.sample_rate:
            if leg is not None:
                leg.leave()
            leg = peer.leg = self._mixer.join("", None, audio.sample_rate, "speak", far=True)
            leg.jitter = JitterBuffer(leg.rate, LEG_DELAY, LEG_LEAST)
        if audio.sid is not None:
            leg.sid, leg.name = audio.sid, audio.name
        samples = np.frombuffer(audio.samples, "<i2")
        leg.hear(Frame(samples, leg.rate, Track.MIX, audio.position, 0, 0), self._clock())

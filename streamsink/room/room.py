"""A room: a mixer with a timer, the processors that listen to it, and a life from the first member to the last."""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsink.audio import Frame, Samples, Track
from streamsink.bus import Bus
from streamsink.codec import CodecSpec
from streamsink.config import RoomSettings
from streamsink.delivery import Delivery
from streamsink.disk import DiskSpace
from streamsink.errors import ProcessorError, RoomRefused, TalkBackOff
from streamsink.playback import Playback
from streamsink.plugins import Plugin
from streamsink.processor import Chain, Processor, Tally
from streamsink.room.link import Attendant, Link, Peer
from streamsink.room.mixer import FETCH, TICK, Member, Mixer, Mode
from streamsink.speech.events import Speaker, Transcript
from streamsink.speech.synthesis import Synthesizer
from streamsink.speech.vad import Detectors
from streamsink.stream import Attendance, Stream
from streamsink.wire import Writer

log = structlog.get_logger(__name__)

ROOM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Shared(Protocol):
    """What rooms need of the endpoint they are in."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    detectors: Detectors
    synthesizer: Synthesizer
    disk: DiskSpace
    delivery: Delivery
    draining: bool


class RoomStream(Stream):
    """What a room's processors get for a stream: they listen to the mix and cannot speak."""

    def _check_talk_back(self) -> NoReturn:
        raise TalkBackOff("a room's processors only listen: let a processor of a member's pipeline speak")


class Audience:
    """The processors that listen to a room, and the stream they see; one for as long as they listen.

    Args:
        room: What they listen to.
        plugins: How they are made.
        shared: The endpoint.
        recordings: The folder files about the room go to.
        tally: Where their failures are counted.
    """

    def __init__(self, room: Room, plugins: list[Plugin], shared: Shared, recordings: Path, tally: Tally) -> None:
        mixer = room.mixer
        self._chain = Chain(_built(plugins, tally), tally, detectors=shared.detectors)
        self._rate = mixer.first_rate
        # Where the mixer's clock stands when they begin, in samples.
        self._began: int | None = None
        self._began_at = shared.clock()
        self._clock = shared.clock
        self._sequence = 0
        self._present: dict[object, Attendance] = {}
        codec = CodecSpec("L16", self._rate, round(TICK * 1000))
        self.stream = RoomStream(
            sid=room.name,
            call_sid=None,
            account_sid=None,
            name=None,
            codec=codec,
            tracks=(Track.MIX,),
            custom_parameters={},
            path="",
            started_at=datetime.now(UTC),
            recordings=recordings,
            processors=self._chain.names,
            playback=Playback(codec, Writer(room.name), lambda text: None, lambda: None, shared.clock),
            talk_back=False,
            may_speak=False,
            control=room,
            loop=shared.loop,
            synthesizer=shared.synthesizer,
            disk=shared.disk,
            delivery=shared.delivery,
        )

    def start(self) -> None:
        """Begin; what they were given before waits for them."""
        self._chain.start(self.stream)

    @property
    def seconds(self) -> float:
        """What the room's clock says."""
        return max(0.0, self._clock() - self._began_at)

    def attend(self, members: Mapping[object, Attendant]) -> None:
        """Note who came and who went."""
        for key in self._present.keys() - members.keys():
            self._present.pop(key).left = self.seconds
        for key in [key for key in members if key not in self._present]:
            attendance = self._present[key] = Attendance(members[key].sid, members[key].name, self.seconds, None)
            self.stream.members.append(attendance)

    def hear(self, samples: Samples, position: int, at: float) -> None:
        """Take a tick of the whole mix."""
        if self._began is None:
            self._began = position
        samples.setflags(write=False)
        frame = Frame(samples, self._rate, Track.MIX, position - self._began, 0, self._sequence)
        self._chain.frame(frame)
        self._sequence += 1

    def call(self, hook: str, *arguments: object) -> None:
        """Call a plain hook of every processor."""
        self._chain.call(hook, *arguments)

    async def stop(self, reason: str) -> None:
        """End: nobody listens any more."""
        self.attend({})
        self.stream.close_code = 1001 if reason == "shutdown" else 1000
        self.stream.close_reason = "the room is empty" if reason == "stop" else reason
        await self._chain.stop(reason)


class Room:
    """Streams that hear each other.

    Args:
        name: Its name.
        settings: What its pattern sets.
        plugins: The processors that listen to the whole.
        rate: Hz of the first member.
        shared: The endpoint.
        recordings: The folder files about this room go to.
        tally: Where its processors' failures are counted.
        bus: What ties it to other processes; None: it is this process's own.
        over: Called when it has ended.
        finished: Called when its processors have, too.

    Attributes:
        mixer: Who is in it; mute, gain and deafen are attributes of its members.
        audience: The processors that listen; None while they do so in another process.
        closed: Set when its processors have ended.
    """

    def __init__(
        self,
        name: str,
        settings: RoomSettings,
        plugins: list[Plugin],
        rate: int,
        shared: Shared,
        recordings: Path,
        tally: Tally,
        bus: Bus | None,
        over: Callable[[Room], None],
        finished: Callable[[Room], None],
    ) -> None:
        self.name = name
        self.settings = settings
        self.closed = asyncio.Event()
        self._shared = shared
        self._over = over
        self._finished = finished
        # The streams of this process.
        self._here: dict[Member, Attendant] = {}
        self._ending: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        mixer = self.mixer = Mixer(settings.sample_rate or rate, shared.clock(), fixed=settings.sample_rate is not None)
        mixer.failed = self._failed
        self._make_audience = functools.partial(Audience, self, plugins, shared, recordings, tally)
        # Until it is known whose the room is they are given what is said, and do not begin.
        self.audience: Audience | None = self._make_audience()
        self._resting: set[asyncio.Future[None]] = set()
        if plugins:
            mixer.on_mix = self._on_mix
            mixer.on_speaker = self._on_speaker
        self._timer = shared.loop.call_at(mixer.due, self._on_timer)
        self._link: Link | None = None
        if bus is None:
            self.audience.start()
        else:
            self._link = Link(name, bus, mixer, shared.clock, shared.loop, self._here.values, self._changed)
        self._owner = bus is None

    # --- Members ---

    def join(self, sid: str, name: str | None, rate: int, mode: Mode = "both") -> Member:
        """Add a member.

        Args:
            sid: Its streamSid.
            name: Its stream's name.
            rate: Hz of its audio.
            mode: Whether it speaks, listens, or both.

        Raises:
            RoomRefused: There are `max_members` already, in all processes; where several join in different ones at once
                there may be a few more.
        """
        elsewhere = sum(len(peer.members) for peer in self._peers)
        if len(self._here) + elsewhere >= self.settings.max_members:
            raise RoomRefused(f"the room has its {self.settings.max_members} members (max_members)")
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        self.mixer.advance(self._shared.clock())
        member = self.mixer.join(sid, name, rate, mode)
        self._here[member] = Attendant(sid, name)
        self._attendance_changed()
        return member

    def leave(self, member: Member) -> None:
        """Take a member out; once is enough."""
        if self._here.pop(member, None) is None:
            return
        member.leave()
        self._attendance_changed()

    @property
    def members(self) -> int:
        """How many streams of this process are in it."""
        return len(self._here)

    @property
    def _peers(self) -> list[Peer]:
        return [] if self._link is None else list(self._link.peers.values())

    def _attendance_changed(self) -> None:
        if self._link is not None:
            self._link.tell()
        self._attend()

    def _attend(self) -> None:
        """Tell the audience who is here, in any process, and end the room when nobody is."""
        present: dict[object, Attendant] = {}
        present.update(self._here.items())
        # Those of other processes by their ids: they are no members of this mixer.
        if self._link is not None:
            for sender, peer in self._link.peers.items():
                present.update({(sender, member.sid): member for member in peer.members})
        if self.audience is not None:
            self.audience.attend(present)
        needed = self._here or (present and self._owner)
        if needed and self._ending is not None:
            self._ending.cancel()
            self._ending = None
        elif not needed and self._ending is None:
            grace = 0.0 if self._shared.draining else self.settings.grace_seconds
            self._ending = self._shared.loop.call_later(grace, self.close, "stop")

    def source(self, member: Member) -> Callable[[int], Samples]:
        """What a member's stream plays: see `Stream.play_live`."""
        return lambda n: member.source(n, self._shared.clock())

    @property
    def next_mix(self) -> float:
        """Seconds until the next mix is there: who begins to fetch then has each as soon as it is there."""
        return self.mixer.due + FETCH - self._shared.clock()

    def hear(self, member: Member, frame: Frame) -> None:
        """Take a frame of what a member says."""
        member.hear(frame, self._shared.clock())

    def _failed(self, member: Member, error: Exception) -> None:
        log.error("room member dropped", stream=member.sid, exc_info=error)
        self.leave(member)

    # --- Other processes ---

    def _changed(self) -> None:
        """Other processes came or went, or have other members: perhaps the room is another's now, or ours."""
        assert self._link is not None
        owner = bool(self._link.owner)
        if owner and self.audience is None:
            self.audience = self._make_audience()
        if owner and not self._owner:
            log.info("room is this process's", room=self.name, peers=len(self._link.peers))
            assert self.audience is not None
            self.audience.start()
        elif not owner and self.audience is not None:
            # An older process has the room: what is recorded here so far is kept.
            audience, self.audience = self.audience, None
            if self._owner:
                log.info("room is another process's", room=self.name, peers=len(self._link.peers))
                self._rest(audience)
        self._owner = owner
        self._attend()

    def _rest(self, audience: Audience) -> None:
        resting = asyncio.ensure_future(audience.stop("closed"))
        self._resting.add(resting)
        resting.add_done_callback(self._resting.discard)

    # --- The clock ---

    def _on_timer(self) -> None:
        self.mixer.advance(self._shared.clock())
        self._timer = self._shared.loop.call_at(self.mixer.due, self._on_timer)

    def _on_mix(self, samples: Samples, position: int, at: float) -> None:
        if self.audience is not None and (self._here or self._peers):
            self.audience.hear(samples, position, at)

    def _on_speaker(self, event: Speaker) -> None:
        if self.audience is not None:
            self.audience.call("on_speaker", event)

    # --- The end ---

    def close(self, reason: str) -> None:
        """End the room: its members hear nothing more of it, its processors finish."""
        if self._closing is not None:
            return
        for member in list(self._here):
            self.leave(member)
        if self._ending is not None:
            self._ending.cancel()
        self._timer.cancel()
        if self._link is not None:
            self._link.close()
        self._over(self)
        self._closing = asyncio.ensure_future(self._finish(reason))

    async def _finish(self, reason: str) -> None:
        try:
            if self.audience is not None and self._owner:
                await self.audience.stop(reason)
            if self._resting:
                await asyncio.wait(self._resting)
        finally:
            self.closed.set()
            self._finished(self)

    # --- What its stream asks for ---

    def send_dtmf(self, digit: str) -> None:
        """Nobody to send it to: the stream refuses before this is reached."""

    def clear(self) -> None:
        """Nothing to clear: likewise."""

    def hang_up(self, reason: str) -> None:
        """A processor of the room ends it: its members' streams go on without it."""
        self.close("closed")

    def transcribed(self, transcript: Transcript) -> None:
        """A processor of the room knows what was said: every one of them hears of it."""
        if self.audience is not None:
            self.audience.call("on_transcript", transcript)

    def speaker_changed(self, event: Speaker) -> None:
        """Its processors are told by the mixer."""


class Rooms(Collector):
    """All rooms of a process, by name.

    Args:
        shared: The endpoint.
        settings: For each pattern what it sets; the first that fits a name counts.
        plugins: For each pattern the processors, found and checked.
        recordings: The folder files about rooms go to.
        tally: Where processors' failures are counted.

    Attributes:
        bus: What ties rooms to other processes; None: they are this process's own. Set before the first is made.
    """

    def __init__(
        self,
        shared: Shared,
        settings: Mapping[str, RoomSettings],
        plugins: Mapping[str, list[Plugin]],
        recordings: Path,
        tally: Tally,
    ) -> None:
        self.bus: Bus | None = None
        self._shared = shared
        self._settings = settings
        self._plugins = plugins
        self._recordings = recordings
        self._tally = tally
        self._open: dict[str, Room] = {}
        self._unfinished: set[Room] = set()

    def __getitem__(self, name: str) -> Room:
        return self._open[name]

    def __contains__(self, name: object) -> bool:
        return name in self._open

    def __len__(self) -> int:
        return len(self._open)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        rooms = self._open.values()
        yield GaugeMetricFamily("streamsink_rooms_active", "Rooms with members here, or waiting.", value=len(rooms))
        members = sum(room.members for room in rooms)
        yield GaugeMetricFamily("streamsink_room_members", "Streams that are in a room.", value=members)

    def join(self, name: str, sid: str, stream_name: str | None, rate: int, mode: Mode = "both") -> tuple[Room, Member]:
        """Enter a room, which is made where there is none of that name.

        Args:
            name: Of the room: 1 to 64 of letters, digits and ``_.-``, a letter or a digit first.
            sid: The member's streamSid.
            stream_name: Its name.
            rate: Hz of its audio.
            mode: Whether it speaks, listens, or both.

        Raises:
            RoomRefused: The name cannot be one, or the room is full.
        """
        if not ROOM_NAME.fullmatch(name):
            raise RoomRefused("a room's name is 1 to 64 letters, digits and '_.-', a letter or a digit first")
        room = self._open.get(name)
        if room is None:
            room = self._make(name, rate)
        return room, room.join(sid, stream_name, rate, mode)

    def _make(self, name: str, rate: int) -> Room:
        pattern = next((pattern for pattern in self._settings if fnmatch.fnmatchcase(name, pattern)), None)
        settings = RoomSettings() if pattern is None else self._settings[pattern]
        plugins = [] if pattern is None else self._plugins.get(pattern, [])
        room = Room(
            name,
            settings,
            plugins,
            rate,
            self._shared,
            self._recordings,
            self._tally,
            self.bus,
            over=self._over,
            finished=self._unfinished.discard,
        )
        self._open[name] = room
        self._unfinished.add(room)
        return room

    def _over(self, room: Room) -> None:
        if self._open.get(room.name) is room:
            del self._open[room.name]

    async def close(self, reason: str) -> None:
        """End all rooms and wait for their processors."""
        for room in list(self._open.values()):
            room.close(reason)
        while self._unfinished:
            await next(iter(self._unfinished)).closed.wait()


def _built(plugins: list[Plugin], tally: Tally) -> list[tuple[str, Processor]]:
    processors: list[tuple[str, Processor]] = []
    for plugin in plugins:
        try:
            processors.append((plugin.name, plugin.build()))
        except ProcessorError as error:
            tally.processor_error(plugin.name)
            log.error("processor not built", processor=plugin.name, exc_info=error)
    return processors

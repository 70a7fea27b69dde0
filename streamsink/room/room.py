"""A room: a mixer with a timer, the processors that listen to it, and a life from the first member to the last."""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol

import structlog

from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec
from streamsink.config import RoomSettings
from streamsink.delivery import Delivery
from streamsink.disk import Room as DiskRoom
from streamsink.errors import ProcessorError, RoomRefused, TalkBackOff
from streamsink.playback import Playback
from streamsink.plugins import Plugin
from streamsink.processor import Chain, Processor, Tally
from streamsink.room.mixer import TICK, Member, Mixer, Mode
from streamsink.speech.events import Speaker, Transcript
from streamsink.speech.synthesis import Synthesizer
from streamsink.speech.vad import Detectors
from streamsink.stream import Attendance, Stream
from streamsink.wire import Writer

log = structlog.get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Shared(Protocol):
    """What rooms need of the endpoint they are in."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    detectors: Detectors
    synthesizer: Synthesizer
    room: DiskRoom
    delivery: Delivery
    draining: bool


class RoomStream(Stream):
    """What a room's processors get for a stream: they listen to the mix and cannot speak."""

    def _check_talk_back(self) -> NoReturn:
        raise TalkBackOff("a room's processors only listen: let a processor of a member's pipeline speak")


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
        over: Called when it has ended.
        finished: Called when its processors have, too.

    Attributes:
        mixer: Who is in it; mute, gain and deafen are attributes of its members.
        stream: What its processors see.
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
        over: Callable[[Room], None],
        finished: Callable[[Room], None],
    ) -> None:
        self.name = name
        self.settings = settings
        self.closed = asyncio.Event()
        self._shared = shared
        self._over = over
        self._finished = finished
        self._attendances: dict[Member, Attendance] = {}
        self._ending: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._sequence = 0
        mixer = self.mixer = Mixer(settings.sample_rate or rate, shared.clock(), fixed=settings.sample_rate is not None)
        mixer.failed = self._failed
        self._chain = Chain(_built(plugins, tally), tally, detectors=shared.detectors)
        self.stream = self._make_stream(recordings)
        if self._chain.names:
            mixer.on_mix = self._on_mix
            mixer.on_speaker = functools.partial(self._chain.call, "on_speaker")
        self._timer = shared.loop.call_at(mixer.due, self._on_timer)
        self._chain.start(self.stream)

    def _make_stream(self, recordings: Path) -> RoomStream:
        codec = CodecSpec("L16", self.mixer.rate, round(TICK * 1000))
        shared = self._shared
        return RoomStream(
            sid=self.name,
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
            playback=Playback(codec, Writer(self.name), lambda text: None, lambda: None, shared.clock),
            talk_back=False,
            may_speak=False,
            control=self,
            loop=shared.loop,
            synthesizer=shared.synthesizer,
            room=shared.room,
            delivery=shared.delivery,
        )

    # --- Members ---

    def join(self, sid: str, name: str | None, rate: int, mode: Mode = "both") -> Member:
        """Add a member.

        Args:
            sid: Its streamSid.
            name: Its stream's name.
            rate: Hz of its audio.
            mode: Whether it speaks, listens, or both.

        Raises:
            RoomRefused: There are `max_members` already.
        """
        if len(self.mixer.members) >= self.settings.max_members:
            raise RoomRefused(f"the room has its {self.settings.max_members} members (max_members)")
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        self.mixer.advance(self._shared.clock())
        member = self.mixer.join(sid, name, rate, mode)
        attendance = self._attendances[member] = Attendance(sid, name, self.seconds, None)
        self.stream.members.append(attendance)
        return member

    def leave(self, member: Member) -> None:
        """Take a member out; once is enough."""
        attendance = self._attendances.pop(member, None)
        if attendance is None:
            return
        attendance.left = self.seconds
        member.leave()
        if not self._attendances:
            grace = 0.0 if self._shared.draining else self.settings.grace_seconds
            self._ending = self._shared.loop.call_later(grace, self.close, "stop")

    @property
    def seconds(self) -> float:
        """What the room's clock says."""
        return max(0.0, self._shared.clock() - self.mixer.began)

    def source(self, member: Member) -> Callable[[int], Samples]:
        """What a member's stream plays: see `Stream.play_live`."""
        return lambda n: member.source(n, self._shared.clock())

    def hear(self, member: Member, frame: Frame) -> None:
        """Take a frame of what a member says."""
        member.hear(frame, self._shared.clock())

    def _failed(self, member: Member, error: Exception) -> None:
        log.error("room member dropped", stream=member.sid, exc_info=error)
        self.leave(member)

    # --- The clock ---

    def _on_timer(self) -> None:
        self.mixer.advance(self._shared.clock())
        self._timer = self._shared.loop.call_at(self.mixer.due, self._on_timer)

    def _on_mix(self, samples: Samples, position: int, at: float) -> None:
        if not self._attendances:
            return
        samples.setflags(write=False)
        self._chain.frame(Frame(samples, self.stream.codec.rate, Track.MIX, position, 0, self._sequence))
        self._sequence += 1

    # --- The end ---

    def close(self, reason: str) -> None:
        """End the room: its members hear nothing more of it, its processors finish."""
        if self._closing is not None:
            return
        for member in list(self._attendances):
            self.leave(member)
        if self._ending is not None:
            self._ending.cancel()
        self._timer.cancel()
        self.stream.close_code = 1001 if reason == "shutdown" else 1000
        self.stream.close_reason = "the room is empty" if reason == "stop" else reason
        self._over(self)
        self._closing = asyncio.ensure_future(self._finish(reason))

    async def _finish(self, reason: str) -> None:
        try:
            await self._chain.stop(reason)
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
        self._chain.call("on_transcript", transcript)

    def speaker_changed(self, event: Speaker) -> None:
        """Its processors are told by the mixer."""


class Rooms:
    """All rooms of a process, by name.

    Args:
        shared: The endpoint.
        settings: For each pattern what it sets; the first that fits a name counts.
        plugins: For each pattern the processors, found and checked.
        recordings: The folder files about rooms go to.
        tally: Where processors' failures are counted.
    """

    def __init__(
        self,
        shared: Shared,
        settings: Mapping[str, RoomSettings],
        plugins: Mapping[str, list[Plugin]],
        recordings: Path,
        tally: Tally,
    ) -> None:
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
        if not _NAME.fullmatch(name):
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

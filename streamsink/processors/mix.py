"""Mix: the stream joins a room, and hears all others that are in it."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

import structlog

from streamsink.audio import Frame, Track
from streamsink.errors import ProcessorError, RoomRefused, TalkBackOff
from streamsink.processor import Processor
from streamsink.room import ROOM_NAME, Mode
from streamsink.stream import Stream

if TYPE_CHECKING:
    from streamsink.room import Member, Room

log = structlog.get_logger(__name__)


class Mix(Processor):
    """Joins a room: the stream hears every other member and is heard by them.

    A stream that names no room, or one that is full or not allowed, goes on by itself; the log says why.

    Args:
        room: Name of the room.
        room_parameter: The custom parameter that names the room.
        room_path: Name the room after the path of the stream's URL.
        pattern: Names allowed where the caller chooses: ``*``, ``?`` and ``[…]`` as in file names.
        mode: Whether the stream speaks, listens, or both.
        gain_db: How much louder than it is the others hear it.
    """

    def __init__(
        self,
        room: str | None = None,
        room_parameter: str | None = None,
        room_path: bool = False,
        pattern: str = "*",
        mode: Mode = "both",
        gain_db: float = 0.0,
    ) -> None:
        if (room is not None) + (room_parameter is not None) + room_path != 1:
            raise ProcessorError("mix wants one of room=NAME, room_parameter=NAME and room_path=true")
        if room is not None and not ROOM_NAME.fullmatch(room):
            raise ProcessorError(
                f"mix: room={room!a}; wanted 1 to 64 letters, digits and '_.-', a letter or a digit first"
            )
        if not -100 <= gain_db <= 20:
            raise ProcessorError(f"mix: gain_db is {gain_db:g}; wanted -100 to 20 dB")
        self.speaks = mode != "speak"
        self._room_name = room
        self._parameter = room_parameter
        self._pattern = pattern
        self._mode: Mode = mode
        self._gain_db = gain_db
        self.room: Room | None = None
        self.member: Member | None = None

    async def on_start(self, stream: Stream) -> None:
        """Join, where that is allowed."""
        try:
            self._join(stream)
        except (RoomRefused, TalkBackOff) as error:
            self._leave()
            self.member = None
            log.warning("stream in no room", stream=stream.sid, call=stream.call_sid, cause=str(error))

    def _join(self, stream: Stream) -> None:
        name = self._choose(stream)
        self.room, self.member = stream.rooms.join(name, stream.sid, stream.name, stream.codec.rate, self._mode)
        self.member.gain_db = self._gain_db
        self.member.on_speaker = stream.speaker_changed
        if self.member.listens:
            stream.play_live(self.room.source(self.member), self.room.next_mix)

    def _choose(self, stream: Stream) -> str:
        if self._room_name is not None:
            return self._room_name
        if self._parameter is None:
            name: object = stream.path.strip("/")
        else:
            name = stream.custom_parameters.get(self._parameter)
            if name is None:
                raise RoomRefused(f"the stream has no custom parameter `{self._parameter}`")
        # Not shown: it is the caller's.
        if not isinstance(name, str) or not fnmatch.fnmatchcase(name, self._pattern):
            raise RoomRefused(f"the room's name does not fit the pattern `{self._pattern}`")
        return name

    def on_frame(self, frame: Frame) -> None:
        """Let the others hear it."""
        if self.member is not None and self.room is not None and frame.track is Track.INBOUND:
            self.room.hear(self.member, frame)

    async def on_stop(self, reason: str) -> None:
        """Leave."""
        self._leave()

    def _leave(self) -> None:
        if self.member is not None and self.room is not None:
            self.room.leave(self.member)

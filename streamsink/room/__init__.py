"""Rooms: streams that hear each other."""

from streamsink.room.mixer import Member, Mixer, Mode
from streamsink.room.room import ROOM_NAME, Room, Rooms

__all__ = ["ROOM_NAME", "Member", "Mixer", "Mode", "Room", "Rooms"]

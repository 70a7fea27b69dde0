"""Rooms: streams that hear each other."""

from streamsink.room.mixer import Member, Mixer, Mode
from streamsink.room.room import Room, Rooms

__all__ = ["Member", "Mixer", "Mode", "Room", "Rooms"]

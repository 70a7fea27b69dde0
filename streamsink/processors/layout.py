"""Which voice goes into which channel of which file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from streamsink.audio import Track

LayoutName = Literal["mono-mix", "stereo", "separate"]

SOURCES = ("inbound", "outbound", "mix", "played")
"""Whose voice there can be: the tracks of a stream, and what the far end heard of ours."""
PLAYED = SOURCES.index("played")
SOURCE_OF = {track: SOURCES.index(track.value) for track in Track}

_RIGHT = ["outbound", "played"]


class Layout(NamedTuple):
    """For each file what stands before its ending, and for each of its channels what is in it."""

    files: tuple[tuple[str, list[list[str]]], ...]

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """For each source's number the file and the channel it goes to."""
        return {
            SOURCES.index(source): (file, channel)
            for file, (_, channels) in enumerate(self.files)
            for channel, sources in enumerate(channels)
            for source in sources
        }


def choose(wanted: LayoutName | None, tracks: Collection[Track], may_speak: bool) -> Layout:
    """Choose a layout.

    Args:
        wanted: What was asked for; None: mono where only one voice can be, else stereo.
        tracks: What the platform announced.
        may_speak: Whether a processor may send audio, which then is recorded too.
    """
    both = Track.INBOUND in tracks and (Track.OUTBOUND in tracks or may_speak)
    if Track.MIX in tracks:
        left = ["mix"]
        both = both or may_speak
    else:
        left = ["inbound"] if Track.INBOUND in tracks else _RIGHT
        both = both or (may_speak and left != _RIGHT)
    if wanted is None:
        wanted = "stereo" if both else "mono-mix"
        if not both:
            return Layout((("", [left if may_speak else left[:1]]),))
    if left == _RIGHT:
        left = ["inbound"]
    if wanted == "mono-mix":
        return Layout((("", [[*left, *_RIGHT]]),))
    if wanted == "stereo":
        return Layout((("", [left, _RIGHT]),))
    if not both:
        alone = "outbound" if Track.INBOUND not in tracks and Track.MIX not in tracks else "inbound"
        return Layout(((f"{alone}.", [_RIGHT if alone == "outbound" else left]),))
    return Layout((("inbound.", [left]), ("outbound.", [_RIGHT])))

"""The endpoint for SignalWire conference streams: real-time call audio as numpy buffers in your own Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from streamsink.audio import Frame, Track
from streamsink.codec import CodecSpec
from streamsink.playout import BargeIn, Outcome, Played, Playout
from streamsink.processor import MarkOutcome, Processor, processor
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.stream import Stream

if TYPE_CHECKING:
    from streamsink.server import Server
    from streamsink.stream_object import StreamObject

__all__ = [
    "BargeIn",
    "CodecSpec",
    "Frame",
    "MarkOutcome",
    "Outcome",
    "Played",
    "Playout",
    "Processor",
    "Server",
    "Speech",
    "SpeechChange",
    "Stream",
    "StreamObject",
    "Track",
    "VadSettings",
    "processor",
]

# Imported when first asked for: a processor's author and the simulator need no server.
_LAZY = {"Server": "streamsink.server", "StreamObject": "streamsink.stream_object"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

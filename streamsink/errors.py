"""Every error streamsink raises, and the WebSocket close code each implies.

    StreamsinkError                 1011
    ├── ConfigError                 a setting that cannot be used
    ├── CodecError                  1008  a codec, or audio handed to one, that cannot be used
    ├── ProcessorError              a processor that cannot be found or built
    ├── PlayoutFull                 more audio is queued on a stream than it takes
    ├── SpeechError                 an engine for speech that cannot be had, or that failed
    ├── BusError                    no answer on the bus between processes
    ├── ChildDied                   a process that works for the endpoint ended
    ├── StreamClosed                the stream ended while it was being used
    ├── RoomRefused                 a room that a stream may not join
    ├── TalkBackOff                 the pipeline does not let its processors speak
    ├── SimulationError             a simulation that cannot be run as asked
    ├── CallRefused                 a simulated call that did not come about
    └── ProtocolError               1008  the peer broke the protocol: its stream ends
        ├── BadMessage              1008  one message is unusable: dropped and counted
        ├── BinaryMessage           1003
        ├── InvalidText             1007
        └── MessageTooBig           1009

Close codes: RFC 6455 §7.4.1.
"""

from __future__ import annotations


class StreamsinkError(Exception):
    """The root of everything streamsink raises on purpose."""

    close_code: int = 1011


class ConfigError(StreamsinkError, ValueError):
    """A setting is unknown or has a value that cannot be used; the message names key and source."""


class CodecError(StreamsinkError, ValueError):
    """A codec is unknown, or audio handed to one has the wrong type, shape or size."""

    close_code = 1008


class ProcessorError(StreamsinkError):
    """A processor cannot be found, or its options do not fit."""


class PlayoutFull(StreamsinkError):
    """More audio is queued on one stream than it takes; what was queued before still plays."""


class SpeechError(StreamsinkError):
    """A speech engine cannot be had or failed; the message says how to mend it."""


class BusError(StreamsinkError):
    """Nobody answered on the bus, or the bus is lost."""


class ChildDied(StreamsinkError):
    """A process that works for the endpoint has ended."""


class NotEncoded(StreamsinkError):
    """A recording cannot be made in the format that was asked for."""


class StreamClosed(StreamsinkError):
    """The stream has ended; nothing more can be sent on it."""


class TalkBackOff(StreamsinkError):
    """The pipeline has ``talk_back = false``: nothing may be sent on its streams."""


class RoomRefused(StreamsinkError):
    """A stream may not join a room: it is full, or the name is none or not allowed."""


class SimulationError(StreamsinkError):
    """A simulation cannot be run as asked; the message says how to mend it."""


class CallRefused(StreamsinkError):
    """A simulated call did not come about: no connection, no trust, or no upgrade; the message says how to mend it."""


class ProtocolError(StreamsinkError):
    """The peer broke the protocol in a way that ends its stream."""

    close_code = 1008


class BadMessage(ProtocolError):
    """One message cannot be used.

    Attributes:
        reason: A fixed word for the metric's label, such as ``json`` or ``payload``; never the peer's text.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BinaryMessage(ProtocolError):
    """The peer sent a binary message; the protocol is JSON text."""

    close_code = 1003


class InvalidText(ProtocolError):
    """A text message is not UTF-8."""

    close_code = 1007


class MessageTooBig(ProtocolError):
    """A message is larger than the limit."""

    close_code = 1009

"""Messages to and from the platform ⇄ JSON text. Stateless.

Reading is liberal, as working senders differ: numbers may be strings, identifiers may sit inside ``start`` or beside
it, camel or snake case, and what is not needed is not looked at. Writing is the documented shape and nothing else.

Source: SignalWire's stream documentation and working code written against the service.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from streamsink.errors import BadMessage

DIGITS = frozenset("0123456789*#ABCD")
"""The digits of DTMF."""

_LARGEST = 2**53
"""Counters beyond what every JSON implementation holds exactly are no counters."""


class MediaFormat(msgspec.Struct, gc=False):
    """``start.mediaFormat``: how the payloads are encoded, in the sender's own words."""

    encoding: str
    sample_rate: int | None = msgspec.field(name="sampleRate", default=None)
    """Hertz."""
    channels: int = 1


class StartBody(msgspec.Struct, rename="camel"):
    """The ``start`` object of a start message."""

    stream_sid: str | None = None
    account_sid: str | None = None
    call_sid: str | None = None
    tracks: list[str] | None = None
    custom_parameters: dict[str, Any] | None = None
    media_format: MediaFormat | None = None
    name: str | None = None
    stream_name: str | None = None
    snake_sid: str | None = msgspec.field(name="stream_sid", default=None)


class MediaBody(msgspec.Struct, gc=False):
    """The ``media`` object of a media message.

    ``timestamp`` is left unread: it is milliseconds with some senders and samples with others.
    """

    payload: bytes
    """Raw codec bytes, decoded from base64."""
    track: str = "inbound"
    chunk: int | None = None


class DtmfBody(msgspec.Struct, gc=False):
    """The ``dtmf`` object: one digit pressed by a participant."""

    digit: str
    duration: int = 0
    """Milliseconds."""


class MarkBody(msgspec.Struct, gc=False):
    """The ``mark`` object: one of our marks coming back."""

    name: str


class Connected(msgspec.Struct, tag_field="event", tag="connected", gc=False):
    """The first message of a stream."""

    protocol: str | None = None
    version: str | None = None


class Start(msgspec.Struct, tag_field="event", tag="start"):
    """What the stream is: who, which call, which codec, which parameters."""

    start: StartBody
    stream_sid: str | None = msgspec.field(name="streamSid", default=None)
    snake_sid: str | None = msgspec.field(name="stream_sid", default=None)

    @property
    def sid(self) -> str | None:
        """The stream's identifier, wherever the sender put it."""
        return self.start.stream_sid or self.start.snake_sid or self.stream_sid or self.snake_sid

    @property
    def name(self) -> str | None:
        """The stream's friendly name, wherever the sender put it."""
        name = self.start.name or self.start.stream_name
        if name is None and self.start.custom_parameters:
            given = self.start.custom_parameters.get("name")
            name = given if isinstance(given, str) else None
        return name


class Media(msgspec.Struct, tag_field="event", tag="media", gc=False):
    """A stretch of one track's audio."""

    media: MediaBody
    sequence: int | None = msgspec.field(name="sequenceNumber", default=None)


class Dtmf(msgspec.Struct, tag_field="event", tag="dtmf", gc=False):
    """A digit pressed."""

    dtmf: DtmfBody


class Mark(msgspec.Struct, tag_field="event", tag="mark", gc=False):
    """A mark of ours, played or cleared."""

    mark: MarkBody


class Stop(msgspec.Struct, tag_field="event", tag="stop", gc=False):
    """The last message of a stream."""


class Unknown(msgspec.Struct, gc=False):
    """A message whose event this protocol version does not know: no error."""

    event: str


Message = Connected | Start | Media | Dtmf | Mark | Stop | Unknown

_KNOWN = frozenset({"connected", "start", "media", "dtmf", "mark", "stop"})

# strict=False reads "42" where a number is wanted, at no cost when it is a number.
_decoder: msgspec.json.Decoder[Connected | Start | Media | Dtmf | Mark | Stop] = msgspec.json.Decoder(
    Connected | Start | Media | Dtmf | Mark | Stop, strict=False
)
_event_decoder = msgspec.json.Decoder(Unknown)


def decode(text: bytes | str) -> Message:
    """Read one message.

    Args:
        text: One JSON object, UTF-8. Bytes that lie in skipped fields are not checked to be UTF-8: whoever reads the
            socket does that.

    Raises:
        BadMessage: It is not JSON, not an object with an ``event``, or a field has a type or value it cannot have.
            The reason is ``json``, ``payload`` or ``type``; the text names the field's path, never its value.
    """
    try:
        message = _decoder.decode(text)
    except msgspec.ValidationError as error:
        return _unknown_event(text, error)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadMessage("json", f"not JSON: {error}") from None
    except RecursionError:
        raise BadMessage("json", "not usable JSON: nested too deeply") from None
    if type(message) is Media:
        chunk = message.media.chunk
        if chunk is not None and not 0 <= chunk <= _LARGEST:
            raise BadMessage("type", "chunk is out of range - at `$.media.chunk`")
        if not message.media.payload:
            raise BadMessage("payload", "the payload is empty - at `$.media.payload`")
    return message


def _unknown_event(text: bytes | str, error: msgspec.ValidationError) -> Unknown:
    """Tell an event we do not know, which is fine, from a known one that is malformed."""
    try:
        unknown = _event_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError):
        # Among the errors of JSON decoding is one of its own kind for a field of the wrong type; both end here.
        raise BadMessage("type", "not an object with an `event` that is text") from None
    if unknown.event in _KNOWN:
        reason = "payload" if str(error).endswith("`$.media.payload`") else "type"
        # msgspec quotes values only of enumerations and tags, and the tag is one of ours here.
        raise BadMessage(reason, str(error)) from None
    return unknown


_encoder = msgspec.json.Encoder()


class Writer:
    """Writes messages for one stream; the part that never changes is made once.

    Args:
        stream_sid: The stream's identifier; it stands in every message.
    """

    __slots__ = ("_media", "_sid")

    def __init__(self, stream_sid: str) -> None:
        self._sid = stream_sid
        sid = _encoder.encode(stream_sid)
        self._media = b'{"event":"media","streamSid":' + sid + b',"media":{"payload":"'

    def media(self, payload: bytes) -> bytes:
        """A media message: raw codec bytes, no header, as base64."""
        return self._media + binascii.b2a_base64(payload, newline=False) + b'"}}'

    def mark(self, name: str) -> bytes:
        """A mark: the platform sends it back when the audio before it has been played or cleared."""
        return _encoder.encode({"event": "mark", "streamSid": self._sid, "mark": {"name": name}})

    def clear(self) -> bytes:
        """A clear: the platform drops what it has queued."""
        return _encoder.encode({"event": "clear", "streamSid": self._sid})

    def dtmf(self, digit: str) -> bytes:
        """One DTMF digit: ``0-9 * # A-D``."""
        return _encoder.encode({"event": "dtmf", "streamSid": self._sid, "dtmf": {"digit": digit}})


# --- The platform's side, for whoever plays its part -----------------------------------------------------------------


class PlatformWriter:
    """Writes what the platform sends, in the documented shapes: strings for counters, no sid outside ``start``.

    Args:
        stream_sid: The stream's identifier.
    """

    __slots__ = ("_sequence", "_sid")

    def __init__(self, stream_sid: str) -> None:
        self._sid = stream_sid
        self._sequence = 0

    def connected(self) -> bytes:
        """The greeting."""
        return b'{"event":"connected","protocol":"Call","version":"0.2.0"}'

    def start(
        self,
        *,
        account_sid: str,
        call_sid: str,
        encoding: str,
        sample_rate: int,
        tracks: Sequence[str] = ("inbound",),
        custom_parameters: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> bytes:
        """The start message; ``sample_rate`` in Hz, ``encoding`` as the platform spells it (``audio/x-L16``)."""
        body: dict[str, Any] = {
            "streamSid": self._sid,
            "accountSid": account_sid,
            "callSid": call_sid,
            "tracks": list(tracks),
            "customParameters": dict(custom_parameters or {}),
            "mediaFormat": {"encoding": encoding, "sampleRate": sample_rate, "channels": 1},
        }
        if name is not None:
            body["name"] = name
        return _encoder.encode({"event": "start", "sequenceNumber": self._next(), "start": body})

    def media(self, payload: bytes, *, chunk: int, timestamp_ms: int, track: str = "inbound") -> bytes:
        """A media message; ``chunk`` counts from 1 per track, ``timestamp_ms`` from the stream's start."""
        body = {
            "track": track,
            "chunk": str(chunk),
            "timestamp": str(timestamp_ms),
            "payload": base64.b64encode(payload).decode("ascii"),
        }
        return _encoder.encode({"event": "media", "sequenceNumber": self._next(), "media": body})

    def dtmf(self, digit: str, duration_ms: int = 200) -> bytes:
        """A digit pressed by a participant."""
        return _encoder.encode(
            {
                "event": "dtmf",
                "sequenceNumber": self._next(),
                "streamSid": self._sid,
                "dtmf": {"digit": digit, "duration": duration_ms},
            }
        )

    def mark(self, name: str) -> bytes:
        """The echo of a mark."""
        return _encoder.encode({"event": "mark", "streamSid": self._sid, "mark": {"name": name}})

    def stop(self) -> bytes:
        """The end."""
        return _encoder.encode({"event": "stop", "sequenceNumber": self._next()})

    def _next(self) -> str:
        self._sequence += 1
        return str(self._sequence)


class EndpointMedia(msgspec.Struct, gc=False):
    """The ``media`` object of what an endpoint sends."""

    payload: bytes


class EndpointMessage(msgspec.Struct, gc=False):
    """What an endpoint may send, read by whoever plays the platform's part."""

    event: str
    media: EndpointMedia | None = None
    mark: MarkBody | None = None
    dtmf: DtmfBody | None = None


_endpoint_decoder = msgspec.json.Decoder(EndpointMessage, strict=False)


def decode_endpoint(text: bytes | str) -> EndpointMessage:
    """Read one message an endpoint sent.

    Raises:
        BadMessage: It is not JSON or not of the documented shape.
    """
    try:
        return _endpoint_decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage("json", f"the endpoint's message cannot be read: {type(error).__name__}") from None

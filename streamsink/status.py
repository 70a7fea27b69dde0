"""Status webhooks: what the platform tells about a stream over HTTP, in both of its shapes."""

from __future__ import annotations

from typing import Literal
from urllib.parse import parse_qsl

import msgspec

from streamsink.errors import BadMessage
from streamsink.log import escape

MAX_FIELDS = 64
"""Most fields that are taken of one webhook."""
_MAX_KEY = 64

RELAY_EVENT = "calling.call.stream"
_EXPECTED = f"expected `StreamEvent` (a form or a query) or `event_type` `{RELAY_EVENT}` with `params.state` (JSON)"


class StatusEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook says. Every string is safe to log: escaped and at most 256 characters before that.

    Attributes:
        event: ``stream-started``, ``stream-stopped``, ``stream-error`` (cXML), ``streaming``, ``finished`` (RELAY), or
            whatever else the platform says.
        shape: Which of the two it was.
        stream_sid: The stream, where it is told.
        call_sid: The call, where it is told.
        name: The stream's friendly name, where it has one.
        error: What went wrong, such as ``codec_error``.
        timestamp: When, as the platform writes it.
        fields: All that came, by the platform's names; inner names of JSON are joined by dots.
    """

    event: str
    shape: Literal["cxml", "relay"]
    stream_sid: str | None = None
    call_sid: str | None = None
    name: str | None = None
    error: str | None = None
    timestamp: str | None = None
    fields: dict[str, str] = {}


def parse(content_type: str, query: bytes, body: bytes) -> StatusEvent:
    """Read a status webhook.

    Args:
        content_type: The request's Content-Type, which is believed only where the body agrees.
        query: The query string, undecoded; a POST may have one too, since it is part of the `status_url`.
        body: The body; empty for GET.

    Raises:
        BadMessage: It is neither shape; the reason is ``status``. Nothing else is raised, whatever comes.
    """
    text = body.strip()
    if text.startswith(b"{") or "json" in content_type.lower():
        return _relay(_json(text))
    return _cxml(_form(query) | _form(text))


def _cxml(given: dict[str, str]) -> StatusEvent:
    if not given.get("StreamEvent"):
        raise BadMessage("status", f"{_EXPECTED}, got {_names(given)}")
    fields = _clean(given)
    return StatusEvent(
        event=fields["StreamEvent"],
        shape="cxml",
        stream_sid=fields.get("StreamSid") or None,
        call_sid=fields.get("CallSid") or None,
        name=fields.get("StreamName") or None,
        error=fields.get("StreamError") or None,
        timestamp=fields.get("Timestamp") or None,
        fields=fields,
    )


def _relay(given: dict[str, str]) -> StatusEvent:
    if given.get("event_type") != RELAY_EVENT or not given.get("params.state"):
        raise BadMessage("status", f"{_EXPECTED}, got {_names(given)}")
    fields = _clean(given)
    return StatusEvent(
        event=fields["params.state"],
        shape="relay",
        stream_sid=fields.get("params.stream_sid") or None,
        call_sid=fields.get("params.call_id") or None,
        name=fields.get("params.name") or None,
        error=fields.get("params.error") or None,
        timestamp=fields.get("timestamp") or None,
        fields=fields,
    )


def _form(encoded: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(encoded.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise BadMessage("status", f"more than {MAX_FIELDS} form fields") from None
    return dict(pairs)


def _json(text: bytes) -> dict[str, str]:
    try:
        message = msgspec.json.decode(text, type=dict[str, object])
        fields: dict[str, str] = {}
        for key, value in message.items():
            # A level down is as far as the platform's own fields go.
            if isinstance(value, dict):
                fields |= {f"{key}.{inner}": _as_text(item) for inner, item in value.items()}
            else:
                fields[key] = _as_text(value)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadMessage("status", f"not a JSON object that can be read: {escape(str(error))}") from None
    if len(fields) > MAX_FIELDS:
        raise BadMessage("status", f"more than {MAX_FIELDS} JSON fields")
    return fields


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def _clean(fields: dict[str, str]) -> dict[str, str]:
    return {escape(key, _MAX_KEY): escape(value) for key, value in fields.items()}


def _names(fields: dict[str, str]) -> str:
    names = ", ".join(escape(name, _MAX_KEY) for name in list(fields)[:8])
    return f"the fields {names}" if names else "no fields"

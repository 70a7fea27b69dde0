"""The ``stream_obj`` that asks the platform for a stream: checked here, where the mistake is still cheap to mend."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from xml.sax.saxutils import quoteattr

from streamsink.codec import CodecSpec
from streamsink.errors import CodecError, ConfigError

CONFERENCE = "my-conference"
"""What the printed examples call the conference."""

_CODECS = ("PCMU", "PCMA", "G722", "L16")
_METHODS = ("GET", "POST")
_URL = re.compile(r"[!-~]+")
_TOKEN = re.compile(r"[ -~]+")
# Tab, newline and carriage return are XML's only control characters; surrogates and two others are not characters.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class StreamObject:
    """A stream to ask for.

    Attributes:
        url: Where this endpoint is reached: ``wss://`` only.
        codec: Such as ``L16@24000h@40i``; None: ``PCMU@8000h@20i``.
        name: A friendly name.
        realtime: Whether audio comes back; for the platform, to manage delays rather than to buffer.
        authorization_bearer_token: Sent as ``Authorization: Bearer …``; not in the repr.
        custom_parameters: Arrive as `Stream.custom_parameters`; JSON values; not in the repr.
        status_url: Where status webhooks go; not in the repr, for its path holds a secret.
        status_url_method: ``POST`` or ``GET``; None: ``POST``.

    Raises:
        ConfigError: Something in it the platform would refuse; the message says what, and how to mend it.
    """

    url: str
    codec: str | None = None
    name: str | None = None
    realtime: bool = False
    authorization_bearer_token: str | None = field(default=None, repr=False)
    custom_parameters: Mapping[str, object] | None = field(default=None, repr=False)
    status_url: str | None = field(default=None, repr=False)
    status_url_method: str | None = None

    def __post_init__(self) -> None:
        _check_url("url", self.url, ("wss",), "a stream needs TLS, so wss:// and a certificate")
        _check_text("name", self.name)
        if self.codec is not None:
            _check_codec(self.codec)
        if not isinstance(self.realtime, bool):
            raise ConfigError(f"realtime: expected True or False, got {_show(self.realtime)}")
        token = self.authorization_bearer_token
        if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
            raise ConfigError("authorization_bearer_token (not shown): expected a non-empty string of visible ASCII")
        _check_parameters(self.custom_parameters)
        if self.status_url is not None:
            _check_url("status_url", self.status_url, ("https", "http"), "webhooks are HTTP requests")
        if self.status_url_method is not None and self.status_url_method not in _METHODS:
            raise ConfigError(f"status_url_method: expected POST or GET, got {_show(self.status_url_method)}")

    def to_dict(self) -> dict[str, object]:
        """What is set, as ``call.join_conference(stream_obj=…)`` takes it."""
        given: dict[str, object] = {"url": self.url}
        for key in ("name", "codec", "status_url", "status_url_method"):
            if getattr(self, key) is not None:
                given[key] = getattr(self, key)
        if self.realtime:
            given["realtime"] = True
        if self.authorization_bearer_token is not None:
            given["authorization_bearer_token"] = self.authorization_bearer_token
        if self.custom_parameters:
            given["custom_parameters"] = dict(self.custom_parameters)
        return given

    def to_relay(self, conference: str = CONFERENCE) -> dict[str, object]:
        """The JSON-RPC call that the RELAY SDKs make of it, but for the ids of the call itself."""
        params = {"name": conference, "stream": self.to_dict()}
        return {"jsonrpc": "2.0", "method": "calling.join_conference", "params": params}

    def to_swml(self, conference: str = CONFERENCE) -> dict[str, object]:
        """A SWML document that joins the conference with this stream."""
        join = {"join_conference": {"name": conference, "stream": self.to_dict()}}
        return {"version": "1.0.0", "sections": {"main": [join]}}

    def to_cxml(self, conference: str = CONFERENCE) -> str:
        """A cXML document: a bidirectional stream with `realtime`, else one beside the call in the conference.

        Raises:
            ConfigError: The URL has a query string, which cXML does not allow, or a value cannot be written in XML.
        """
        if urlsplit(self.url).query:
            raise ConfigError(
                f"url: cXML allows no query string, got {_show(self.url)}; put what it says into custom_parameters"
            )
        attributes = {
            "url": self.url,
            "name": self.name,
            "codec": self.codec,
            "realtime": "true" if self.realtime else None,
            "authBearerToken": self.authorization_bearer_token,
            "statusCallback": self.status_url,
            "statusCallbackMethod": self.status_url_method,
        }
        stream = "<Stream" + "".join(f" {k}={_attribute(k, v)}" for k, v in attributes.items() if v is not None)
        if self.custom_parameters:
            parameters = "".join(
                f"      <Parameter name={_attribute('custom_parameters', key)}"
                f" value={_attribute('custom_parameters', value)}/>\n"
                for key, value in self.custom_parameters.items()
            )
            stream = f"{stream}>\n{parameters}    </Stream>"
        else:
            stream += "/>"
        verb = "Connect" if self.realtime else "Start"
        # A copy of the call's audio needs the call to go on somewhere: at the document's end the platform hangs up.
        name = _attribute("conference", conference)[1:-1]
        rest = "" if self.realtime else f"  <Dial>\n    <Conference>{name}</Conference>\n  </Dial>\n"
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Response>\n  <{verb}>\n    {stream}\n  </{verb}>\n{rest}</Response>"
        )

    def render(self, format: str = "python") -> str:
        """Text to paste: ``python``, ``relay``, ``swml`` or ``cxml``.

        Raises:
            ConfigError: The format is another, or cannot express this stream.
        """
        if format not in FORMATS:
            raise ConfigError(f"format: expected {', '.join(FORMATS)}, got {_show(format)}")
        return FORMATS[format](self)


def _python(stream: StreamObject) -> str:
    items = "".join(f"    {key!r}: {value!r},\n" for key, value in stream.to_dict().items())
    return f"stream_obj = {{\n{items}}}"


FORMATS: Mapping[str, Callable[[StreamObject], str]] = {
    "python": _python,
    "relay": lambda stream: json.dumps(stream.to_relay(), indent=2),
    "swml": lambda stream: json.dumps(stream.to_swml(), indent=2),
    "cxml": StreamObject.to_cxml,
}
"""What `StreamObject.render` can write."""


def _check_url(key: str, url: object, schemes: tuple[str, ...], why: str) -> None:
    if not isinstance(url, str) or not _URL.fullmatch(url):
        raise ConfigError(f"{key}: expected a URL in visible ASCII without spaces, got {_show(url)}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{key}: expected a URL, got {_show(url)}: {error}") from None
    if parts.scheme not in schemes:
        expected = " or ".join(f"{scheme}://" for scheme in schemes)
        raise ConfigError(f"{key}: expected {expected}, got {_show(url)}: {why}")
    if not parts.hostname:
        raise ConfigError(f"{key}: the host is missing in {_show(url)}; write {parts.scheme}://HOST:PORT/PATH")
    if parts.username is not None:
        # Not shown: a password stands beside it.
        raise ConfigError(f"{key}: a user name in a URL is not sent; use authorization_bearer_token")
    if parts.fragment:
        raise ConfigError(f"{key}: a fragment ('#…') is never sent, got {_show(url)}; leave it out")


def _check_codec(codec: object) -> None:
    if not isinstance(codec, str):
        raise ConfigError(f"codec: expected a string such as 'L16@24000h@40i', got {_show(codec)}")
    name = codec.partition("@")[0]
    if name.upper() not in _CODECS:
        near = difflib.get_close_matches(name.upper(), _CODECS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"codec: expected one of {', '.join(_CODECS)}, got {_show(codec)}{hint}")
    try:
        CodecSpec.parse(codec)
    except CodecError as error:
        raise ConfigError(f"codec: {error}") from None


def _check_text(key: str, text: object) -> None:
    if text is not None and not (isinstance(text, str) and text and text.isprintable()):
        raise ConfigError(f"{key}: expected a non-empty string without control characters, got {_show(text)}")


def _check_parameters(parameters: object) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"custom_parameters: expected a dict, got {type(parameters).__name__}")
    for name, value in parameters.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"custom_parameters: expected non-empty strings for names, got {_show(name)}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(
                f"custom_parameters: the value of {_show(name)} (not shown) is a {type(value).__name__} that JSON "
                "cannot hold; use strings, numbers, booleans, lists and dicts"
            ) from None


def _attribute(key: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if _NOT_XML.search(text):
        raise ConfigError(f"{key}: has a character that XML cannot hold; leave out control characters")
    # Newlines and tabs have to be written as references: a parser reads them as spaces otherwise.
    return quoteattr(text, {"\n": "&#10;", "\r": "&#13;", "\t": "&#9;"})


def _show(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"

from urllib.parse import urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsink.errors import BadMessage
from streamsink.status import StatusEvent, parse

FORM = "application/x-www-form-urlencoded"
JSON = "application/json"

STARTED = {
    "AccountSid": "b08d",
    "CallSid": "76ac",
    "ConferenceSid": "c0f3",
    "StreamSid": "7d56",
    "StreamName": "room one",
    "StreamEvent": "stream-started",
    "StreamError": "",
    "StreamTrack": "inbound_track",
    "Timestamp": "2026-11-20T20:42:18Z",
    "Unique-ID": "u1",
}
STREAMING = {
    "event_type": "calling.call.stream",
    "event_channel": "ch",
    "timestamp": 1795207338.25,
    "project_id": "p",
    "space_id": "s",
    "params": {
        "call_id": "76ac",
        "node_id": "n",
        "segment_id": "g",
        "tag": None,
        "control_id": "c1",
        "state": "streaming",
        "url": "wss://streams.example.com/",
        "name": "room one",
    },
}


def refusal(content_type: str, query: bytes, body: bytes) -> str:
    with pytest.raises(BadMessage) as caught:
        parse(content_type, query, body)
    assert caught.value.reason == "status"
    return str(caught.value)


@pytest.mark.parametrize(
    ("content_type", "query", "body"),
    [
        ("", urlencode(STARTED).encode(), b""),
        (FORM, b"", urlencode(STARTED).encode()),
        (f"{FORM}; charset=UTF-8", b"mine=1&StreamEvent=no", urlencode(STARTED).encode() + b"&mine=1"),
        ("", b"", urlencode(STARTED).encode() + b"\r\n"),
    ],
)
def test_cxml_by_get_and_post(content_type: str, query: bytes, body: bytes) -> None:
    event = parse(content_type, query, body)
    fields = {**STARTED, "mine": "1"} if query.startswith(b"mine") else STARTED
    assert event == StatusEvent(
        event="stream-started",
        shape="cxml",
        stream_sid="7d56",
        call_sid="76ac",
        name="room one",
        error=None,
        timestamp="2026-11-20T20:42:18Z",
        fields=fields,
    )


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8", FORM, ""])
def test_relay(content_type: str) -> None:
    assert parse(content_type, b"mine=1", msgspec.json.encode(STREAMING)) == StatusEvent(
        event="streaming",
        shape="relay",
        stream_sid=None,
        call_sid="76ac",
        name="room one",
        error=None,
        timestamp="1795207338.25",
        fields={
            "event_type": "calling.call.stream",
            "event_channel": "ch",
            "timestamp": "1795207338.25",
            "project_id": "p",
            "space_id": "s",
            "params.call_id": "76ac",
            "params.node_id": "n",
            "params.segment_id": "g",
            "params.tag": "",
            "params.control_id": "c1",
            "params.state": "streaming",
            "params.url": "wss://streams.example.com/",
            "params.name": "room one",
        },
    )


def test_an_error_is_told() -> None:
    event = parse(FORM, b"", b"StreamEvent=stream-error&StreamError=Duplicated+stream+ID&StreamSid=1")
    assert (event.event, event.error, event.stream_sid) == ("stream-error", "Duplicated stream ID", "1")


def test_an_event_nobody_documented_is_kept() -> None:
    assert parse("", b"StreamEvent=stream-paused", b"").event == "stream-paused"
    body = msgspec.json.encode({"event_type": "calling.call.stream", "params": {"state": {"new": [1, True]}}})
    assert parse(JSON, b"", body).event == '{"new":[1,true]}'


def test_nothing_in_it_can_break_a_log_line() -> None:
    query = urlencode({"StreamEvent": "a\nb", "StreamSid": "x" * 5000, "\x1b[2J": "\u202e"}).encode()
    event = parse("", query, b"")
    assert event.event == "a\\nb"
    assert event.stream_sid == "x" * 256 + "… (4744 more)"
    assert event.fields["\\x1b[2J"] == "\\u202e"


@pytest.mark.parametrize(
    ("content_type", "query", "body", "message"),
    [
        ("", b"", b"", "got no fields"),
        (FORM, b"", b"CallSid=1&a%0Ab=2", "got the fields CallSid, a\\nb"),
        ("", b"StreamEvent=", b"", "got the fields StreamEvent"),
        ("", b"&&;=%zz%", b"\xff\xfe\x00", "got the fields"),
        (FORM, b"", b"a=1&" * 65, "more than 64 form fields"),
        (JSON, b"", b"", "not a JSON object that can be read"),
        (JSON, b"", b"{", "not a JSON object that can be read"),
        (JSON, b"", b"[]", "not a JSON object that can be read"),
        (JSON, b"", b'"text"', "not a JSON object that can be read"),
        (JSON, b"", b'{"a": NaN}', "not a JSON object that can be read"),
        (JSON, b"", b'{"a": "\xff"}', "not a JSON object that can be read"),
        (JSON, b"", b'{"a": "\\ud800"}', "not a JSON object that can be read"),
        (JSON, b"", b'{"a":' * 10_000, "not a JSON object that can be read"),
        (JSON, b"", b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "not a JSON object that can be read"),
        (JSON, b"", b"{}", "got no fields"),
        (JSON, b"", b'{"event_type": 5, "params": {"state": "streaming"}}', "got the fields event_type, params.state"),
        (
            JSON,
            b"",
            b'{"event_type": "calling.call.stream", "params": "streaming"}',
            "got the fields event_type, params",
        ),
        (JSON, b"", b'{"event_type": "calling.call.state", "params": {"state": "ended"}}', "got the fields event_type"),
        (JSON, b"", msgspec.json.encode({str(n): n for n in range(65)}), "more than 64 JSON fields"),
    ],
)
def test_what_is_neither_shape_is_refused(content_type: str, query: bytes, body: bytes, message: str) -> None:
    assert message in refusal(content_type, query, body)


@given(
    st.sampled_from(["", FORM, JSON, "text/plain"]),
    st.binary() | st.just(b"StreamEvent=x&").flatmap(lambda start: st.binary().map(lambda rest: start + rest)),
    st.binary() | st.binary().map(lambda rest: b'{"event_type":"calling.call.stream","params":{"state":' + rest),
)
def test_arbitrary_bytes_give_an_event_or_a_bad_message(content_type: str, query: bytes, body: bytes) -> None:
    try:
        event = parse(content_type, query, body)
    except BadMessage as error:
        assert error.reason == "status"
    else:
        assert all(text.isprintable() for pair in event.fields.items() for text in pair)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(json_values)
def test_arbitrary_json_gives_an_event_or_a_bad_message(value: object) -> None:
    body = msgspec.json.encode({"event_type": "calling.call.stream", "params": {"state": value}})
    if value in (None, ""):
        refusal(JSON, b"", body)
    else:
        assert parse(JSON, b"", body).event.isprintable()

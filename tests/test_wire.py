import base64
import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsink import wire
from streamsink.errors import BadMessage

PAYLOAD = base64.b64encode(b"\x00\x01\x02").decode()


def read(message: Any) -> wire.Message:
    return wire.decode(json.dumps(message).encode())


def test_the_documented_messages_are_read() -> None:
    assert read({"event": "connected", "protocol": "Call", "version": "0.2.0"}) == wire.Connected("Call", "0.2.0")
    media = {"track": "inbound", "chunk": "1", "timestamp": "0", "payload": PAYLOAD}
    assert read({"event": "media", "sequenceNumber": "42", "media": media}) == wire.Media(
        wire.MediaBody(b"\x00\x01\x02", "inbound", 1), 42
    )
    dtmf = {"event": "dtmf", "sequenceNumber": "123", "streamSid": "7d", "dtmf": {"digit": "5", "duration": 2000}}
    assert read(dtmf) == wire.Dtmf(wire.DtmfBody("5", 2000))
    assert read({"event": "mark", "streamSid": "7d", "mark": {"name": "m"}}) == wire.Mark(wire.MarkBody("m"))
    assert read({"event": "stop", "sequenceNumber": "999"}) == wire.Stop()


def test_numbers_and_strings_read_alike() -> None:
    as_strings = {"event": "media", "sequenceNumber": "7", "media": {"chunk": "3", "payload": PAYLOAD}}
    as_numbers = {"event": "media", "sequenceNumber": 7, "media": {"chunk": 3, "payload": PAYLOAD}}
    assert read(as_strings) == read(as_numbers) == wire.Media(wire.MediaBody(b"\x00\x01\x02", "inbound", 3), 7)


def start(body: dict[str, Any] | None = None, **top: Any) -> wire.Start:
    message = read({"event": "start", "start": body or {}, **top})
    assert isinstance(message, wire.Start)
    return message


@pytest.mark.parametrize(
    "message",
    [
        {"body": {"streamSid": "x"}},
        {"body": {"stream_sid": "x"}},
        {"body": {}, "streamSid": "x"},
        {"body": {}, "stream_sid": "x"},
    ],
)
def test_the_sid_is_found_wherever_it_is(message: dict[str, Any]) -> None:
    assert start(**message).sid == "x"


def test_the_name_is_found_wherever_it_is() -> None:
    assert start({"name": "n"}).name == "n"
    assert start({"streamName": "n"}).name == "n"
    assert start({"customParameters": {"name": "n"}}).name == "n"
    assert start({"customParameters": {"name": 5}}).name is None
    assert start({}).name is None


def test_parameters_may_be_missing_null_or_of_any_type() -> None:
    assert start({}).start.custom_parameters is None
    assert start({"customParameters": None}).start.custom_parameters is None
    assert start({"customParameters": {"a": 1, "b": [True]}}).start.custom_parameters == {"a": 1, "b": [True]}


def test_the_media_format_takes_a_rate_in_either_form() -> None:
    for rate in (24000, "24000"):
        media_format = start({"mediaFormat": {"encoding": "audio/x-L16", "sampleRate": rate}}).start.media_format
        assert media_format == wire.MediaFormat("audio/x-L16", 24000, 1)


def test_an_unknown_event_is_no_error() -> None:
    assert read({"event": "surprise", "x": [1, {}]}) == wire.Unknown("surprise")


BAD = {
    "empty": (b"", "json"),
    "broken": (b'{"event":', "json"),
    "not utf-8": (b'{"event":"\xff"}', "json"),
    "NaN": (b'{"event":"media","media":{"payload":"AAAA","chunk":NaN}}', "json"),
    "nested": (b"[" * 10_000, "type"),
    "nested in an unknown event": (b'{"event":"x","y":' + b"[" * 10_000, "type"),
    "nested in start": (b'{"event":"start","start":{"customParameters":{"a":' + b"[" * 10_000, "json"),
    "an array": (b"[]", "type"),
    "no event": (b"{}", "type"),
    "event is a number": (b'{"event":5}', "type"),
    "two events": (b'{"event":"media","event":"stop"}', "type"),
    "payload is no base64": (b'{"event":"media","media":{"payload":"*"}}', "payload"),
    "payload is cut": (b'{"event":"media","media":{"payload":"AA"}}', "payload"),
    "payload is empty": (b'{"event":"media","media":{"payload":""}}', "payload"),
    "payload is a number": (b'{"event":"media","media":{"payload":5}}', "payload"),
    "payload is missing": (b'{"event":"media","media":{}}', "type"),
    "chunk is negative": (b'{"event":"media","media":{"payload":"AAAA","chunk":-1}}', "type"),
    "chunk is huge": (b'{"event":"media","media":{"payload":"AAAA","chunk":"' + b"9" * 5000 + b'"}}', "type"),
    "chunk is a fraction": (b'{"event":"media","media":{"payload":"AAAA","chunk":1.5}}', "type"),
    "chunk is a word": (b'{"event":"media","media":{"payload":"AAAA","chunk":"one"}}', "type"),
    "sid is a number": (b'{"event":"start","start":{"streamSid":5}}', "type"),
    "parameters are a list": (b'{"event":"start","start":{"customParameters":[]}}', "type"),
    "digit is a number": (b'{"event":"dtmf","dtmf":{"digit":5}}', "type"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_messages_say_why(text: bytes, reason: str) -> None:
    with pytest.raises(BadMessage) as caught:
        wire.decode(text)
    assert caught.value.reason == reason
    assert caught.value.close_code == 1008


def test_an_error_names_the_path_and_never_the_value() -> None:
    with pytest.raises(BadMessage, match=r"Expected `str`, got `int` - at `\$\.dtmf\.digit`"):
        read({"event": "dtmf", "dtmf": {"digit": 731}})
    with pytest.raises(BadMessage) as caught:
        read({"event": "media", "media": {"payload": "secret payload"}})
    assert "secret" not in str(caught.value)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(text: bytes) -> None:
    with contextlib.suppress(BadMessage):
        wire.decode(text)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["AAAA", "5", "x", ""])
json_values = scalars | st.lists(scalars, max_size=2)
FIELDS = ["media", "start", "dtmf", "mark", "payload", "chunk", "track", "digit", "name", "streamSid", "sequenceNumber"]
EVENTS = ["connected", "start", "media", "dtmf", "mark", "stop", "other"]


bodies = json_values | st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4)


@given(st.sampled_from(EVENTS), st.dictionaries(st.sampled_from(FIELDS), bodies, max_size=3))
def test_arbitrary_objects_raise_nothing_else(event: str, fields: dict[str, Any]) -> None:
    with contextlib.suppress(BadMessage):
        wire.decode(json.dumps({"event": event, **fields}).encode())


def test_what_is_written_is_the_documented_shape() -> None:
    writer = wire.Writer('sid"1')
    assert json.loads(writer.media(b"\x00\xff")) == {
        "event": "media",
        "streamSid": 'sid"1',
        "media": {"payload": "AP8="},
    }
    assert json.loads(writer.mark("m")) == {"event": "mark", "streamSid": 'sid"1', "mark": {"name": "m"}}
    assert json.loads(writer.clear()) == {"event": "clear", "streamSid": 'sid"1'}
    assert json.loads(writer.dtmf("5")) == {"event": "dtmf", "streamSid": 'sid"1', "dtmf": {"digit": "5"}}


def test_the_platforms_side_writes_strings_for_counters() -> None:
    writer = wire.PlatformWriter("s")
    assert json.loads(writer.connected()) == {"event": "connected", "protocol": "Call", "version": "0.2.0"}
    begun = writer.start(
        account_sid="a",
        call_sid="c",
        encoding="audio/x-L16",
        sample_rate=24000,
        custom_parameters={"k": "v"},
        name="standup",
    )
    assert json.loads(begun) == {
        "event": "start",
        "sequenceNumber": "1",
        "start": {
            "streamSid": "s",
            "accountSid": "a",
            "callSid": "c",
            "tracks": ["inbound"],
            "customParameters": {"k": "v"},
            "mediaFormat": {"encoding": "audio/x-L16", "sampleRate": 24000, "channels": 1},
            "name": "standup",
        },
    }
    assert json.loads(writer.media(b"\x00", chunk=1, timestamp_ms=0)) == {
        "event": "media",
        "sequenceNumber": "2",
        "media": {"track": "inbound", "chunk": "1", "timestamp": "0", "payload": "AA=="},
    }
    assert json.loads(writer.dtmf("5")) == {
        "event": "dtmf",
        "sequenceNumber": "3",
        "streamSid": "s",
        "dtmf": {"digit": "5", "duration": 200},
    }
    assert json.loads(writer.mark("m")) == {"event": "mark", "streamSid": "s", "mark": {"name": "m"}}
    assert json.loads(writer.stop()) == {"event": "stop", "sequenceNumber": "4"}
    unnamed = json.loads(writer.start(account_sid="a", call_sid="c", encoding="PCMU", sample_rate=8000))
    assert "name" not in unnamed["start"]


def test_what_an_endpoint_sends_is_read_back() -> None:
    writer = wire.Writer("s")
    media = wire.decode_endpoint(writer.media(b"\x01\x02"))
    assert media.event == "media"
    assert media.media == wire.EndpointMedia(b"\x01\x02")
    assert wire.decode_endpoint(writer.mark("m")).mark == wire.MarkBody("m")
    assert wire.decode_endpoint(writer.clear()) == wire.EndpointMessage("clear")
    with pytest.raises(BadMessage):
        wire.decode_endpoint(b"nonsense")


@given(st.text(), st.text(), st.binary(min_size=1, max_size=50))
def test_every_text_survives_the_way_there_and_back(sid: str, name: str, payload: bytes) -> None:
    if any("\ud800" <= c <= "\udfff" for c in sid + name):
        return
    writer = wire.Writer(sid)
    assert msgspec.json.decode(writer.mark(name))["mark"]["name"] == name
    assert wire.decode_endpoint(writer.media(payload)).media == wire.EndpointMedia(payload)

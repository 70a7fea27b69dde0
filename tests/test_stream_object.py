import ast
import asyncio
import json
from collections.abc import Mapping
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signalwire.relay.call import Call
from signalwire.relay.client import RelayClient
from signalwire.utils.schema_utils import SchemaUtils

from streamsink.errors import ConfigError
from streamsink.stream_object import StreamObject

PLAIN = StreamObject("wss://streams.example.com/")
FULL = StreamObject(
    url="wss://streams.example.com:8443/agent",
    codec="L16@24000h@40i",
    name='Room "one" <&> é',
    realtime=True,
    authorization_bearer_token="hunter2",
    custom_parameters={"pipeline": "agent", "caller": "a'b\n", "vip": True, "score": 5},
    status_url="https://streams.example.com:8443/status/s3cret",
    status_url_method="GET",
)
FULL_DICT: dict[str, object] = {
    "url": "wss://streams.example.com:8443/agent",
    "name": 'Room "one" <&> é',
    "codec": "L16@24000h@40i",
    "status_url": "https://streams.example.com:8443/status/s3cret",
    "status_url_method": "GET",
    "realtime": True,
    "authorization_bearer_token": "hunter2",
    "custom_parameters": {"pipeline": "agent", "caller": "a'b\n", "vip": True, "score": 5},
}


def test_only_what_is_set_is_in_the_dict() -> None:
    assert PLAIN.to_dict() == {"url": "wss://streams.example.com/"}
    assert FULL.to_dict() == FULL_DICT


def test_the_repr_hides_what_is_secret() -> None:
    assert repr(FULL) == (
        "StreamObject(url='wss://streams.example.com:8443/agent', codec='L16@24000h@40i', name='Room \"one\" <&> é', "
        "realtime=True, status_url_method='GET')"
    )


class RelayTransport:
    """The far end of a RELAY client's WebSocket: keeps what is sent and says yes to it."""

    def __init__(self, client: RelayClient) -> None:
        self.client = client
        self.sent: list[dict[str, object]] = []

    async def send(self, text: str) -> None:
        request = json.loads(text)
        self.sent.append(request)
        answer = {"jsonrpc": "2.0", "id": request["id"], "result": {"code": "200", "message": "OK"}}
        self.client._pending[request["id"]].set_result(answer["result"])


@pytest.mark.parametrize("stream", [PLAIN, FULL], ids=["plain", "full"])
async def test_the_real_sdk_sends_it_as_the_stream_of_join_conference(stream: StreamObject) -> None:
    client = RelayClient(project="p", token="t")
    transport = RelayTransport(client)
    client._ws = transport  # type: ignore[assignment]
    client._connected = True
    call = Call(client, call_id="c1", node_id="n1", project_id="p", context="x")
    async with asyncio.timeout(10):
        await call.join_conference("my-conference", stream_obj=stream.to_dict())
    [request] = transport.sent
    assert request["method"] == "calling.join_conference"
    relay = stream.to_relay()
    assert relay["method"] == request["method"]
    assert request["params"] == {"node_id": "n1", "call_id": "c1", **relay["params"]}  # type: ignore[dict-item]
    assert relay["params"] == {"name": "my-conference", "stream": stream.to_dict()}


def test_swml_is_a_document_of_the_sdks_schema() -> None:
    document = FULL.to_swml("room 5")
    join = {"name": "room 5", "stream": FULL_DICT}
    assert document == {"version": "1.0.0", "sections": {"main": [{"join_conference": join}]}}
    schema = SchemaUtils()
    assert schema.full_validation_available
    # The schema that the SDK ships is older than `stream`: it is judged with the rest as soon as the schema knows it.
    if "stream" not in schema.get_verb_properties("join_conference").get("properties", {}):
        del join["stream"]
        document = {"version": "1.0.0", "sections": {"main": [{"join_conference": join}]}}
    assert schema.validate_document(document) == (True, [])


def test_cxml_with_talk_back() -> None:
    response = ElementTree.fromstring(FULL.to_cxml().encode())
    [connect] = response
    [stream] = connect
    assert (response.tag, connect.tag, stream.tag) == ("Response", "Connect", "Stream")
    assert stream.attrib == {
        "url": "wss://streams.example.com:8443/agent",
        "name": 'Room "one" <&> é',
        "codec": "L16@24000h@40i",
        "realtime": "true",
        "authBearerToken": "hunter2",
        "statusCallback": "https://streams.example.com:8443/status/s3cret",
        "statusCallbackMethod": "GET",
    }
    assert [(item.tag, item.attrib) for item in stream] == [
        ("Parameter", {"name": "pipeline", "value": "agent"}),
        ("Parameter", {"name": "caller", "value": "a'b\n"}),
        ("Parameter", {"name": "vip", "value": "true"}),
        ("Parameter", {"name": "score", "value": "5"}),
    ]


def test_cxml_without_talk_back_goes_on_to_the_conference() -> None:
    response = ElementTree.fromstring(PLAIN.to_cxml('<"Room" & 1>').encode())
    assert [(item.tag, item.attrib, item.text and item.text.strip()) for item in response.iter()] == [
        ("Response", {}, ""),
        ("Start", {}, ""),
        ("Stream", {"url": "wss://streams.example.com/"}, None),
        ("Dial", {}, ""),
        ("Conference", {}, '<"Room" & 1>'),
    ]


def test_cxml_takes_no_query_string() -> None:
    stream = StreamObject("wss://x/?room=1")
    assert stream.to_dict() == {"url": "wss://x/?room=1"}
    with pytest.raises(
        ConfigError, match=r"^url: cXML allows no query string, got 'wss://x/\?room=1'; put what it says"
    ):
        stream.to_cxml()


def test_cxml_cannot_hold_every_character() -> None:
    stream = StreamObject("wss://x", custom_parameters={"a": "secret\x00"})
    with pytest.raises(ConfigError, match=r"^custom_parameters: has a character that XML cannot hold") as caught:
        stream.to_cxml()
    assert "secret" not in str(caught.value)


@given(st.dictionaries(st.text(min_size=1), st.text()), st.text())
def test_cxml_is_well_formed_whatever_it_holds(parameters: dict[str, str], conference: str) -> None:
    stream = StreamObject("wss://x", custom_parameters=parameters)
    try:
        document = stream.to_cxml(conference)
    except ConfigError:
        return
    root = ElementTree.fromstring(document.encode())
    assert {item.attrib["name"]: item.attrib["value"] for item in root.iter("Parameter")} == parameters
    assert (root.find("Dial/Conference").text or "") == conference  # type: ignore[union-attr]


def test_every_format_can_be_pasted() -> None:
    name, _, literal = FULL.render("python").partition(" = ")
    assert (name, ast.literal_eval(literal)) == ("stream_obj", FULL_DICT)
    assert json.loads(FULL.render("relay")) == FULL.to_relay()
    assert json.loads(FULL.render("swml")) == FULL.to_swml()
    assert FULL.render("cxml") == FULL.to_cxml()
    assert FULL.render() == FULL.render("python")
    with pytest.raises(ConfigError, match=r"^format: expected python, relay, swml, cxml, got 'xml'$"):
        FULL.render("xml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "ws://x"}, "url: expected wss://, got 'ws://x': a stream needs TLS, so wss:// and a certificate"),
        (
            {"url": "https://x"},
            "url: expected wss://, got 'https://x': a stream needs TLS, so wss:// and a certificate",
        ),
        ({"url": "x:8443"}, "url: expected wss://, got 'x:8443': a stream needs TLS, so wss:// and a certificate"),
        ({"url": "wss:///x"}, "url: the host is missing in 'wss:///x'; write wss://HOST:PORT/PATH"),
        (
            {"url": "wss://x:0x"},
            "url: expected a URL, got 'wss://x:0x': Port could not be cast to integer value as '0x'",
        ),
        ({"url": "wss://a b"}, "url: expected a URL in visible ASCII without spaces, got 'wss://a b'"),
        ({"url": ""}, "url: expected a URL in visible ASCII without spaces, got ''"),
        ({"url": None}, "url: expected a URL in visible ASCII without spaces, got None"),
        ({"url": "wss://u:pw@x"}, "url: a user name in a URL is not sent; use authorization_bearer_token"),
        ({"url": "wss://x/#a"}, "url: a fragment ('#…') is never sent, got 'wss://x/#a'; leave it out"),
        ({"codec": "OPUS"}, "codec: expected one of PCMU, PCMA, G722, L16, got 'OPUS'"),
        ({"codec": "PCMX@8000h"}, "codec: expected one of PCMU, PCMA, G722, L16, got 'PCMX@8000h'; did you mean PCMU?"),
        ({"codec": "mulaw"}, "codec: expected one of PCMU, PCMA, G722, L16, got 'mulaw'"),
        ({"codec": 5}, "codec: expected a string such as 'L16@24000h@40i', got 5"),
        ({"name": ""}, "name: expected a non-empty string without control characters, got ''"),
        ({"name": "a\x1b"}, "name: expected a non-empty string without control characters, got 'a\\x1b'"),
        ({"name": "x" * 90 + "\n"}, f"name: expected a non-empty string without control characters, got '{'x' * 79}…"),
        ({"realtime": "yes"}, "realtime: expected True or False, got 'yes'"),
        (
            {"authorization_bearer_token": "hünter2"},
            "authorization_bearer_token (not shown): expected a non-empty string of visible ASCII",
        ),
        (
            {"authorization_bearer_token": ""},
            "authorization_bearer_token (not shown): expected a non-empty string of visible ASCII",
        ),
        ({"custom_parameters": [("a", "b")]}, "custom_parameters: expected a dict, got list"),
        ({"custom_parameters": {5: "b"}}, "custom_parameters: expected non-empty strings for names, got 5"),
        (
            {"custom_parameters": {"a": b"hunter2"}},
            "custom_parameters: the value of 'a' (not shown) is a bytes that JSON cannot hold; "
            "use strings, numbers, booleans, lists and dicts",
        ),
        (
            {"custom_parameters": {"a": float("nan")}},
            "custom_parameters: the value of 'a' (not shown) is a float that JSON cannot hold; "
            "use strings, numbers, booleans, lists and dicts",
        ),
        (
            {"status_url": "ftp://x"},
            "status_url: expected https:// or http://, got 'ftp://x': webhooks are HTTP requests",
        ),
        ({"status_url_method": "PUT"}, "status_url_method: expected POST or GET, got 'PUT'"),
    ],
)
def test_what_the_platform_would_refuse(given: Mapping[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StreamObject(**{"url": "wss://x", **given})  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("codec", ["L16@12345h", "PCMU@16000h", "PCMU@", "L16@24000h@0i"])
def test_a_modifier_that_cannot_be_is_refused(codec: str) -> None:
    with pytest.raises(ConfigError, match=r"^codec: "):
        StreamObject("wss://x", codec=codec)


@pytest.mark.parametrize("codec", ["PCMU", "pcma", "PCMU@40i", "G722", "L16@24000h@40i", "L16@16000h"])
def test_documented_codecs_are_passed_on_as_written(codec: str) -> None:
    assert StreamObject("wss://x", codec=codec).to_dict()["codec"] == codec

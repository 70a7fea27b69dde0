"""The parts of a vendor's link that need no socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamsink.errors import SpeechError
from streamsink.speech.stt.link import Timeline, read_key, service_url


def test_time_sent_is_placed_in_the_audio_across_gaps() -> None:
    timeline = Timeline()
    timeline.add(5.0, 2.0)
    timeline.add(7.0, 1.0)
    timeline.add(10.0, 4.0)
    assert timeline.sent == 7.0
    assert [timeline.place(moment) for moment in (0.0, 1.0, 2.5, 3.0, 3.5, 7.0)] == [5.0, 6.0, 7.5, 8.0, 10.5, 14.0]


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " sk-1 \n")
    monkeypatch.setenv("A_KEY_FILE", "/not/read")
    assert read_key("a", "A_KEY") == "sk-1"


def test_or_from_a_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sk-2\n")
    monkeypatch.delenv("A_KEY", raising=False)
    monkeypatch.setenv("A_KEY_FILE", str(tmp_path / "key"))
    assert read_key("a", "A_KEY") == "sk-2"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "a needs a key: set A_KEY, or A_KEY_FILE to the path of a file that has it"),
        ({"A_KEY": "two words"}, r"a: the key in A_KEY \(not shown\) has characters other than visible ASCII"),
        ({"A_KEY": "schlüssel"}, r"not shown"),
        (
            {"A_KEY_FILE": "/no/such/file"},
            r"A_KEY_FILE names /no/such/file, which cannot be read \(FileNotFoundError\)",
        ),
    ],
)
def test_a_key_that_cannot_be_had_is_one_sentence(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("A_KEY", "A_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpeechError, match=message) as caught:
        read_key("a", "A_KEY")
    for value in ("two words", "schlüssel"):
        assert value not in str(caught.value)


def test_a_service_is_where_it_usually_is_or_where_it_was_put() -> None:
    assert service_url("a", None, "wss://a.example/v1") == "wss://a.example/v1"
    assert service_url("a", "ws://10.0.0.1:8080/v1", "wss://a.example/v1") == "ws://10.0.0.1:8080/v1"


@pytest.mark.parametrize("url", ["https://a.example", "a.example", "wss:///v1", "wss://a.example/?model=x"])
def test_a_url_of_no_websocket_is_one_sentence(url: str) -> None:
    with pytest.raises(SpeechError, match=r"a: url is '.*'; wanted one such as wss://a\.example/v1, without a query"):
        service_url("a", url, "wss://a.example/v1")

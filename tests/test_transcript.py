"""The files of a transcript: valid, exclusive, private, and finished after a crash."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import msgspec
import pytest

from streamsink.audio import Track
from streamsink.processors.transcript import TranscriptPart, line_of, repair, subrip, webvtt
from streamsink.speech.events import Transcript, Word

HELLO = Transcript(
    utterance=0,
    revision=3,
    text="hello you",
    final=True,
    start=0.13,
    end=1.0,
    words=(Word("hello", 0.13, 0.5), Word("you", 0.5, 1.0)),
    confidence=0.75,
    language="en-US",
    speaker="inbound",
)
HOLE = Transcript(1, 0, "", True, 3599.9996, 3723.5, speaker="inbound", dropped=True)
REPLY = Transcript(0, 0, "a <b> & c\n\n--> d", True, 2.0, 2.0, track=Track.OUTBOUND, speaker="out & about")


def test_a_line_is_what_the_contract_says() -> None:
    assert json.loads(msgspec.json.encode(line_of(HELLO))) == {
        "start": 0.13,
        "end": 1.0,
        "text": "hello you",
        "track": "inbound",
        "speaker": "inbound",
        "final": True,
        "words": [{"word": "hello", "start": 0.13, "end": 0.5}, {"word": "you", "start": 0.5, "end": 1.0}],
        "utterance": 0,
        "confidence": 0.75,
        "language": "en-US",
        "dropped": False,
    }


def test_cues_of_two_voices_and_a_hole() -> None:
    lines = [line_of(transcript) for transcript in (HELLO, REPLY, HOLE)]
    assert webvtt(lines) == (
        "WEBVTT\n\n"
        "00:00:00.130 --> 00:00:01.000\n<v inbound>hello you\n\n"
        "00:00:02.000 --> 00:00:02.001\n<v out &amp; about>a &lt;b&gt; &amp; c → d\n\n"
        "NOTE not transcribed: 01:00:00.000 to 01:02:03.500\n"
    )
    assert subrip(lines) == (
        "1\n00:00:00,130 --> 00:00:01,000\ninbound: hello you\n\n"
        "2\n00:00:02,000 --> 00:00:02,001\nout & about: a <b> & c → d\n"
    )


def test_one_voice_needs_no_name() -> None:
    assert webvtt([line_of(HELLO), line_of(HOLE)]).count("<v") == 0
    assert subrip([line_of(HELLO)]).endswith("\nhello you\n")
    assert (webvtt([]), subrip([])) == ("WEBVTT\n", "")


def test_lines_outlive_the_process_and_cues_come_in_order(tmp_path: Path) -> None:
    part = TranscriptPart(tmp_path, "call", shared=True)
    part.append([line_of(HOLE)])
    live = tmp_path / "call.transcript.jsonl.part"
    assert json.loads(live.read_text())["dropped"] is True
    part.append([line_of(HELLO)])
    part.finish()
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "call.transcript.jsonl": 0o600,
        "call.vtt": 0o600,
        "call.srt": 0o600,
    }
    assert [json.loads(line)["utterance"] for line in part.path.read_text().splitlines()] == [1, 0]
    assert (tmp_path / "call.vtt").read_text().index("hello you") < (tmp_path / "call.vtt").read_text().index("NOTE")


def test_a_stem_has_one_transcript(tmp_path: Path) -> None:
    first = TranscriptPart(tmp_path, "call", shared=True)
    with pytest.raises(FileExistsError):
        TranscriptPart(tmp_path, "call", shared=True)
    first.finish()
    with pytest.raises(FileExistsError):
        TranscriptPart(tmp_path, "call", shared=True)


@pytest.mark.parametrize(("shared", "text", "stays"), [(False, "", False), (True, "", True), (False, "{}", True)])
def test_a_stem_of_its_own_is_not_reserved_any_more(tmp_path: Path, shared: bool, text: str, stays: bool) -> None:
    reservation = tmp_path / "call.json.part"
    reservation.write_text(text)
    TranscriptPart(tmp_path, "call", shared=shared).finish()
    assert reservation.exists() == stays


def test_what_a_crash_left_is_finished(tmp_path: Path) -> None:
    part = TranscriptPart(tmp_path, "call", shared=True)
    part.append([line_of(HELLO)])
    live = tmp_path / "call.transcript.jsonl.part"
    assert not repair(live)
    copy = tmp_path / "other.transcript.jsonl.part"
    copy.write_bytes(live.read_bytes() + live.read_bytes()[:40])
    (tmp_path / "other.vtt.part").write_text("half")
    assert repair(copy)
    assert (tmp_path / "other.transcript.jsonl").read_bytes() == live.read_bytes()
    assert "hello you" in (tmp_path / "other.vtt").read_text()
    assert "hello you" in (tmp_path / "other.srt").read_text()
    assert not list(tmp_path.glob("other*.part"))
    part.finish()


def test_a_full_disk_leaves_the_part(tmp_path: Path) -> None:
    part = TranscriptPart(tmp_path, "call", shared=True)
    part.append([line_of(HELLO)])
    (tmp_path / "call.vtt.part").mkdir()
    with pytest.raises(OSError, match=r"call\.vtt\.part"):
        part.finish()
    assert (tmp_path / "call.transcript.jsonl.part").read_bytes()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(part._fd)

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from streamsink import wire
from streamsink.codec import CodecSpec
from streamsink.errors import SimulationError
from streamsink.simulator.far_end import Durations
from streamsink.simulator.script import (
    Step,
    call_script,
    encode_payloads,
    perform,
    read_audio,
    read_capture,
    silence_script,
)
from tests.scripted_endpoint import tone


def test_a_script_has_every_message_at_its_time() -> None:
    writer = wire.PlatformWriter("sid")
    skips = iter([False, True] + [False] * 30)
    steps = list(call_script(writer, [b"a", b"b", b"c"], 20, frames=27, dtmf="1#", skip=lambda: next(skips)))
    told = [(step.at, None if step.text is None else json.loads(step.text), step.media) for step in steps]
    assert told[:3] == [
        (
            0.0,
            {
                "event": "media",
                "sequenceNumber": "1",
                "media": {"track": "inbound", "chunk": "1", "timestamp": "0", "payload": "YQ=="},
            },
            True,
        ),
        (0.02, None, True),
        (
            0.04,
            {
                "event": "media",
                "sequenceNumber": "3",
                "media": {"track": "inbound", "chunk": "3", "timestamp": "40", "payload": "Yw=="},
            },
            True,
        ),
    ]
    digit = {
        "event": "dtmf",
        "sequenceNumber": "26",
        "streamSid": "sid",
        "dtmf": {"digit": "1", "duration": 200},
    }
    assert told[25:27] == [
        (0.5, digit, False),
        (
            0.5,
            {
                "event": "media",
                "sequenceNumber": "27",
                "media": {"track": "inbound", "chunk": "26", "timestamp": "500", "payload": "Yg=="},
            },
            True,
        ),
    ]
    # The second digit is due after the audio: the call lasts until it is sent.
    digit = {**digit, "sequenceNumber": "29", "dtmf": {"digit": "#", "duration": 200}}
    assert told[28:] == [(0.75, digit, False), (0.75, None, False)]


def test_a_script_ends_with_its_last_frame() -> None:
    steps = list(call_script(wire.PlatformWriter("sid"), [b"a"], 40, frames=2))
    assert [(step.at, step.media) for step in steps] == [
        (0.0, True),
        (0.04, True),
        (0.08, False),
    ]


async def test_pacing_is_on_absolute_deadlines() -> None:
    wakes = iter([100.0, 100.0196, 100.045, 100.3, 100.3, 100.3, 100.12])
    now = 99.99
    slept, done = [], []

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now = max(now, next(wakes))

    late = Durations()
    steps = [Step(k * 0.02, b"x", media=True) for k in range(6)]
    await perform(steps, lambda step: done.append((step.at, now)), late, begin=100.0, clock=lambda: now, sleep=sleep)
    # A wake that is a little early is near enough; a late one moves no later one; after a stall one a turn catches up.
    assert slept == pytest.approx([0.01, 0.02, 0.0204, 0.015, 0.0, 0.0])
    assert done == [(0.0, 100.0), (0.02, 100.0196), (0.04, 100.045), (0.06, 100.3), (0.08, 100.3), (0.1, 100.3)]
    assert late.percentiles() == {"p50": 5.0, "p99": 240.0, "p999": 240.0, "max": 240.0}


@pytest.mark.parametrize("codec", ["PCMU", "PCMA@40i", "G722", "L16@16000h", "L16@24000h@40i"])
def test_frames_are_whole_and_decode_to_the_padded_audio(codec: str) -> None:
    spec = CodecSpec.parse(codec)
    samples = tone(spec.frame_samples * 3 + 1, spec.rate)
    payloads = encode_payloads(samples, spec)
    assert [len(payload) for payload in payloads] == [spec.bytes_per_second * spec.ptime // 1000] * 4
    padded = np.concatenate((samples, np.zeros(spec.frame_samples - 1, np.int16)))
    assert b"".join(payloads) == spec.encoder().encode(padded)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
def test_any_sample_width_is_read_without_a_change(tmp_path: Path, subtype: str) -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 1234], np.int16)
    soundfile.write(tmp_path / "a.wav", samples / 32768, 8000, subtype=subtype)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 8000), samples)


def test_channels_are_averaged_and_overs_saturate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [[0.5, 0.25], [2.0, 1.5], [-2.0, -1.5]], 8000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav", 8000).tolist() == [12288, 32767, -32768]


def test_audio_is_resampled_to_the_codec(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(44_100, 44_100), 44_100)
    samples = read_audio(tmp_path / "a.flac", 8000)
    assert 8000 <= len(samples) <= 8080
    spectrum = np.abs(np.fft.rfft(samples[:8000] * np.hanning(8000)))
    assert int(spectrum.argmax()) == 440


def test_a_file_that_is_no_sound_is_told(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), 8000)
    (tmp_path / "text.wav").write_text("no sound")
    for name, told in [
        ("missing.wav", "there is no sound file"),
        ("empty.wav", "holds no audio"),
        ("text.wav", "cannot be read as sound"),
    ]:
        with pytest.raises(SimulationError, match=told):
            read_audio(tmp_path / name, 8000)


HEAD = '{"head": {"path": "/agent", "headers": [["host", "x"], ["authorization", "Bearer ***"]]}, "t": 0.0, "more": 1}'


def test_a_capture_is_read(tmp_path: Path) -> None:
    writer = wire.PlatformWriter("sid")
    start = writer.start(account_sid="a", call_sid="c", encoding="audio/x-alaw", sample_rate=8000)
    media = writer.media(b"abc", chunk=1, timestamp_ms=0)
    lines = [HEAD, json.dumps({"t": 0.01, "text": start.decode()}), json.dumps({"t": 0.02, "text": media.decode()})]
    lines += ['{"t": 0.02, "base64": "/w=="}', '{"t": 0.5, "text": "no JSON"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    capture = read_capture(tmp_path / "a.jsonl")
    assert (capture.path, capture.codec) == ("/agent", CodecSpec.parse("PCMA"))
    assert capture.steps == (
        Step(0.01, start),
        Step(0.02, media, media=True),
        Step(0.02, b"\xff"),
        Step(0.5, b"no JSON"),
    )


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "is empty"),
        ([HEAD], "holds no message"),
        (["RIFF"], "line 1: "),
        (['{"t": 0, "text": ""}'], "line 1: Object missing required field `head`"),
        ([HEAD, '{"t": 0, "text": ""}', "{"], "line 3: "),
        ([HEAD, '{"t": "x", "text": ""}'], r"line 2: Expected `float`, got `str` - at `\$.t`"),
        ([HEAD, '{"t": 0}'], "line 2: expected either `text` or `base64`"),
        ([HEAD, '{"t": 0, "text": "", "base64": ""}'], "line 2: expected either `text` or `base64`"),
        ([HEAD, '{"t": 0, "base64": "?"}'], "line 2: "),
        ([HEAD, '{"t": 1, "text": ""}', '{"t": 0.5, "text": ""}'], "line 3: `t` is 0.5, earlier than the line before"),
        ([HEAD, '{"t": -1, "text": ""}'], "line 2: `t` is -1"),
        ([HEAD, "[" * 100_000], "line 2: "),
    ],
)
def test_a_broken_capture_names_the_line(tmp_path: Path, lines: list[str], told: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(SimulationError, match=told):
        read_capture(tmp_path / "a.jsonl")


def test_a_missing_capture_is_told(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="cannot be read: No such file"):
        read_capture(tmp_path / "a.jsonl")


def test_silence_goes_on_where_the_audio_ended() -> None:
    steps = list(silence_script(wire.PlatformWriter("7d56"), [b"a", b"b"], 20, sent=5, over=lambda at: at > 0.05))
    assert [(step.at, step.media) for step in steps] == [(0.0, False), (0.02, False), (0.04, False)]
    media = [json.loads(step.text)["media"] for step in steps if step.text is not None]
    assert [(each["chunk"], each["timestamp"]) for each in media] == [
        ("6", "100"),
        ("7", "120"),
        ("8", "140"),
    ]
    assert [base64.b64decode(each["payload"]) for each in media] == [b"a", b"b", b"b"]

"""Tones, and sound files as a source."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import soundfile

from streamsink.audio import Samples
from streamsink.errors import CodecError
from streamsink.playout import Outcome, Played
from streamsink.sound import SoundFile, check_tone, tone
from tests.far_end import FarEnd, until, wait
from tests.streams import Line, make_stream


async def made(hz: float, ms: float, rate: int) -> Samples:
    return np.concatenate([block async for block in tone(hz, ms, rate)])


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
@pytest.mark.parametrize("ms", [1, 5, 100, 1234])
async def test_a_tone_has_its_level_its_length_and_no_click(rate: int, ms: int) -> None:
    audio = (await made(440, ms, rate)).astype(float)
    assert len(audio) == rate * ms // 1000
    step = 2 * np.pi * 440 / rate * 8231 + 8231 * np.pi / 2 / (0.005 * rate)
    if ms >= 100:
        assert np.abs(audio).max() == pytest.approx(32767 * 10 ** (-12 / 20), rel=0.01)
        assert np.sqrt(np.mean(audio[rate // 50 : -rate // 50] ** 2)) == pytest.approx(8231 / 2**0.5, rel=0.02)
        assert np.abs(np.diff(audio, prepend=0, append=0)).max() < step
        assert np.abs(audio[[0, -1]]).max() < 100
        spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
        assert np.argmax(spectrum) * rate / len(audio) == pytest.approx(440, abs=rate / len(audio))


@pytest.mark.parametrize(
    ("hz", "ms", "words"),
    [
        (0, 100, "above 0 and below 4000 Hz"),
        (4000, 100, "got 4000"),
        (float("nan"), 100, "got nan"),
        (440, 0, "a length above 0"),
        (440, 600_001, "up to 600000 ms"),
    ],
)
def test_a_tone_that_cannot_be_made_is_refused(hz: float, ms: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_tone(hz, ms, 8000)


async def test_a_stream_plays_tones_and_files(tmp_path: Path) -> None:
    path = tmp_path / "hello.wav"
    soundfile.write(path, np.zeros(1600), 8000)
    line = Line()
    stream = make_stream(tmp_path, line=line, codec="L16@8000h")
    with pytest.raises(ValueError, match="below 4000 Hz"):
        stream.tone(5000, 10)
    tones, file = stream.tone(440, 50), stream.play_file(path)
    stream.play(np.zeros(160, np.int16), 8000)
    await until(lambda: len(line.sent) >= 5)
    assert tones.played_ms <= 50
    assert file.played_ms <= 200


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
async def test_a_file_is_played_whole_whatever_its_rate_and_channels(
    tmp_path: Path, kind: str, channels: int, rate: int
) -> None:
    path = tmp_path / f"sound.{kind}"
    at = np.arange(rate // 2) / rate
    left = 0.5 * np.sin(2 * np.pi * 300 * at)
    columns = [left, np.zeros_like(left)][:channels]
    soundfile.write(path, np.stack(columns, axis=1), rate)
    blocks = [block async for block in SoundFile(path)]
    audio = np.concatenate(blocks)
    assert len(blocks) == 3
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert np.abs(audio - left / channels).max() < (0.05 if kind == "ogg" else 1e-3)


async def far_end_of(path: Path) -> Played:
    far_end = FarEnd()
    waiter = asyncio.ensure_future(wait(far_end.playback.play(SoundFile(path), None)))
    while not waiter.done():
        await asyncio.sleep(0)
        far_end.run(0.001)
    return await waiter


async def test_a_file_is_told_as_played(tmp_path: Path) -> None:
    path = tmp_path / "hello.wav"
    soundfile.write(path, np.zeros((11_025, 2)), 22_050)
    assert await far_end_of(path) == Played(Outcome.FINISHED, 500)


async def test_a_file_that_cannot_be_read_fails_its_playout_alone(tmp_path: Path) -> None:
    missing = await far_end_of(tmp_path / "missing.wav")
    assert (missing.outcome, type(missing.error)) == (Outcome.FAILED, FileNotFoundError)
    (tmp_path / "text.wav").write_text("no sound")
    wrong = await far_end_of(tmp_path / "text.wav")
    assert (wrong.outcome, type(wrong.error)) == (Outcome.FAILED, soundfile.LibsndfileError)
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 4000)
    slow = await far_end_of(tmp_path / "slow.wav")
    assert (slow.outcome, type(slow.error)) == (Outcome.FAILED, CodecError)


async def test_a_file_is_closed_when_its_playout_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(80_000), 8000)
    far_end, source = FarEnd(), SoundFile(path)
    playout = far_end.playback.play(source, None)
    await until(lambda: far_end.frames >= 3)
    assert source._file is not None
    playout.cancel()
    await until(lambda: source._file is None)

"""eSpeak NG in a real process of its own, and what is common to all that speak."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.config import SpeechSettings
from streamsink.errors import ChildDied, SpeechError
from streamsink.speech import process
from streamsink.speech.espeak import Espeak
from streamsink.speech.synthesis import Utterance, build
from tests.speaking import closing, loudness, refused, spoken

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (extra speech) is not installed"
)


def pitch(samples: Samples) -> float:
    """Of a voice at 22050 Hz: the median over its louder parts, in Hz."""
    pieces = [samples[at : at + 1024].astype(float) for at in range(0, len(samples) - 1024, 512)]
    pieces = [piece - piece.mean() for piece in pieces if piece.std() > 0.5 * samples.std()]
    lags = range(22050 // 350, 22050 // 70)
    return float(np.median([22050 / max(lags, key=lambda lag: piece[lag:] @ piece[:-lag]) for piece in pieces]))


@needs_espeak
async def test_espeak_speaks_and_tells_each_word() -> None:
    async with closing(build(SpeechSettings())) as engine:
        await engine.open()
        samples, utterance = await spoken(engine, " Hello world, Mr. Smith.  It costs 3.14 dollars! ")
        assert utterance.sample_rate == 22050
        assert 3.0 < len(samples) / 22050 < 6.0
        assert -30 < loudness(samples) < -10
        assert [text for _, text in utterance.heard] == [
            " Hello",
            " world,",
            " Mr.",
            " Smith.",
            "  It",
            " costs",
            " 3.14",
            " dollars!",
        ]
        positions = [position for position, _ in utterance.heard]
        assert positions == sorted(set(positions))
        assert positions[-1] == len(samples)
        # Where a sentence ends there is its pause.
        assert np.abs(samples[-1000:]).max() < 100


@needs_espeak
async def test_espeak_has_many_voices_and_any_script() -> None:
    async with closing(build(SpeechSettings(voice="de"))) as engine:
        # Each a little different from the last time: it has some noise in it.
        pitches = {voice: pitch((await spoken(engine, "Zweiundvierzig.", voice))[0]) for voice in ("de", "de+f3")}
        assert pitches["de"] < 150 < pitches["de+f3"]
        german, english = [len((await spoken(engine, "Zweiundvierzig.", voice))[0]) for voice in (None, "en-gb")]
        assert abs(german - english) > 1000
        for text in (
            "Grüße, déjà vu — 日本語。",
            "<speak>&amp;[[h@l@U]]</speak>",
            "\x01" * 40 + "a\x00b\ud800c",
            "💥1",
        ):
            samples, utterance = await spoken(engine, text)
            assert len(samples) > 2000
            assert text.startswith("".join(heard for _, heard in utterance.heard))


@needs_espeak
async def test_a_voice_espeak_does_not_have() -> None:
    async with closing(build(SpeechSettings())) as engine:
        for voice in ("nope", "en-nope", "en+nope", "en+../f2", "+f2", "/etc/passwd"):
            assert (await refused(engine, voice=voice)).startswith(f"espeak has no voice {voice!r}; wanted a language")
        message = await refused(engine, voice="nope\n")
        assert message.startswith(r"espeak has no voice 'nope\n'; wanted a language such as en-us, en-gb, de or fr")
        assert len((await spoken(engine, "hello"))[0]) > 4000
    async with closing(build(SpeechSettings(voice="nope"))) as engine:
        with pytest.raises(SpeechError, match="no voice 'nope'"):
            await engine.open()


@needs_espeak
async def test_many_speak_at_once_and_some_give_up() -> None:
    async with closing(build(SpeechSettings())) as engine:
        alone, _ = await spoken(engine, "one hundred")
        tasks = [asyncio.ensure_future(spoken(engine, "one hundred")) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        for result in results[1::2]:
            assert isinstance(result, tuple)
            assert abs(len(result[0]) - len(alone)) < 2000


@needs_espeak
async def test_an_engine_that_dies_is_told_and_started_again(read_log: Callable[[], str]) -> None:
    async with closing(Espeak(SpeechSettings())) as engine:
        await engine.open()
        first = engine.pid
        assert first is not None
        # In the midst of a sentence.
        os.kill(first, signal.SIGSTOP)
        speaking = asyncio.ensure_future(refused(engine, "the secret word"))
        waiting = asyncio.ensure_future(spoken(engine, "hello"))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        assert "espeak failed" in (message := await speaking)
        assert "status -9; the next text starts it again" in message
        assert len((await waiting)[0]) > 4000
        second = engine.pid
        assert second not in (None, first)
        # Between two sentences: nothing is lost, so nobody is bothered.
        assert second is not None
        os.kill(second, signal.SIGKILL)
        assert engine._child is not None
        with pytest.raises(ChildDied):
            await engine._child.receive()
        assert len((await spoken(engine, "hello"))[0]) > 4000
    assert "speech engine ended while idle" in read_log()
    assert "secret" not in read_log()


@needs_espeak
async def test_an_engine_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with closing(Espeak(SpeechSettings())) as engine:
        await engine.open()
        os.kill(engine.pid or 0, signal.SIGSTOP)
        monkeypatch.setattr(process, "PATIENCE", 0.05)
        assert (await refused(engine)).startswith("espeak did not answer within 0.05 s and was ended")
        monkeypatch.setattr(process, "PATIENCE", 30.0)
        assert len((await spoken(engine, "hello"))[0]) > 4000


@needs_espeak
async def test_nothing_is_spoken_after_the_end() -> None:
    engine = Espeak(SpeechSettings())
    await engine.close()
    assert await refused(engine) == "the endpoint has ended: nothing can be spoken any more"
    engine = Espeak(SpeechSettings())
    await engine.open()
    await engine.close()
    assert "ended" in await refused(engine)


async def test_a_missing_extra_names_the_line_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for settings, line in (
        (SpeechSettings(), "pip install 'streamsink[speech]'"),
        (SpeechSettings(synthesizer="piper", voice="x"), "pip install 'streamsink[piper]'"),
    ):
        with pytest.raises(SpeechError) as caught:
            Utterance(build(settings), "hello")
        assert str(caught.value).endswith(line)


async def test_no_room_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: Any, **options: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    monkeypatch.setattr(Espeak, "check", lambda self, voice: None)
    assert await refused(Espeak(SpeechSettings())) == "espeak cannot be started: Resource temporarily unavailable"


@pytest.mark.parametrize("text", [None, b"hello", 5])
async def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(SpeechError, match=f"wants a text as str, got {type(text).__name__}"):
        Utterance(build(SpeechSettings()), text)


@pytest.mark.parametrize("voice", ["", 5])
async def test_what_is_no_voice(voice: Any) -> None:
    with pytest.raises(SpeechError, match="wants a voice as str that is not empty"):
        Utterance(build(SpeechSettings()), "hello", voice)

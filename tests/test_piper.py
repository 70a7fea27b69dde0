"""Piper in a real process of its own, with a voice that beeps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from streamsink.config import SpeechSettings
from streamsink.speech.synthesis import build
from tests.speaking import closing, loudness, refused, spoken

# Piper says a tone of 441 Hz with it, 32 ms a phoneme: a model of one sine in ONNX, and a map of the phonemes.
BEEP = Path(__file__).parent / "data/voice/beep.onnx"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("piper") is None, reason="piper-tts (extra piper) is not installed"
)


async def test_piper_speaks_with_the_users_voice() -> None:
    async with closing(build(SpeechSettings(synthesizer="piper", voice=str(BEEP)))) as engine:
        await engine.open()
        samples, utterance = await spoken(engine, "Hello there. How are you?")
        assert utterance.sample_rate == 16000
        assert [heard for _, heard in utterance.heard] == ["Hello there.", " How are you?"]
        assert utterance.heard[-1][0] == len(samples) > 16000
        spectrum = np.abs(np.fft.rfft(samples[:8000]))
        assert abs(int(spectrum.argmax()) * 2 - 441) <= 2
        # Piper brings all voices to full scale.
        assert abs(loudness(samples) + 3) < 0.5


async def test_a_voice_piper_does_not_have(tmp_path: Path) -> None:
    async with closing(build(SpeechSettings(synthesizer="piper"))) as engine:
        assert (await refused(engine)).startswith("piper needs a voice: the path of an .onnx model, as `voice` in")
        missing = str(tmp_path / "none.onnx")
        assert (await refused(engine, voice=missing)).startswith(f"piper has no voice '{missing}': there is no file")
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no model")
        assert "broken.onnx.json" in await refused(engine, voice=str(broken))
        broken.with_name("broken.onnx.json").write_text("{}")
        assert (await refused(engine, voice=str(broken))).startswith(
            f"piper cannot load the voice '{broken}': KeyError"
        )
        # And goes on with one that works.
        assert len((await spoken(engine, "hello", str(BEEP)))[0]) > 1000

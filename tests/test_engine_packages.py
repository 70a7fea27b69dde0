"""The packages of the local engines themselves, with models that tests can make; skipped where they are missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, Transcript
from streamsink.speech.transcription import EngineOptions, Event, Voice, find_engine
from tests import random_whisper
from tests.vendors import say, silence

TONES = Path(__file__).parent / "tones_nemo"


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]))


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


async def transcribed(name: str, model: Path, samples: Samples, language: str | None = None) -> list[Event]:
    engine = find_engine(name, EngineOptions(model=str(model), workers=1, language=language))
    try:
        await engine.start()
        opened = engine.open(Voice("linear16", 16000, 16000))
        for start in range(0, len(samples), 320):
            opened.push(samples[start : start + 320].tobytes())
        opened.finish()
        return [event async for event in opened]
    finally:
        await engine.close()


@needs("sherpa_onnx")
async def test_sherpa_onnx_hears_words_and_when_they_were_said() -> None:
    spoken = np.concatenate((silence(0.3, 16000), say("one", "two", "six", "seven", rate=16000)))
    events = await transcribed("sherpa-onnx", TONES, spoken)
    last = events[-1]
    assert isinstance(last, Transcript)
    assert last.final
    assert last.text == "one two six seven"
    assert [word.word for word in last.words] == ["one", "two", "six", "seven"]
    assert [word.start for word in last.words] == pytest.approx([0.3, 0.6, 0.9, 1.2], abs=0.05)


@needs("sherpa_onnx")
async def test_sherpa_onnx_ends_over_a_broken_model_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("a 0\n")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(SpeechError, match=r"^sherpa-onnx (does not start|cannot load)"):
        await transcribed("sherpa-onnx", tmp_path, silence(0.1, 16000))


@needs("vosk")
async def test_vosk_says_that_a_model_is_broken(tmp_path: Path) -> None:
    (tmp_path / "am").mkdir()
    (tmp_path / "am" / "final.mdl").write_bytes(b"no model")
    with pytest.raises(SpeechError, match=r"^vosk (does not start|cannot load)"):
        await transcribed("vosk", tmp_path, silence(0.1, 16000))


@needs("faster_whisper")
async def test_faster_whisper_says_something_offline(tmp_path: Path) -> None:
    random_whisper.make(tmp_path)
    spoken = np.concatenate((silence(0.3, 16000), say("one", "two", rate=16000)))
    events = await transcribed("faster-whisper", tmp_path, spoken, language="en-US")
    assert not [event for event in events if isinstance(event, EngineError)]
    (last,) = events
    assert isinstance(last, Transcript)
    assert (last.final, last.language) == (True, "en")
    assert last.text
    assert last.confidence is not None
    assert 0 < last.confidence < 0.1
    assert all(0 <= word.start <= word.end for word in last.words)


@needs("faster_whisper")
async def test_faster_whisper_says_that_a_model_is_broken(tmp_path: Path) -> None:
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SpeechError, match=r"^faster-whisper cannot load what it was given"):
        await transcribed("faster-whisper", tmp_path, silence(0.1, 16000))

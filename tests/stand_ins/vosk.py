"""Stands in for Vosk where no model can be had: its API, with the ear of `tests.vendors` behind it."""

from __future__ import annotations

import json
import os

from tests.vendors import Ear, Heard


class Model:
    def __init__(self, model_path: str | None = None, model_name: str | None = None, lang: str | None = None) -> None:
        assert model_path is not None, "anything else is downloaded"
        if "broken" in model_path:
            raise Exception("Failed to create a model")


class KaldiRecognizer:
    def __init__(self, *args: object) -> None:
        model, rate, *grammar = args
        assert isinstance(model, Model)
        assert rate == 16000
        self._phrases: list[str] | None = json.loads(str(grammar[0])) if grammar else None
        self._ear = Ear("linear16", 16000)
        self._since = 0.0
        self._words = False

    def SetWords(self, enable_words: bool) -> None:
        self._words = enable_words

    def AcceptWaveform(self, data: bytes) -> int:
        if data[:8] == b"\x01\x00" * 4:
            os._exit(6)
        self._ear.take(data)
        words = self._ear.words(self._since)
        return int(bool(words) and not self._ear.speaks() and self._ear.seconds - words[-1].end >= 0.5)

    def Result(self) -> str:
        return self.FinalResult()

    def PartialResult(self) -> str:
        return json.dumps({"partial": self._text(self._ear.words(self._since))})

    def FinalResult(self) -> str:
        words = self._ear.words(self._since)
        self._since = self._ear.seconds
        if not words:
            return json.dumps({"text": ""})
        result = [{"word": self._text([word]), "start": word.start, "end": word.end, "conf": 0.5} for word in words]
        return json.dumps({"result": result, "text": self._text(words)} if self._words else {"text": self._text(words)})

    def _text(self, words: list[Heard]) -> str:
        known = self._phrases
        return " ".join(word.word if known is None or word.word in known else "[unk]" for word in words)


def SetLogLevel(level: int) -> None:
    assert level == -1

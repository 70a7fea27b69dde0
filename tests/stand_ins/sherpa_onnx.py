"""Stands in for sherpa-onnx where no model can be had: its API, with the ear of `tests.vendors` behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.vendors import Ear


class OnlineRecognizerResult:
    def __init__(self, text: str, tokens: list[str], timestamps: list[float], ys_probs: list[float]) -> None:
        self.text = text
        self.tokens = tokens
        self.timestamps = timestamps
        self.ys_probs = ys_probs


class OnlineStream:
    def __init__(self) -> None:
        self.ear = Ear("linear16", 16000)
        self.finished = False
        # Behind what was accepted, as feature extraction is.
        self.decoded = 0.0

    def accept_waveform(self, sample_rate: float, waveform: Sequence[float]) -> None:
        samples = np.asarray(waveform)
        assert sample_rate == 16000
        assert samples.dtype == np.float32
        assert np.abs(samples).max(initial=0) <= 1
        assert not self.finished
        self.ear.take((samples * 32767).astype("<i2").tobytes())

    def input_finished(self) -> None:
        self.finished = True


class OnlineRecognizer:
    @classmethod
    def from_transducer(
        cls, tokens: str, encoder: str, decoder: str, joiner: str, num_threads: int = 2, sample_rate: float = 16000
    ) -> OnlineRecognizer:
        return cls._made([tokens, encoder, decoder, joiner], num_threads, probabilities=True)

    @classmethod
    def from_paraformer(
        cls, tokens: str, encoder: str, decoder: str, num_threads: int = 2, sample_rate: float = 16000
    ) -> OnlineRecognizer:
        return cls._made([tokens, encoder, decoder], num_threads)

    @classmethod
    def from_zipformer2_ctc(
        cls, tokens: str, model: str, num_threads: int = 2, sample_rate: float = 16000
    ) -> OnlineRecognizer:
        return cls._made([tokens, model], num_threads)

    @classmethod
    def from_nemo_ctc(
        cls, tokens: str, model: str, num_threads: int = 2, sample_rate: float = 16000
    ) -> OnlineRecognizer:
        return cls._made([tokens, model], num_threads)

    @classmethod
    def _made(cls, files: list[str], num_threads: int, *, probabilities: bool = False) -> OnlineRecognizer:
        assert num_threads == 1
        for file in files:
            if Path(file).read_text() == "broken":
                # As the real one does.
                print("the model's words on standard output")  # noqa: T201
                os._exit(255)
        self = cls.__new__(cls)
        self._probabilities = probabilities
        return self

    _probabilities: bool

    def create_stream(self, hotwords: str | None = None) -> OnlineStream:
        return OnlineStream()

    def is_ready(self, s: OnlineStream) -> bool:
        return s.ear.seconds - s.decoded >= 0.32

    def decode_stream(self, s: OnlineStream) -> None:
        s.decoded += 0.32

    def get_result(self, s: OnlineStream) -> str:
        return self.get_result_all(s).text.strip()

    def get_result_all(self, s: OnlineStream) -> OnlineRecognizerResult:
        words = [word for word in s.ear.words(0.0) if word.end <= s.decoded]
        # Two tokens a word.
        tokens = [part for word in words for part in (f" {word.word[:2]}", word.word[2:])]
        starts = [at for word in words for at in (word.start, word.start + 0.1)]
        text = "".join(tokens)
        return OnlineRecognizerResult(text, tokens, starts, [-0.25] * len(tokens) if self._probabilities else [])

"""Stands in for faster-whisper where no model can be had: its API, with the ear of `tests.vendors` behind it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.vendors import Ear


class Word(NamedTuple):
    start: float
    end: float
    word: str
    probability: float


class Segment(NamedTuple):
    start: float
    end: float
    text: str
    avg_logprob: float
    words: list[Word] | None


class TranscriptionInfo(NamedTuple):
    language: str


class WhisperModel:
    def __init__(
        self,
        model_size_or_path: str,
        device: str = "auto",
        compute_type: str = "default",
        cpu_threads: int = 0,
        local_files_only: bool = False,
    ) -> None:
        assert os.path.isdir(model_size_or_path), "anything else is downloaded"
        assert local_files_only
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        if "broken" in model_size_or_path:
            raise RuntimeError("File model.bin is incomplete")

    def transcribe(
        self,
        audio: NDArray[Any],
        language: str | None = None,
        condition_on_previous_text: bool = True,
        word_timestamps: bool = False,
        hotwords: str | None = None,
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        assert audio.dtype == np.float32
        assert (condition_on_previous_text, word_timestamps) == (False, True)
        ear = Ear("linear16", 16000)
        ear.take((audio * 32767).astype("<i2").tobytes())

        def segments() -> Iterator[Segment]:
            for heard in ear.words(0.0):
                word = Word(np.float64(heard.start), np.float64(heard.end), f" {hotwords or heard.word}", 0.9)
                # As the real one: times are sometimes numpy's.
                yield Segment(np.float64(heard.start), np.float64(heard.end), word.word, math.log(0.5), [word])

        return segments(), TranscriptionInfo(language or "en")

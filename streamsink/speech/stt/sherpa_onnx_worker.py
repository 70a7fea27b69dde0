"""The process in which sherpa-onnx works: it lets go of the GIL, but ends its process when a model is not as it thinks.

Run as ``python -m streamsink.speech.stt.sherpa_onnx_worker OPTIONS``, a JSON object.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import msgspec
import numpy as np
import sherpa_onnx

from streamsink.speech.stt.sherpa_onnx import words_of
from streamsink.speech.stt.worker import Message, Worker

RATE = 16_000
TAIL = 0.66
"""Seconds of silence behind an utterance: models look ahead by up to that much, and hear the last word only so."""


class Options(msgspec.Struct):
    """Which factory of ``OnlineRecognizer`` makes the model, of which files."""

    kind: str
    files: dict[str, str]


class Streams(Worker):
    """One recognizer, and for each utterance a stream of its own."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._streams: dict[int, Any] = {}

    def load(self, number: int, message: Message) -> Message:
        """Load the model."""
        make = getattr(sherpa_onnx.OnlineRecognizer, f"from_{self._options.kind}")
        # A worker a core: more threads would be in each other's way.
        self._recognizer = make(**self._options.files, num_threads=1, sample_rate=RATE)
        return {}

    def begin(self, number: int, message: Message) -> Message:
        """Begin with a new stream."""
        self._streams[number] = self._recognizer.create_stream()
        return {}

    def audio(self, number: int, message: Message) -> Message:
        """Take audio and decode as much as can be."""
        stream = self._streams[number]
        stream.accept_waveform(RATE, np.frombuffer(message["audio"], "<i2").astype(np.float32) / 32768)
        self._decode(stream)
        return {"text": self._recognizer.get_result(stream) if message["interim"] else None}

    def end(self, number: int, message: Message) -> Message:
        """Decode the rest."""
        stream = self._streams.pop(number)
        stream.accept_waveform(RATE, np.zeros(int(TAIL * RATE), np.float32))
        stream.input_finished()
        self._decode(stream)
        result = self._recognizer.get_result_all(stream)
        # Logarithms, which only transducers tell.
        likely = [math.exp(each) for each in result.ys_probs]
        return {
            "text": result.text.strip(),
            "words": words_of(result.tokens, result.timestamps),
            "confidence": round(min(1.0, sum(likely) / len(likely)), 3) if likely else None,
        }

    def _decode(self, stream: Any) -> None:
        while self._recognizer.is_ready(stream):
            self._recognizer.decode_stream(stream)


def main() -> None:
    """Work until there is nothing more to do."""
    Streams(msgspec.json.decode(sys.argv[1], type=Options)).work()


if __name__ == "__main__":
    main()

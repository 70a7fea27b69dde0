"""The process in which faster-whisper works: it holds the GIL for 40 ms at a time, and wants a core for long.

Run as ``python -m streamsink.speech.stt.faster_whisper_worker OPTIONS``, a JSON object.
"""

from __future__ import annotations

import math
import os
import sys

# Before the package is imported, which reads it: nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"

import faster_whisper
import msgspec
import numpy as np

from streamsink.speech.stt.worker import Message, Worker


class Options(msgspec.Struct):
    """The model's folder, the language where it is known (ISO 639-1), and words to expect."""

    model: str
    language: str | None = None
    hotwords: str | None = None


class Utterances(Worker):
    """One model, and the audio of each utterance."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._heard: dict[int, bytearray] = {}

    def load(self, number: int, message: Message) -> Message:
        """Load the model."""
        # A worker a core: more threads would be in each other's way.
        self._model = faster_whisper.WhisperModel(
            self._options.model, device="auto", compute_type="auto", cpu_threads=1, local_files_only=True
        )
        return {}

    def begin(self, number: int, message: Message) -> Message:
        """Begin to keep audio."""
        self._heard[number] = bytearray()
        return {}

    def audio(self, number: int, message: Message) -> Message:
        """Keep audio."""
        self._heard[number] += message["audio"]
        return {"text": None}

    def end(self, number: int, message: Message) -> Message:
        """Transcribe what was kept."""
        samples = np.frombuffer(bytes(self._heard.pop(number)), "<i2").astype(np.float32) / 32768
        found, info = self._model.transcribe(
            samples,
            language=self._options.language,
            hotwords=self._options.hotwords,
            word_timestamps=True,
            # An utterance stands for itself: text before it makes Whisper go round in circles.
            condition_on_previous_text=False,
        )
        # Nothing is done before this.
        segments = list(found)
        # Some of its numbers are numpy's, which no message can hold.
        seconds = float(sum(segment.end - segment.start for segment in segments))
        likely = float(sum(math.exp(segment.avg_logprob) * (segment.end - segment.start) for segment in segments))
        return {
            "text": " ".join(segment.text.strip() for segment in segments),
            "words": [(w.word.strip(), float(w.start), float(w.end)) for part in segments for w in part.words or ()],
            "confidence": round(min(1.0, likely / seconds), 3) if seconds > 0 else None,
            "language": info.language,
        }


def main() -> None:
    """Work until there is nothing more to do."""
    Utterances(msgspec.json.decode(sys.argv[1], type=Options)).work()


if __name__ == "__main__":
    main()

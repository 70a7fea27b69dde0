"""faster-whisper (extra ``faster-whisper``): Whisper on CTranslate2, https://github.com/SYSTRAN/faster-whisper.

It transcribes an utterance when it is over, so it tells nothing while somebody speaks, and takes as long again as its
model is large. It works on a graphics card where CTranslate2 finds one.
"""

from __future__ import annotations

from typing import Any

from streamsink.errors import SpeechError
from streamsink.speech.stt.pool import PooledEngine, model_folder
from streamsink.speech.transcription import Capabilities, EngineOptions

MODELS = "https://huggingface.co/Systran"
# Without the tokenizer, the package would download one.
_FILES = ("model.bin", "config.json", "tokenizer.json")


class FasterWhisper(PooledEngine):
    """Whisper in worker processes, an utterance at a time."""

    name = "faster-whisper"
    package = ("faster_whisper", "faster-whisper")
    worker = "streamsink.speech.stt.faster_whisper_worker"
    # They only wait for their utterance's end.
    decoders = 16
    # Half a minute of speech on a large model and a slow core; meanwhile the worker's other utterances wait.
    stuck = 120.0
    most_waiting = 60.0
    capabilities = Capabilities(rates=(16_000,), words=True)

    def settings(self, options: EngineOptions) -> dict[str, Any]:
        """Check that the folder holds a converted model."""
        if options.grammar is not None:
            raise SpeechError("faster-whisper takes no grammar: give keywords")
        folder = model_folder(self.name, options, MODELS)
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise SpeechError(f"{folder} is no model of faster-whisper: it has no {', '.join(missing)}")
        language = None if options.language is None else options.language.partition("-")[0].lower()
        return {"model": str(folder), "language": language, "hotwords": " ".join(options.keywords) or None}

"""Vosk (extra ``vosk``): small Kaldi models of one's own choice, https://alphacephei.com/vosk/."""

from __future__ import annotations

from typing import Any

from streamsink.errors import SpeechError
from streamsink.speech.stt.pool import PooledEngine, model_folder
from streamsink.speech.transcription import Capabilities, EngineOptions

MODELS = "https://alphacephei.com/vosk/models"


class Vosk(PooledEngine):
    """Kaldi models in worker processes; words come while they are spoken."""

    name = "vosk"
    package = ("vosk", "vosk")
    worker = "streamsink.speech.stt.vosk_worker"
    decoders = 8
    capabilities = Capabilities(rates=(16_000,), interim=True, words=True)

    def settings(self, options: EngineOptions) -> dict[str, Any]:
        """Check that the folder holds a model."""
        if options.grammar is not None:
            raise SpeechError("vosk takes no JSGF grammar: give its phrases as keywords")
        folder = model_folder(self.name, options, MODELS)
        # The newer layout and the older one.
        if not ((folder / "am" / "final.mdl").is_file() or (folder / "final.mdl").is_file()):
            raise SpeechError(f"{folder} is no model of Vosk: it has neither am/final.mdl nor final.mdl")
        return {"model": str(folder), "keywords": list(options.keywords)}

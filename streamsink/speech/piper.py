"""Piper: neural voices the user has downloaded. Under the GPL, hence in a process of its own: see `piper_process`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from streamsink.errors import SpeechError
from streamsink.speech.process import ProcessSynthesizer

if TYPE_CHECKING:
    from streamsink.config import SpeechSettings

_DOWNLOAD = "python -m piper.download_voices en_US-lessac-medium downloads one"


class Piper(ProcessSynthesizer):
    """Piper; a voice is the path of an ``.onnx`` model that has its ``.onnx.json`` beside it."""

    def __init__(self, settings: SpeechSettings) -> None:
        super().__init__("piper", "streamsink.speech.piper_process", settings.voice or "")
        # Those that were found.
        self._found: set[str] = set()

    def check(self, voice: str | None) -> None:
        """See that the extra and the voice's files are there.

        Raises:
            SpeechError: One is not.
        """
        path = voice or self._voice
        if path in self._found:
            return
        if importlib.util.find_spec("piper") is None:
            raise SpeechError("piper is not installed: pip install 'streamsink[piper]'")
        if not path:
            raise SpeechError(f"piper needs a voice: the path of an .onnx model, as `voice` in [speech]; {_DOWNLOAD}")
        model = Path(os.path.expanduser(path))
        for file in (model, Path(f"{model}.json")):
            if not file.is_file():
                raise SpeechError(f"piper has no voice {path!r}: there is no file {str(file)!r}; {_DOWNLOAD}")
        self._found.add(path)

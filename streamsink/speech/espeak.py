"""The synthesizer that comes along: eSpeak NG, which needs no model and starts to speak within milliseconds.

It is under the GPL and there is one of it in a process, so it lives in one of its own: see `espeak_process`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from streamsink.errors import SpeechError
from streamsink.speech.process import ProcessSynthesizer

if TYPE_CHECKING:
    from streamsink.config import SpeechSettings

DEFAULT_VOICE = "en-us"


class Espeak(ProcessSynthesizer):
    """eSpeak NG; a voice is a language, such as ``en-gb`` or ``de``, and maybe a variant, as in ``de+f2``."""

    def __init__(self, settings: SpeechSettings) -> None:
        super().__init__("espeak", "streamsink.speech.espeak_process", settings.voice or DEFAULT_VOICE)

    def check(self, voice: str | None) -> None:
        """See that the extra is there; which voices there are, only the child knows.

        Raises:
            SpeechError: It is not.
        """
        # Looked for, not imported: only the child may.
        if self._child is None and importlib.util.find_spec("espeakng_loader") is None:
            raise SpeechError("espeak is not installed: pip install 'streamsink[speech]'")

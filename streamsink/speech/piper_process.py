"""The child process of `piper`: the only place that loads Piper, which is under the GPL."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from piper import PiperVoice

from streamsink.child import answer

VOICES = 4
"""Models kept in memory, some 60 to 100 MB each; the one that was not used for longest makes room."""


@functools.lru_cache(maxsize=VOICES)
def _voice(path: str) -> PiperVoice:
    return PiperVoice.load(os.path.expanduser(path))


def reply(message: Any) -> Iterator[object]:
    """Answer one message as `process` describes; a piece a sentence, as Piper cuts them."""
    text, path = message
    try:
        voice = _voice(path)
    except Exception as error:
        yield f"piper cannot load the voice {path!r}: {type(error).__name__}: {error}"
        return
    try:
        for chunk in voice.synthesize(text) if text else ():
            yield [chunk.audio_int16_bytes, chunk.sample_rate, 0]
    except Exception as error:
        # Its words may be those of the text.
        yield f"piper failed to speak a text with the voice {path!r}: {type(error).__name__}"
        return
    if text:
        yield [b"", voice.config.sample_rate, len(text)]
    yield None


if __name__ == "__main__":
    # It logs what it says.
    logging.disable()
    answer(reply)

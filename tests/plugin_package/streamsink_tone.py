"""A processor in a package of its own: once installed, ``streamsink serve -p tone`` finds it."""

import numpy as np

from streamsink import Processor, Stream


class Tone(Processor):
    """Confirms every key pressed with a short tone."""

    def __init__(self, hertz: float = 880.0, seconds: float = 0.2) -> None:
        t = np.arange(int(seconds * 8000)) / 8000
        self.tone = (8000 * np.sin(2 * np.pi * hertz * t)).astype(np.int16)

    async def on_start(self, stream: Stream) -> None:
        """Keep the stream to talk back on."""
        self.stream = stream

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        """Confirm the key."""
        self.stream.play(self.tone, 8000)

"""Speak, pause and hear yourself, with `streamsink serve -p examples/answer.py:Answer`."""

import numpy as np

from streamsink import Frame, Processor, Stream


class Answer(Processor):
    """Says again what it heard as soon as the caller pauses."""

    sample_rate = 16_000

    def __init__(self, pause: float = 0.5, loud: int = 500) -> None:
        self.pause, self.loud = pause, loud
        self.said: list[np.ndarray] = []
        self.quiet = 0.0

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream

    def on_frame(self, frame: Frame) -> None:
        speaking = frame.samples.max() > self.loud
        self.quiet = 0.0 if speaking else self.quiet + frame.duration_ms / 1000
        if speaking or self.said:
            self.said.append(frame.samples)
        if self.said and self.quiet >= self.pause:
            self.stream.play(np.concatenate(self.said), frame.sample_rate)
            self.said = []

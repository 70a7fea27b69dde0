import numpy as np

from streamsink import Processor


class Answer(Processor):
    """Says again what it heard as soon as the caller pauses."""

    def __init__(self, pause: float = 0.5):
        self.pause, self.said, self.quiet = pause * 1000, [], 0

    async def on_start(self, stream):
        self.stream = stream

    def on_frame(self, frame):
        self.quiet = 0 if frame.samples.max() > 500 else self.quiet + frame.duration_ms
        if self.said or not self.quiet:
            self.said.append(frame.samples)
        if self.said and self.quiet >= self.pause:
            self.stream.play(np.concatenate(self.said), frame.sample_rate)
            self.said = []

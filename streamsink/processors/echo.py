"""Echo: what comes in goes straight back. The tool for hearing and measuring the way there and back."""

from __future__ import annotations

from streamsink.audio import Frame, Track
from streamsink.processor import Processor
from streamsink.stream import Stream


class Echo(Processor):
    """Sends each inbound frame straight back."""

    _stream: Stream

    async def on_start(self, stream: Stream) -> None:
        """Keep the stream to talk back on."""
        self._stream = stream

    def on_frame(self, frame: Frame) -> None:
        """Send the frame back; what the far end hears of ours is no echo's business."""
        if frame.track is Track.INBOUND:
            self._stream.play(frame.samples, frame.sample_rate)

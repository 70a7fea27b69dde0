"""The same as a loop, with `streamsink serve -p examples/answer_function.py:answer`."""

from collections.abc import AsyncIterator

import numpy as np

from streamsink import Frame, Stream, processor


@processor(sample_rate=16_000)
async def answer(stream: Stream, frames: AsyncIterator[Frame], *, pause: float = 0.5, loud: int = 500) -> None:
    """Says again what it heard as soon as the caller pauses."""
    said: list[np.ndarray] = []
    quiet = 0.0
    async for frame in frames:
        speaking = frame.samples.max() > loud
        quiet = 0.0 if speaking else quiet + frame.duration_ms / 1000
        if speaking or said:
            said.append(frame.samples)
        if said and quiet >= pause:
            stream.play(np.concatenate(said), frame.sample_rate)
            said = []

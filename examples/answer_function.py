import numpy as np

import streamsink


@streamsink.processor(sample_rate=16_000)
async def answer(stream, frames, *, pause: float = 0.5):
    """Says again what it heard as soon as the caller pauses."""
    said, quiet = [], 0
    async for frame in frames:
        quiet = 0 if frame.samples.max() > 500 else quiet + frame.duration_ms
        if said or not quiet:
            said.append(frame.samples)
        if said and quiet >= pause * 1000:
            await stream.play(np.concatenate(said), frame.sample_rate)
            said = []

from __future__ import annotations

from pathlib import Path

import numpy as np

from streamsink.audio import Track
from streamsink.processors.echo import Echo
from streamsink.wire import decode_endpoint
from tests.streams import Line, counting, frame, make_stream


async def test_what_comes_in_goes_back_and_nothing_else(tmp_path: Path) -> None:
    line = Line()
    stream = make_stream(tmp_path, codec="L16@16000h", line=line)
    echo = Echo()
    await echo.on_start(stream)
    echo.on_frame(frame(counting(0, 320), sample_rate=16000))
    echo.on_frame(frame(counting(5000, 320), track=Track.OUTBOUND, sample_rate=16000))
    echo.on_frame(frame(counting(320, 320), 320, sample_rate=16000))
    sent = [decode_endpoint(text) for text in line.sent]
    assert [message.event for message in sent] == ["media", "media"]
    payload = b"".join(message.media.payload for message in sent if message.media is not None)
    assert np.frombuffer(payload, "<i2").tolist() == counting(0, 640).tolist()

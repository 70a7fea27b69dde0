"""Raw captures: what a platform really sent, as JSON lines that ``simulate --replay`` plays back.

The first line holds the upgrade request's head, its token masked; each further line one message and the seconds since
the upgrade. Captures hold the call's audio and parameters, so files are made 0600.
"""

from __future__ import annotations

import base64
import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

import msgspec
import structlog

if TYPE_CHECKING:
    from websockets.http11 import Request

log = structlog.get_logger(__name__)

FLUSH_INTERVAL = 1.0
"""Seconds; what a killed process may lose."""

_encoder = msgspec.json.Encoder()


class Capture:
    """One connection's capture. A disk that fails ends the capture, never the stream.

    Args:
        path: The file.
        file: It, open for writing.
        opened_at: When the upgrade was, in seconds on the connection's clock.
    """

    def __init__(self, path: Path, file: BinaryIO, opened_at: float) -> None:
        self.path = path
        self._file: BinaryIO | None = file
        self._opened_at = opened_at
        self._flushed_at = opened_at

    @classmethod
    def open(cls, folder: Path, request: Request, now: float) -> Self | None:
        """Begin a capture with the upgrade's head; None when the folder cannot be written."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = folder / f"{stamp}_{uuid.uuid4().hex[:12]}.jsonl"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            log.error("capture not made", file=str(path), cause=error.strerror)
            return None
        capture = cls(path, os.fdopen(descriptor, "wb"), now)
        headers = [
            [name, "Bearer ***" if name.lower() == "authorization" else value]
            for name, value in request.headers.raw_items()
        ]
        capture._line({"t": 0.0, "head": {"path": request.path, "headers": headers}})
        return capture

    def write(self, text: bytes, now: float) -> None:
        """Keep one message that arrived at ``now``."""
        line: dict[str, object] = {"t": round(now - self._opened_at, 6)}
        try:
            line["text"] = text.decode()
        except UnicodeDecodeError:
            line["base64"] = base64.b64encode(text).decode("ascii")
        self._line(line)
        if self._file is not None and now - self._flushed_at >= FLUSH_INTERVAL:
            self._flushed_at = now
            try:
                self._file.flush()
            except OSError as error:
                self._end(error)

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._end(error)
            self._file = None

    def _line(self, line: dict[str, object]) -> None:
        if self._file is not None:
            try:
                self._file.write(_encoder.encode(line) + b"\n")
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        log.error("capture ended: the disk refused it", file=str(self.path), cause=error.strerror)
        file, self._file = self._file, None
        # Closing tries once more to write what is buffered, and gives the descriptor back either way.
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()

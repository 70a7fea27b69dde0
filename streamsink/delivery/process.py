"""The process in which recordings are uploaded and webhooks sent: stores' libraries compute for seconds with the GIL.

Each message names what is to be done and has its arguments. The answer is ``[True, what it returned]``, or
``[False, kind, words]`` of the error it raised.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from streamsink.child import answer_all, be_nice
from streamsink.delivery import webhook
from streamsink.delivery.upload import Local, measure, parse_target, upload

THREADS = 16
"""More than ever ask at once."""


def _measure(path: str) -> tuple[int, str] | None:
    """A file's size and SHA-256; None where there is none."""
    try:
        found = measure(Path(path))
    except FileNotFoundError:
        return None
    return found.size, found.sha256


def _upload(target: str, stem: str, files: list[tuple[str, int, str]]) -> list[str]:
    """Where each of the files is now."""
    local = [Local(Path(path), size, sha256) for path, size, sha256 in files]
    urls = upload(local, stem, parse_target(target))
    return [urls[file.path] for file in local]


def _post(url: str, body: str, secret: str, job: str, now: float) -> None:
    webhook.send(url, body.encode(), secret=secret, job=job, now=now)


_WORK = {"measure": _measure, "upload": _upload, "post": _post}


def reply(message: Any) -> object:
    """Do what a message asks for."""
    work, *arguments = message
    try:
        return [True, _WORK[work](*arguments)]  # type: ignore[operator]
    except Exception as error:
        return [False, type(error).__name__, str(error)]


if __name__ == "__main__":
    # What went wrong is told by who asked; at debug these libraries show credentials.
    logging.disable()
    be_nice(19, idle=True)
    answer_all(reply, THREADS)

"""The queue on the disk: a small file a job, 0600, each made and changed in one step, so that a crash leaves it whole.

    <id>.expected.json    a recording that is not finished yet
    <id>.upload.json      one to upload, or to tell of
    <id>.post.json        a webhook to send

A process that wants to work holds ``lock``: of many with one folder, one works, the others only add, and when it dies
the next one takes over. How often a job was tried is not kept: after a restart everything is tried at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from streamsink.disk import give_way

log = structlog.get_logger(__name__)

FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
"""Seconds between two tries: doubled each time, less a random half, so that jobs do not come back all at once."""

Kind = Literal["expected", "upload", "post"]

_STALE = 3600.0
"""Seconds after which a file that was not given its name is what a crash left."""


class File(msgspec.Struct):
    """A file of a recording that has been brought where it belongs.

    Attributes:
        name: Its name here.
        size: Bytes.
        sha256: In hex.
        url: Where it was uploaded to; None where it was not to be.
    """

    name: str
    size: int
    sha256: str
    url: str | None = None


class Recording(msgspec.Struct):
    """A recording to deliver.

    Attributes:
        folder: Where its files are; absolute, or below the recordings folder.
        stem: What their names begin with.
        upload: Where they go; None for nowhere.
        keep_local: Whether they also stay.
        on_complete: Whom to tell.
        files: Those that are verified at their place; None until all are.
        told: What the sidecar said by then.
    """

    folder: str
    stem: str
    upload: str | None = None
    keep_local: bool = True
    on_complete: str | None = None
    files: list[File] | None = None
    told: dict[str, Any] | None = None


class Post(msgspec.Struct):
    """A webhook to send: a checked URL, and JSON as text."""

    url: str
    body: str


class Job(msgspec.Struct):
    """What one file of the queue says.

    Attributes:
        created: Seconds since 1970.
        recording: Of an upload and of what is expected.
        post: Of a webhook.
    """

    created: float
    recording: Recording | None = None
    post: Post | None = None


class Taken(NamedTuple):
    """A job somebody works on; it is to come back by ``done``, ``failed`` or ``become``."""

    id: str
    kind: Kind
    job: Job
    tries: int


class _Entry:
    """What is known of a job that waits."""

    def __init__(self, kind: Kind, due: float) -> None:
        self.kind = kind
        self.due = due
        self.tries = 0
        self.taken = False


class Queue:
    """The jobs of a folder; any thread may use it.

    Args:
        folder: Made, 0700, when the first job comes.
        first_wait: Seconds before the second try.
        longest_wait: Seconds between two tries at most.
        random: Uniform in [0, 1).
    """

    def __init__(
        self,
        folder: Path,
        first_wait: float = FIRST_WAIT,
        longest_wait: float = LONGEST_WAIT,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._folder = folder
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._random = random
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._due: dict[Kind, list[tuple[float, str]]] = {"expected": [], "upload": [], "post": []}
        # Of ours that are expected: whoever records says when they are there.
        self._ours: set[str] = set()
        self._held: int | None = None
        self._closed = False
        self._seen = -1

    def __len__(self) -> int:
        """Jobs that are known here and not over, those being worked on too."""
        return len(self._entries)

    @property
    def exists(self) -> bool:
        """Whether there ever was a job."""
        return self._folder.is_dir()

    # --- Adding ------------------------------------------------------------------------------------------------------

    def expect(self, recording: Recording) -> str:
        """Note a recording before its first sample is written: should the process die, it is still delivered.

        Returns:
            What to call :meth:`arrived` or :meth:`withdraw` with.

        Raises:
            OSError: It cannot be written.
        """
        id = new_id()
        with self._lock:
            self._ours.add(id)
        self._write(id, "expected", Job(time.time(), recording=recording))
        return id

    def arrived(self, id: str, now: float) -> None:
        """Tell that an expected recording has its final names.

        Raises:
            OSError: It cannot be noted; the next start finds out by itself.
        """
        give_way()
        self._path(id, "expected").rename(self._path(id, "upload"))
        self._enter(id, "upload", now)

    def withdraw(self, id: str) -> None:
        """Take back what was expected: it will not come."""
        with self._lock:
            self._ours.discard(id)
        with contextlib.suppress(OSError):
            self._path(id, "expected").unlink(missing_ok=True)

    def post(self, id: str, post: Post, now: float) -> None:
        """Add a webhook.

        Raises:
            OSError: It cannot be written.
        """
        self._write(id, "post", Job(time.time(), post=post))
        self._enter(id, "post", now)

    # --- Working -----------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Find what a former process left and others have added; it costs little when nothing is new.

        Raises:
            OSError: The folder cannot be read.
        """
        if not self.exists or not self._hold():
            return
        seen = self._folder.stat().st_mtime_ns
        if seen == self._seen:
            return
        with os.scandir(self._folder) as entries:
            for entry in entries:
                id, _, ending = entry.name.partition(".")
                if entry.name.startswith(".new-"):
                    # Whoever writes it may have given it its name by now.
                    with contextlib.suppress(FileNotFoundError):
                        if time.time() - entry.stat().st_mtime > _STALE:
                            os.unlink(entry)
                elif ending in ("expected.json", "upload.json", "post.json") and id not in self._ours:
                    self._enter(id, ending.removesuffix(".json"), now)  # type: ignore[arg-type]
                elif ending.endswith("json") and id not in self._ours:
                    self._set_aside(Path(entry.path), "its name is not one of a job")
        # Not one of just now: clocks of file systems tick slowly, and what is added within a tick would be missed.
        self._seen = seen if time.time() - seen / 1e9 > 1 else -1

    def _hold(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            if self._held is None:
                held = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(held)
                    return False
                self._held = held
            return True

    def take(self, kind: Kind, now: float) -> Taken | None:
        """Take the job of a kind that has been due for longest; None where none is due."""
        while True:
            with self._lock:
                waiting = self._due[kind]
                if not waiting or waiting[0][0] > now:
                    return None
                _, id = heapq.heappop(waiting)
                entry = self._entries[id]
                entry.taken = True
            path = self._path(id, kind)
            try:
                job = _READ.decode(path.read_bytes())
                if (job.post if kind == "post" else job.recording) is None:
                    raise msgspec.ValidationError(f"it is no job of the kind {kind}")
            except FileNotFoundError:
                # Withdrawn by the process that had added it, or of the next kind by now: that is found again.
                self._forget(id)
                self._seen = -1
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._set_aside(path, str(error))
                self._forget(id)
            except OSError as error:
                log.warning("a job cannot be read", job=id, error=str(error))
                self.failed(Taken(id, kind, Job(0.0), entry.tries), now)
            else:
                return Taken(id, kind, job, entry.tries)

    def wait(self, kind: Kind, now: float) -> float | None:
        """Tell how many seconds it is until a job of a kind is due; None while there is none."""
        with self._lock:
            waiting = self._due[kind]
            return max(0.0, waiting[0][0] - now) if waiting else None

    def busy(self, now: float) -> bool:
        """Whether something is worked on, or due and not yet tried."""
        with self._lock:
            return any(
                e.taken or (e.due <= now and not e.tries and e.kind != "expected") for e in self._entries.values()
            )

    def save(self, taken: Taken) -> None:
        """Put on the disk what has become of a job so far.

        Raises:
            OSError: It cannot be written.
        """
        self._write(taken.id, taken.kind, taken.job)

    def become(self, taken: Taken, kind: Kind, job: Job, now: float) -> None:
        """Make a job one of another kind, due at once.

        Raises:
            OSError: It cannot be written.
        """
        self._write(taken.id, kind, job)
        # A crash here leaves both: then the former is done again, which finds all done.
        self._path(taken.id, taken.kind).unlink(missing_ok=True)
        with self._lock:
            # In one step: who asks whether anything is left to do must not find nothing.
            self._forget(taken.id)
            self._enter(taken.id, kind, now)

    def done(self, taken: Taken) -> None:
        """Strike a job off.

        Raises:
            OSError: It cannot be; it will be done again.
        """
        give_way()
        self._path(taken.id, taken.kind).unlink(missing_ok=True)
        self._forget(taken.id)

    def failed(self, taken: Taken, now: float, longest: float | None = None) -> float:
        """Put a job back; returns the seconds until it is due again, ``longest`` at most."""
        with self._lock:
            entry = self._entries[taken.id]
            entry.tries += 1
            entry.taken = False
            # The exponent is bounded, too: a job may be tried for years.
            wait = min(longest or self._longest_wait, self._first_wait * 2.0 ** min(entry.tries - 1, 30))
            wait *= 1 - self._random() / 2
            entry.due = now + wait
            heapq.heappush(self._due[entry.kind], (entry.due, taken.id))
        return wait

    def close(self) -> None:
        """Let another process work on the folder, from now on."""
        with self._lock:
            self._closed = True
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def _enter(self, id: str, kind: Kind, now: float) -> None:
        with self._lock:
            self._ours.discard(id)
            if id in self._entries or not self._hold():
                return
            self._entries[id] = _Entry(kind, now)
            heapq.heappush(self._due[kind], (now, id))

    def _forget(self, id: str) -> None:
        with self._lock:
            self._entries.pop(id, None)

    # --- Files -------------------------------------------------------------------------------------------------------

    def _path(self, id: str, kind: Kind) -> Path:
        return self._folder / f"{id}.{kind}.json"

    def _write(self, id: str, kind: Kind, job: Job) -> None:
        try:
            self._folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = self._folder / f".new-{secrets.token_hex(8)}"
        give_way()
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(msgspec.json.encode(job))
                file.flush()
                os.fsync(file.fileno())
            give_way()
            aside.rename(self._path(id, kind))
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        give_way()
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _set_aside(self, path: Path, cause: str) -> None:
        log.error("a job that cannot be read is set aside", file=path.name, cause=cause, kept=f"{path.name}.bad")
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f"{path.name}.bad"))


_READ = msgspec.json.Decoder(Job)


def new_id() -> str:
    """A name no other job has; later ones sort behind earlier ones."""
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}"

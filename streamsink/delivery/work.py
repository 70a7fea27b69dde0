"""The threads that work off the queue: a few for uploads, a few for webhooks, so that neither waits for the other.

They keep the queue, and wait for the process that does the work: see `process`.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsink.child import SharedChild
from streamsink.delivery import webhook
from streamsink.delivery.queue import FIRST_WAIT, LONGEST_WAIT, File, Job, Kind, Post, Queue, Recording, Taken, new_id
from streamsink.disk import give_way
from streamsink.stem import MADE_ENDINGS

log = structlog.get_logger(__name__)

FOLDER = ".delivery"
"""Where the queue lies, in the recordings folder."""
UPLOADS = 4
POSTS = 4
"""How many are under way at once."""
LOOK = 5.0
"""Seconds between two looks for what others have added."""
WEBHOOK_HOURS = 24
"""How long a webhook is tried."""
PART_SECONDS = 600.0
"""How long a recording waits for what else is written about its stream, such as a transcript."""
MOST_JOBS = 100_000
"""Jobs that may wait before further webhooks are refused; recordings never are."""
_PATIENT = 60.0
"""Seconds between two looks at a recording that another process may still be writing."""


class Delivery(Collector):
    """What leaves this machine: recordings and webhooks, each tried until it is there, across restarts too.

    One a recordings folder and process; nothing runs until there is something to do.

    Args:
        recordings: The recordings folder; the queue lies in it.
        secret: Asked, in a thread, for what signs the webhooks.
        first_wait: Seconds before a second try.
        longest_wait: Seconds between two tries at most.
    """

    def __init__(
        self,
        recordings: Path,
        secret: Callable[[], str],
        *,
        first_wait: float = FIRST_WAIT,
        longest_wait: float = LONGEST_WAIT,
    ) -> None:
        self._recordings = recordings.absolute()
        self._secret = secret
        self._queue = Queue(self._recordings / FOLDER, first_wait, longest_wait)
        self._process = SharedChild("streamsink.delivery.process")
        self._clock = time.monotonic
        # Webhooks on their way to the disk.
        self._posts: queue.SimpleQueue[tuple[str, Post] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._counts: Counter[tuple[str, str]] = Counter()

    # --- What others ask for -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Go on with what a former process left."""
        if self._queue.exists:
            self._begin()

    def expect(
        self,
        folder: Path,
        stem: str,
        *,
        upload: str | None = None,
        keep_local: bool = True,
        on_complete: str | None = None,
    ) -> Expected:
        """Note that a recording will be delivered, before its first sample is written. Blocks; any thread.

        It counts as finished when ``<stem>.json`` is there: a process that dies meanwhile leaves it to the next, which
        delivers what it repairs.

        Args:
            folder: Where its files are.
            stem: What their names begin with, before a dot.
            upload: Where they go, see :func:`parse_target`.
            keep_local: Whether they stay here when they are there.
            on_complete: Whom to tell, see :func:`check_url`; after the upload, where there is one.

        Raises:
            OSError: It cannot be noted.
        """
        self._begin()
        folder = folder.absolute()
        # So that the recordings folder may be moved.
        inside = folder.is_relative_to(self._recordings)
        where = str(folder.relative_to(self._recordings) if inside else folder)
        return Expected(self, self._queue.expect(Recording(where, stem, upload, keep_local, on_complete)))

    def post(self, url: str, payload: dict[str, Any]) -> str:
        """Send a webhook; any thread, never blocks. It is on the disk a moment later.

        Webhooks may arrive twice and out of order: say in ``payload`` what belongs where.

        Args:
            url: See :func:`check_url`.
            payload: What becomes JSON; ``id`` is put in front of it.

        Returns:
            The webhook's id, also in its header ``X-Streamsink-Delivery``.

        Raises:
            ConfigError: It cannot go to this URL.
            TypeError: The payload has something that is not JSON.
        """
        webhook.check_url(url)
        id = new_id()
        post = _post(url, id, payload)
        self._begin()
        self._posts.put((id, post))
        return id

    def close(self, patience: float) -> None:
        """End: what was not tried yet gets a try, for so many seconds in all; the next start does the rest. Blocks."""
        with self._lock:
            if not self._threads or self._closing.is_set():
                return
        self._posts.put(None)
        until = self._clock() + patience
        with self._changed:
            while (left := until - self._clock()) > 0 and (not self._posts.empty() or self._queue.busy(self._clock())):
                self._changed.wait(min(left, 0.1))
            self._closing.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock()))
        # Before the queue is anybody else's: nothing is uploaded twice at once.
        self._process.close()
        if len(self._queue):
            log.warning("not delivered yet: the next start goes on with it", jobs=len(self._queue))
        self._queue.close()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        yield GaugeMetricFamily("streamsink_deliveries_pending", "Uploads and webhooks to do.", value=len(self._queue))
        ended = CounterMetricFamily(
            "streamsink_deliveries", "Tries of uploads and webhooks, by how they ended.", labels=["kind", "outcome"]
        )
        for (kind, outcome), count in sorted(self._counts.items()):
            ended.add_metric([kind, outcome], count)
        yield ended

    # --- Threads -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with self._lock:
            if self._threads:
                return
            # Daemonic: what hangs must not keep the process, and everything is on the disk.
            self._threads = [threading.Thread(target=self._keep, name="streamsink-delivery", daemon=True)]
            kinds: list[tuple[Kind, Callable[[Taken], None], int]] = [
                ("expected", self._check_expected, 1),
                ("upload", self._deliver, UPLOADS),
                ("post", self._send, POSTS),
            ]
            for kind, work, count in kinds:
                for number in range(count):
                    self._threads.append(
                        threading.Thread(
                            target=self._work, args=(kind, work), name=f"streamsink-{kind}-{number}", daemon=True
                        )
                    )
            for thread in self._threads:
                thread.start()

    def _keep(self) -> None:
        """Bring webhooks to the disk and look for what others have added."""
        looked = -LOOK
        while not self._closing.is_set():
            if self._clock() - looked >= LOOK:
                looked = self._clock()
                try:
                    self._queue.look(looked)
                except OSError as error:
                    log.error("the delivery queue cannot be read", error=str(error))
                self._tell()
            with contextlib.suppress(queue.Empty):
                given = self._posts.get(timeout=max(0.0, looked + LOOK - self._clock()))
                if given is None:
                    return
                self._keep_post(*given)

    def _keep_post(self, id: str, post: Post) -> None:
        if len(self._queue) >= MOST_JOBS:
            self._count("post", "refused")
            log.error("webhook dropped: too many wait", job=id, host=webhook.host_of(post.url), waiting=MOST_JOBS)
            return
        try:
            self._queue.post(id, post, self._clock())
        except OSError as error:
            self._count("post", "refused")
            log.error("webhook lost: it cannot be kept", job=id, host=webhook.host_of(post.url), error=str(error))
        self._tell()

    def _work(self, kind: Kind, work: Callable[[Taken], None]) -> None:
        while True:
            with self._changed:
                while (taken := self._queue.take(kind, self._clock())) is None:
                    if self._closing.is_set():
                        return
                    self._changed.wait(self._queue.wait(kind, self._clock()))
                if self._closing.is_set():
                    return
            give_way()
            try:
                work(taken)
            except _NotYetError:
                self._queue.failed(taken, self._clock(), _PATIENT)
            except Exception as error:
                if self._closing.is_set():
                    # As it is on the disk, so the next start finds it.
                    return
                wait = self._queue.failed(taken, self._clock())
                self._count(kind, "failed")
                # At the first, second, fourth … try: a store that is away for a day is not told a thousand times.
                tries = taken.tries + 1
                tell = log.warning if tries & (tries - 1) == 0 else log.debug
                tell("not delivered", job=taken.id, kind=kind, tries=tries, again_in=round(wait, 1), error=_told(error))
            self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count(self, kind: str, outcome: str) -> None:
        with self._lock:
            self._counts[kind, outcome] += 1

    def _ask(self, work: str, *arguments: object) -> Any:
        """Have something done in the process.

        Raises:
            _FailedError: It was not; a `webhook.Gone` is one still.
            ChildDied: The process died of it, or of something else.
            OSError: There is no room for a process.
        """
        done, *said = self._process.ask([work, *arguments])
        if done:
            return said[0]
        kind, words = said
        raise webhook.Gone if kind == "Gone" else _FailedError(kind, words)

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def _arrived(self, id: str) -> None:
        try:
            self._queue.arrived(id, self._clock())
        except FileNotFoundError:
            # The process that works on the folder has found it by itself.
            log.debug("a recording was found before it was told of", job=id)
        except OSError as error:
            log.error("a recording will only be delivered after the next start", job=id, error=str(error))
        self._tell()

    def _withdraw(self, id: str) -> None:
        self._queue.withdraw(id)

    def _check_expected(self, taken: Taken) -> None:
        """Find out whether a recording that some process began is finished by now."""
        recording = taken.job.recording
        assert recording is not None
        folder = self._recordings / recording.folder
        # Looked at first: who finishes it gives the sidecar its name last.
        parts = _parts(folder, recording.stem)
        if (folder / f"{recording.stem}.json").exists():
            self._queue.become(taken, "upload", taken.job, self._clock())
        elif parts:
            raise _NotYetError("it is not finished")
        else:
            self._give_up(taken, "there is no such recording any more", stem=recording.stem)

    def _deliver(self, taken: Taken) -> None:
        recording = taken.job.recording
        assert recording is not None
        folder = self._recordings / recording.folder
        if recording.files is None:
            parts = _parts(folder, recording.stem)
            if parts and time.time() - _finished_at(folder, recording.stem) < PART_SECONDS:
                raise _NotYetError(f"{parts[0].name} is not finished")
            give_way()
            paths = _files(folder, recording.stem)
            if not any(path.suffix != ".json" for path in paths):
                self._give_up(taken, "its files are no longer here", stem=recording.stem)
                return
            recording.told = _sidecar(folder, recording.stem)
            recording.files = self._brought(recording, paths)
            self._queue.save(taken)
        if recording.upload is not None and not recording.keep_local:
            self._delete(folder, recording.files)
        if recording.upload is not None:
            self._count("upload", "done")
            log.info("uploaded", job=taken.id, stem=recording.stem, files=[file.url for file in recording.files])
        if recording.on_complete is None:
            self._queue.done(taken)
            return
        post = _post(recording.on_complete, taken.id, _told_of(recording))
        self._queue.become(taken, "post", Job(time.time(), post=post), self._clock())

    def _brought(self, recording: Recording, paths: list[Path]) -> list[File]:
        measured = [(str(path), *self._measure(path)) for path in paths]
        urls: list[str | None] = [None] * len(measured)
        if recording.upload is not None:
            urls = self._ask("upload", recording.upload, recording.stem, measured)
        return [
            File(path.name, size, sha256, url)
            for path, (_, size, sha256), url in zip(paths, measured, urls, strict=True)
        ]

    def _measure(self, path: Path) -> tuple[int, str]:
        """A file's size and SHA-256.

        Raises:
            FileNotFoundError: There is none.
        """
        found = self._ask("measure", str(path))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        size, sha256 = found
        return size, sha256

    def _delete(self, folder: Path, files: list[File]) -> None:
        """Delete what is verified elsewhere, if it is still that."""
        for file in files:
            path = folder / file.name
            with contextlib.suppress(FileNotFoundError):
                if self._measure(path) == (file.size, file.sha256):
                    path.unlink()
                else:
                    log.warning("kept here: it has changed since it was uploaded", file=file.name)

    def _send(self, taken: Taken) -> None:
        post = taken.job.post
        assert post is not None
        now = time.time()
        try:
            self._ask("post", post.url, post.body, self._secret(), taken.id, now)
        except webhook.Gone:
            self._give_up(taken, "the receiver wants no more: HTTP status 410", host=webhook.host_of(post.url))
        except Exception as error:
            if now - taken.job.created < WEBHOOK_HOURS * 3600:
                raise
            cause = f"not taken for {WEBHOOK_HOURS} hours: {_told(error)}"
            self._give_up(taken, cause, host=webhook.host_of(post.url))
        else:
            self._count("post", "done")
            log.info("webhook sent", job=taken.id, host=webhook.host_of(post.url))
            self._queue.done(taken)

    def _give_up(self, taken: Taken, cause: str, **what: str) -> None:
        self._count(taken.kind, "given_up")
        log.error("delivery given up", job=taken.id, kind=taken.kind, cause=cause, **what)
        self._queue.done(taken)


class Expected:
    """A recording that will be delivered; any thread. Made by :meth:`Delivery.expect`."""

    def __init__(self, delivery: Delivery, id: str) -> None:
        self._delivery = delivery
        self._id = id

    def arrived(self) -> None:
        """Say that all its files have their final names."""
        self._delivery._arrived(self._id)

    def withdraw(self) -> None:
        """Say that it will not come."""
        self._delivery._withdraw(self._id)


class _FailedError(Exception):
    """What the process was asked for failed: with what kind of error, and its words."""

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


class _NotYetError(Exception):
    """What is wanted is not there yet, and nothing is wrong."""


# --- The files of a recording ----------------------------------------------------------------------------------------


def _files(folder: Path, stem: str) -> list[Path]:
    """A recording's finished files, the sidecar last: who sees it uploaded sees them all."""
    return [path for ending in (*MADE_ENDINGS, "json") if _is_file(path := folder / f"{stem}.{ending}")]


def _parts(folder: Path, stem: str) -> list[Path]:
    return [path for ending in (*MADE_ENDINGS, "json") if _is_file(path := folder / f"{stem}.{ending}.part")]


def _is_file(path: Path) -> bool:
    try:
        # A link is none: what it leads to was not recorded here.
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _finished_at(folder: Path, stem: str) -> float:
    try:
        return (folder / f"{stem}.json").stat().st_mtime
    except OSError:
        return 0.0


_TOLD = ("stream_sid", "call_sid", "account_sid", "name", "started_at", "duration_seconds", "complete")
"""What of a sidecar a webhook tells; custom parameters are not among it."""


def _sidecar(folder: Path, stem: str) -> dict[str, Any]:
    """What a webhook tells of a sidecar; nulls where it cannot be read."""
    try:
        read = msgspec.json.decode((folder / f"{stem}.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        read = {}
    return {key: read.get(key) for key in _TOLD}


def _told_of(recording: Recording) -> dict[str, Any]:
    files = [
        {key: value for key, value in msgspec.structs.asdict(file).items() if value is not None}
        for file in recording.files or ()
    ]
    return {"event": "recording", "stem": recording.stem, **(recording.told or {}), "files": files}


def _post(url: str, id: str, payload: dict[str, Any]) -> Post:
    return Post(url, msgspec.json.encode({"id": id, **payload}).decode())


def _told(error: Exception) -> str:
    text = (
        str(error) if isinstance(error, _FailedError) else ": ".join(filter(None, (type(error).__name__, str(error))))
    )
    return text.partition("\n")[0][:200]

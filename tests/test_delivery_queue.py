"""The queue: what a crash leaves of it, what is due when, and who works on it. Time is passed in."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamsink.delivery.queue import Job, Post, Queue, Recording, Taken, new_id

NOW = 1000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".delivery"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def age(folder: Path) -> None:
    """Make the folder look as if nothing happened to it lately, as it would later."""
    os.utime(folder, (time.time() - 60,) * 2)


def posted(queue: Queue, text: str = "{}", now: float = NOW) -> str:
    id = new_id()
    queue.post(id, Post("http://localhost/", text), now)
    return id


def take(queue: Queue, now: float = NOW) -> Taken:
    taken = queue.take("post", now)
    assert taken is not None
    return taken


def test_nothing_is_made_before_there_is_a_job(folder: Path) -> None:
    queue = Queue(folder)
    queue.look(NOW)
    assert (queue.exists, len(queue), queue.wait("post", NOW), queue.take("post", NOW)) == (False, 0, None, None)


def test_the_recordings_folder_need_not_be_there_yet(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "recordings" / ".delivery")
    posted(queue)
    assert len(queue) == 1
    queue.close()


def test_a_job_is_private_and_whole_and_gone_when_done(folder: Path) -> None:
    queue = Queue(folder)
    id = posted(queue, '{"a":1}')
    assert names(folder) == [f"{id}.post.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    taken = take(queue)
    assert (taken.id, taken.kind, taken.job.post) == (id, "post", Post("http://localhost/", '{"a":1}'))
    # While one works on it, it is nobody else's.
    assert (queue.take("post", NOW), queue.wait("post", NOW), len(queue)) == (None, None, 1)
    queue.done(taken)
    assert (names(folder), len(queue)) == ([], 0)
    queue.close()


def test_waits_double_from_one_second_to_five_minutes_less_a_random_half(folder: Path) -> None:
    for draw, share in ((0.0, 1.0), (0.5, 0.75)):
        queue = Queue(folder, random=lambda draw=draw: draw)  # type: ignore[misc]
        posted(queue)
        waits = []
        now = NOW
        for tries in range(2000):
            taken = take(queue, now)
            assert taken.tries == tries
            wait = queue.failed(taken, now)
            assert queue.take("post", now + wait - 0.001) is None
            assert queue.wait("post", now) == pytest.approx(wait)
            waits.append(wait / share)
            now += wait
        assert waits[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
        assert set(waits[9:]) == {300}
        queue.done(take(queue, now))
        queue.close()


def test_what_has_been_due_for_longest_comes_first(folder: Path) -> None:
    queue = Queue(folder)
    later, first, last = posted(queue, now=NOW + 1), posted(queue, now=NOW), posted(queue, now=NOW + 2)
    assert [take(queue, NOW + 2).id for _ in range(3)] == [first, later, last]
    queue.close()


def test_a_restart_tries_everything_at_once(folder: Path) -> None:
    before = Queue(folder)
    ids = [posted(before), posted(before)]
    before.failed(take(before), NOW)
    arrived = before.expect(Recording("", "a"))
    before.arrived(arrived, NOW)
    expected = before.expect(Recording("", "b"))
    # As a process that is killed: the lock goes with it.
    before.close()
    after = Queue(folder)
    after.look(NOW)
    assert sorted([take(after).id, take(after).id]) == sorted(ids)
    upload, waiting = after.take("upload", NOW), after.take("expected", NOW)
    assert upload is not None and waiting is not None
    assert (upload.id, waiting.id) == (arrived, expected)
    after.close()


def test_what_is_expected_is_nobodys_until_it_arrives(folder: Path) -> None:
    queue = Queue(folder)
    id = queue.expect(Recording("", "a"))
    queue.look(NOW)
    assert (len(queue), queue.take("expected", NOW), queue.take("upload", NOW)) == (0, None, None)
    queue.arrived(id, NOW)
    assert names(folder) == [f"{id}.upload.json"]
    taken = queue.take("upload", NOW)
    assert taken is not None and taken.job.recording == Recording("", "a")
    withdrawn = queue.expect(Recording("", "b"))
    queue.withdraw(withdrawn)
    queue.withdraw(withdrawn)
    assert names(folder) == [f"{id}.upload.json"]
    queue.close()


def test_one_process_works_and_the_others_add(folder: Path) -> None:
    worker, other = Queue(folder), Queue(folder)
    posted(worker)
    added = posted(other)
    other.look(NOW)
    assert other.take("post", NOW) is None
    worker.look(NOW)
    worker.done(take(worker))
    assert take(worker).id == added
    # When it ends, another one takes over.
    worker.close()
    other.look(NOW)
    assert take(other).id == added
    other.close()


def test_what_another_process_expects_is_followed_to_its_end(folder: Path) -> None:
    worker, other = Queue(folder), Queue(folder)
    posted(worker)
    id = other.expect(Recording("", "a"))
    worker.look(NOW)
    waiting = worker.take("expected", NOW)
    assert waiting is not None and waiting.id == id
    assert worker.failed(waiting, NOW, longest=0.5) <= 0.5
    other.arrived(id, NOW)
    # It has another name by now: forgotten, and found again.
    assert worker.take("expected", NOW + 1) is None
    age(folder)
    worker.look(NOW + 1)
    taken = worker.take("upload", NOW + 1)
    assert taken is not None and taken.id == id
    worker.close()
    other.close()


def test_a_folder_in_which_nothing_happens_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(folder)
    posted(queue)
    age(folder)
    queue.look(NOW)
    monkeypatch.setattr(os, "scandir", None)
    queue.look(NOW)
    queue.close()


GARBAGE = {
    "1.post.json": b"",
    "2.post.json": b"\x00" * 300,
    "3.post.json": b'{"created":1}',
    "4.upload.json": b'{"created":1,"post":{"url":"http://localhost/","body":"{}"}}',
    "5.upload.json": b'{"created":"\xff"}',
    "6.expected.json": b"[]",
}


def test_garbage_is_set_aside_and_the_rest_goes_on(folder: Path, read_log: Callable[[], str]) -> None:
    queue = Queue(folder)
    good = posted(queue)
    for name, content in GARBAGE.items():
        (folder / name).write_bytes(content)
    (folder / "what.ever.json").write_bytes(b"{}")
    (folder / "notes.txt").write_bytes(b"an operator's")
    queue.look(NOW)
    assert take(queue).id == good
    for kind in ("post", "upload", "expected"):
        assert queue.take(kind, NOW) is None
    assert names(folder) == sorted(
        [f"{good}.post.json", "notes.txt", "what.ever.json.bad", *(f"{n}.bad" for n in GARBAGE)]
    )
    assert read_log().count("set aside") == 1 + len(GARBAGE)
    assert len(queue) == 1
    queue.close()


def test_what_cannot_be_read_just_now_is_tried_again(folder: Path, read_log: Callable[[], str]) -> None:
    queue = Queue(folder)
    id = posted(queue)
    path = folder / f"{id}.post.json"
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    assert queue.take("post", NOW) is None
    assert "a job cannot be read" in read_log()
    path.rmdir()
    path.write_bytes(content)
    assert take(queue, NOW + 1).id == id
    queue.close()


def test_only_old_leftovers_of_a_crash_are_cleared_away(folder: Path) -> None:
    queue = Queue(folder)
    posted(queue)
    (folder / ".new-old").write_bytes(b"half")
    os.utime(folder / ".new-old", (time.time() - 7200,) * 2)
    # Another process may be writing it.
    (folder / ".new-young").write_bytes(b"half")
    queue.look(NOW)
    assert [name for name in names(folder) if name.startswith(".new")] == [".new-young"]
    queue.close()


def test_a_job_that_cannot_be_written_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    queue = Queue(folder)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        posted(queue)
    assert (names(folder), len(queue)) == ([], 0)


def test_a_job_becomes_one_of_another_kind(folder: Path) -> None:
    queue = Queue(folder)
    queue.arrived(queue.expect(Recording("", "a")), NOW)
    taken = queue.take("upload", NOW)
    assert taken is not None
    queue.save(taken._replace(job=Job(1.0, recording=Recording("", "b"))))
    queue.become(taken, "post", Job(2.0, post=Post("http://localhost/", "{}")), NOW)
    assert names(folder) == [f"{taken.id}.post.json"]
    assert take(queue).job.created == 2.0
    assert queue.busy(NOW)
    queue.close()


def test_a_file_that_gets_its_name_while_the_folder_is_looked_through_is_no_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = Queue(folder), Queue(folder)
    queue.look(NOW)
    posted(queue)
    aside = folder / ".new-0123"
    aside.write_bytes(b"")
    scandir = os.scandir

    def named_meanwhile(path: Path) -> object:
        entries = scandir(path)

        class Entries:
            def __enter__(self) -> Iterator[os.DirEntry[str]]:
                listed = list(entries.__enter__())
                aside.unlink(missing_ok=True)
                posted(other)
                return iter([*listed, *scandir(path)])

            def __exit__(self, *exc: object) -> None:
                entries.close()

        return Entries()

    monkeypatch.setattr(os, "scandir", named_meanwhile)
    queue.look(NOW)
    assert len(queue) == 2
    queue.close()


def test_a_queue_that_was_closed_takes_no_folder_from_others(folder: Path) -> None:
    queue, other = Queue(folder), Queue(folder)
    posted(queue)
    taken = take(queue)
    queue.close()
    # What was still being done comes to its end, and its job stays for who has the folder now.
    queue.become(taken, "upload", Job(0.0, recording=Recording(str(folder), "x")), NOW)
    assert len(queue) == 0
    other.look(NOW)
    assert other.take("upload", NOW) is not None
    other.close()

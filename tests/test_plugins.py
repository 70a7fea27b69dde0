from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamsink.errors import ProcessorError
from streamsink.plugins import Listing, Option, catalogue, find
from streamsink.processor import FunctionProcessor, Processor
from streamsink.processors.echo import Echo
from streamsink.processors.record import Record

PACKAGE = Path(__file__).parent / "plugin_package"
EXAMPLES = Path(__file__).parent.parent / "examples"

OPTIONS = '''
from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

from pydantic import Field

import streamsink
from streamsink import Processor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamsink import Stream


class Mode(enum.Enum):
    FAST = "quick"
    GOOD = 2


class Options(Processor):
    """Takes options of every kind.

    And has more to say.
    """

    def __init__(
        self,
        text: str = "",
        whole: int = 0,
        real: float = 0.0,
        flag: bool = False,
        where: Path = Path("here"),
        choice: Literal["a", "b", 3] = "a",
        mode: Mode = Mode.GOOD,
        maybe: int | None = 7,
        perhaps: Optional[Path] = None,
        either: Union[int, str] = 0,
        numbers: list[int] = [],
        words: tuple[str, ...] = (),
        bounded: Annotated[int, Field(ge=1, le=9)] = 5,
        anything: Any = None,
        *,
        bare="text",
        bare_number=1.5,
        bare_flag=True,
    ) -> None:
        self.given = dict(locals())
        del self.given["self"]


class Needs(Processor):
    """Needs two options."""

    def __init__(self, key: str, size: int, extra: int = 0) -> None:
        pass


class Odd(Processor):
    def __init__(self, thing: Processor | None = None) -> None:
        pass


class Unreadable(Processor):
    def __init__(self, stream: Stream | None = None) -> None:
        pass


@streamsink.processor(sample_rate=16_000)
async def listener(stream: Stream, frames: AsyncIterator, *, gain: float = 1.0, mode: Mode = Mode.FAST, **more) -> None:
    """Listens."""


class Fails(Processor):
    def __init__(self, size: int = 1) -> None:
        raise ValueError(f"no such size: {size}")


class FailsQuietly(Processor):
    def __init__(self) -> None:
        assert False


class BadRate(Processor):
    sample_rate = 4000


class BadRateLater(Processor):
    def __init__(self, sample_rate: int = 8000) -> None:
        self.sample_rate = sample_rate


class AsyncFrame(Processor):
    async def on_frame(self, frame) -> None:
        pass


class PlainStart(Processor):
    def on_start(self, stream) -> None:
        pass


async def undecorated(stream, frames):
    pass


an_instance = Options()
'''


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "my:options.py"
    path.write_text(OPTIONS)
    return path


def problem(spec: str) -> str:
    with pytest.raises(ProcessorError) as caught:
        find(spec).build()
    return str(caught.value)


# --- Where a processor is found --------------------------------------------------------------------------------------


def test_built_ins_are_found_by_name() -> None:
    found = find("echo")
    assert (found.name, found.processor, found.options) == ("echo", Echo, {})
    assert isinstance(found.build(), Echo)
    found = find("record:sample_rate=16000,directory=/tmp/a,b")
    assert (found.name, found.processor) == ("record", Record)
    assert found.options == {"sample_rate": 16000, "directory": Path("/tmp/a,b")}
    assert found.build().sample_rate == 16000


def test_every_build_is_another_instance(options: Path) -> None:
    found = find(f"{options}:Options:numbers=1")
    first, second = found.build(), found.build()
    assert first is not second
    # What one stream's processor does to its options is its own business.
    first.given["numbers"].append(2)  # type: ignore[attr-defined]
    assert second.given["numbers"] == [1]  # type: ignore[attr-defined]


def test_a_class_is_found_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("streamsink.processors.record:Record").processor is Record
    # In the working folder too, as `python -m streamsink` would find it, and the path is as before.
    (tmp_path / "my_working_module.py").write_text("from streamsink import Processor\nclass Mine(Processor): pass\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    found = find("my_working_module:Mine")
    assert (found.name, found.processor.__module__) == ("Mine", "my_working_module")
    assert sys.path == before


def test_a_class_is_found_in_a_file_and_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "my_sibling.py").write_text("SIZE = 7\n")
    text = "from my_sibling import SIZE\nfrom streamsink import Processor\nclass Mine(Processor):\n    size = SIZE\n"
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text(
        "from streamsink import Processor\nclass Mine(Processor):\n    size = 8\n"
    )
    before = list(sys.path)
    first, again = find(f"{tmp_path}/mine.py:Mine"), find(f"{tmp_path}/other/../mine.py:Mine")
    other = find(f"{tmp_path}/other/mine.py:Mine")
    assert sys.path == before
    assert first.processor is again.processor
    assert [getattr(plugin.processor, "size", None) for plugin in (first, other)] == [7, 8]
    # Whatever looks a class's module up finds it.
    assert sys.modules[first.processor.__module__].__file__ == str(tmp_path / "mine.py")


def test_a_relative_path_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXAMPLES / "answer.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    classes = {find(spec).processor for spec in ("mine.py:Answer", "./mine.py:Answer", "~/mine.py:Answer")}
    assert len(classes) == 1


def test_a_failed_file_can_be_mended_and_named_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import nothing_of_the_kind\n")
    assert "No module named 'nothing_of_the_kind'" in problem(f"{path}:Mine")
    path.write_text("from streamsink import Processor\n\n\nclass Mine(Processor):\n    pass\n")
    assert find(f"{path}:Mine").name == "Mine"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of this folder was installed to by pip."""
    source = tmp_path_factory.mktemp("source") / "plugin_package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(installed)
    yield installed
    sys.modules.pop("streamsink_tone", None)


def offer(site: Path, package: str, entry_points: dict[str, str]) -> None:
    """Put a distribution with these entry points where ``site`` is on the path."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
    (folder / "entry_points.txt").write_text(f"[streamsink.processors]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_package_offers_a_processor_by_entry_point(on_path: Path) -> None:
    found = find("tone:hertz=440")
    assert (found.name, found.processor.__name__, found.options) == ("tone", "Tone", {"hertz": 440.0})
    found.build()
    assert [listing for listing in catalogue() if listing.origin == "streamsink-tone"] == [
        Listing(
            "tone",
            "streamsink-tone",
            "Confirms every key pressed with a short tone.",
            (Option("hertz", "float", "880.0"), Option("seconds", "float", "0.2")),
        )
    ]


def test_a_built_in_hides_an_entry_point_of_its_name(site: Path) -> None:
    offer(site, "rival", {"echo": "streamsink.processors.record:Record"})
    assert find("echo").processor is Echo
    listed = {(listing.name, listing.origin): listing.problem for listing in catalogue()}
    assert listed == {
        ("echo", "built-in"): None,
        ("echo", "rival"): "hidden by the built-in of this name",
        ("announce", "built-in"): None,
        ("mix", "built-in"): None,
        ("parrot", "built-in"): None,
        ("record", "built-in"): None,
        ("transcribe", "built-in"): None,
    }


def test_two_packages_that_offer_one_name_leave_the_choice_to_the_user(site: Path) -> None:
    offer(site, "one", {"both": "streamsink.processors.record:Record", "same": "streamsink.processors.echo:Echo"})
    offer(site, "two", {"both": "streamsink.processors.echo:Echo", "same": "streamsink.processors.echo:Echo"})
    told = problem("both")
    assert told.startswith("more than one package offers a processor `both`; say which: ")
    assert "streamsink.processors.record:Record" in told
    assert "streamsink.processors.echo:Echo" in told
    assert find("same").processor is Echo


def test_a_broken_entry_point_is_listed_with_the_reason(site: Path) -> None:
    (site / "broken_plugin.py").write_text("import os\n\nraise RuntimeError('not today')\n")
    offer(
        site,
        "half",
        {
            "broken": "broken_plugin:Mine",
            "gone": "no_such_module:Mine",
            "nothing": "json:dumps",
            "fine": "streamsink.processors.echo:Echo",
        },
    )
    listed = {listing.name: listing for listing in catalogue()}
    assert list(listed) == [
        "announce",
        "broken",
        "echo",
        "fine",
        "gone",
        "mix",
        "nothing",
        "parrot",
        "record",
        "transcribe",
    ]
    assert listed["fine"] == Listing("fine", "half", "Sends each inbound frame straight back.", ())
    assert listed["broken"].problem == (
        "entry point `broken` (broken_plugin:Mine) cannot be loaded: "
        f"{site}/broken_plugin.py, line 3: RuntimeError: not today"
    )
    assert "No module named 'no_such_module'" in str(listed["gone"].problem)
    assert "wanted a subclass of streamsink.Processor" in str(listed["nothing"].problem)
    assert problem("broken") == listed["broken"].problem


def test_nothing_is_imported_before_it_is_named() -> None:
    code = (
        "import sys, streamsink.plugins\n"
        "assert not [m for m in sys.modules if m.startswith('streamsink.processors.')]\n"
        "streamsink.plugins.find('echo')\n"
        "assert 'streamsink.processors.record' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- What is refused, and how ----------------------------------------------------------------------------------------

RECORD = "format, sample_rate, layout, segment, max_duration, trim, pause_digit, directory, upload, "
RECORD += "keep_local, on_complete"
REFUSED = {
    "": "'' names no processor; wanted NAME or NAME:key=value,key=value",
    ":size=1": "':size=1' names no processor; wanted NAME or NAME:key=value,key=value",
    "recrod": "there is no processor `recrod` (did you mean `record`?); there are announce, echo, mix, "
    "parrot, record, transcribe, or write package.module:Name or path/to/file.py:Name",
    "record:16000": "`record:16000`: there is no module `record`; options are written key=value",
    "no_such.module:Mine": "`no_such.module:Mine`: there is no module `no_such.module`",
    "streamsink.processors.nothing:Mine": "`streamsink.processors.nothing:Mine`: there is no module "
    "`streamsink.processors.nothing`",
    "json:dump5": "json has no `dump5`; it has no processor",
    "streamsink.processors.echo:Eco": "streamsink.processors.echo has no `Eco` (did you mean `Echo`?); it has Echo",
    "streamsink:Processor": "`Processor` is <class 'streamsink.processor.Processor'>; "
    "wanted a subclass of streamsink.Processor",
    "/no/such/file.py:Mine": "/no/such/file.py: No such file or directory",
    "/no/such/file.py": "`/no/such/file.py` names a file but no processor in it; wanted /no/such/file.py:Name",
    "/dev/null:Mine": "/dev/null: not a Python file; its name must end in .py",
    "record:rate=8000": f"processor `record` has no option `rate` (did you mean `format`?); its options are {RECORD}",
    "record:sample_rte=8000": "processor `record` has no option `sample_rte` (did you mean `sample_rate`?); "
    f"its options are {RECORD}",
    "echo:gain=2": "processor `echo` has no option `gain`; it has no options",
    "record:sample_rate=fast": "processor `record`: option `sample_rate` is 'fast'; wanted int | None: "
    "Input should be a valid integer, unable to parse string as an integer",
    "record:sample_rate=1,sample_rate=2": "processor `record`: option `sample_rate` is given twice",
    "record:sample_rate=7999": "processor `record`: sample_rate is 7999; wanted None, or 8000 to 192000 Hz as an int",
    "record:sample_rate=192001": "processor `record`: sample_rate is 192001; "
    "wanted None, or 8000 to 192000 Hz as an int",
    "record:directory=a,b=c": f"processor `record` has no option `b`; its options are {RECORD}",
    "{file}:Needs": "processor `Needs` needs `key=…`, `size=…`",
    "{file}:Needs:size=1": "processor `Needs` needs `key=…`",
    "{file}:Odd:thing=1": "processor `Odd`: option `thing` is a streamsink.processor.Processor | None, "
    "which no text can be converted to",
    "{file}:Unreadable:stream=1": "processor `Unreadable`: the annotation of option `stream` cannot be read: "
    "name 'Stream' is not defined",
    "{file}:listener:more=1": "processor `listener` has no option `more` (did you mean `mode`?); "
    "its options are gain, mode",
    "{file}:Fails": "processor `Fails` cannot be built: {file}, line {Fails}: ValueError: no such size: 1",
    "{file}:FailsQuietly": "processor `FailsQuietly` cannot be built: {file}, line {FailsQuietly}: AssertionError",
    "{file}:BadRate": "processor `BadRate`: sample_rate is 4000; wanted None, or 8000 to 192000 Hz as an int",
    "{file}:BadRateLater:sample_rate=96": "processor `BadRateLater`: sample_rate is 96; "
    "wanted None, or 8000 to 192000 Hz as an int",
    "{file}:AsyncFrame": "processor `AsyncFrame`: on_frame is `async def`; wanted a plain `def`, or @processor",
    "{file}:PlainStart": "processor `PlainStart`: on_start is a plain `def`; wanted `async def`",
    "{file}:Option": "{file} has no `Option` (did you mean `Options`?); it has Options, Needs, Odd, Unreadable, "
    "listener, Fails, FailsQuietly, BadRate, BadRateLater, AsyncFrame, PlainStart",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_cannot_be_used_is_told_in_one_line(spec: str, options: Path) -> None:
    lines = OPTIONS.splitlines()
    wanted = REFUSED[spec].format(
        file=options,
        Fails=next(n for n, line in enumerate(lines, 1) if "no such size" in line),
        FailsQuietly=next(n for n, line in enumerate(lines, 1) if "assert False" in line),
    )
    assert problem(spec.format(file=options)) == wanted


def test_what_is_no_class_is_told_how_to_become_one(options: Path) -> None:
    assert problem(f"{options}:undecorated").endswith("decorate the function with @streamsink.processor()")
    assert problem(f"{options}:an_instance").endswith("name the class, an instance is made for each stream")


BROKEN = {
    "x = 1\ny = (\n": "{file}, line 2: SyntaxError: '(' was never closed",
    "import json\n\njson.loads('{')\n": "{file}, line 3: JSONDecodeError: Expecting property name enclosed in double "
    "quotes: line 1 column 2 (char 1)",
    "import sys\nsys.exit(3)\n": "{file}, line 2: SystemExit: 3",
    "def f():\n    raise KeyError('x')\n\n\nf()\n": "{file}, line 2: KeyError: 'x'",
    "import no_such_module_at_all\n": "{file}, line 1: ModuleNotFoundError: No module named 'no_such_module_at_all'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_an_error_in_the_users_file_is_told_with_its_place(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my_broken.py"
    path.write_text(text)
    before = list(sys.path)
    assert problem(f"{path}:Mine") == f"my_broken.py cannot be imported: {BROKEN[text].format(file=path)}"
    assert sys.path == before
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    told = problem("my_broken:Mine")
    assert told == f"module `my_broken` cannot be imported: {BROKEN[text].format(file=path)}"


def test_the_users_own_error_is_the_cause(options: Path) -> None:
    with pytest.raises(ProcessorError) as caught:
        find(f"{options}:Fails:size=3").build()
    assert isinstance(caught.value.__cause__, ValueError)


# --- Options ---------------------------------------------------------------------------------------------------------

# What a SPEC's options say, and what __init__ gets.
CONVERTED: dict[str, dict[str, Any]] = {
    "text=a": {"text": "a"},
    "text=": {"text": ""},
    "text=a,b": {"text": "a,b"},
    "text=http://x:80/?q=1": {"text": "http://x:80/?q=1"},
    "text=a,1=2": {"text": "a,1=2"},
    "text=1,whole=2,real=3": {"text": "1", "whole": 2, "real": 3.0},
    "whole=-3": {"whole": -3},
    "real=1e-3": {"real": 0.001},
    **{f"flag={word}": {"flag": True} for word in ("yes", "true", "on", "1", "True", "YES")},
    **{f"flag={word}": {"flag": False} for word in ("no", "false", "off", "0", "False", "NO")},
    "where=/a b/c": {"where": Path("/a b/c")},
    "choice=b": {"choice": "b"},
    "choice=3": {"choice": 3},
    "mode=quick": {"mode": "FAST"},
    "mode=FAST": {"mode": "FAST"},
    "mode=2": {"mode": "GOOD"},
    "maybe=none": {"maybe": None},
    "maybe=": {"maybe": None},
    "maybe=8": {"maybe": 8},
    "perhaps=/x": {"perhaps": Path("/x")},
    "either=5": {"either": 5},
    "either=five": {"either": "five"},
    "numbers=1,2,3": {"numbers": [1, 2, 3]},
    "numbers=": {"numbers": []},
    "words=a,b,bare=c": {"words": ("a", "b"), "bare": "c"},
    "bounded=9": {"bounded": 9},
    "anything=1": {"anything": "1"},
    "bare=1": {"bare": "1"},
    "bare_number=2": {"bare_number": 2.0},
    "bare_flag=no": {"bare_flag": False},
}


@pytest.mark.parametrize("text", CONVERTED)
def test_annotations_convert_what_a_spec_says(text: str, options: Path) -> None:
    found = find(f"{options}:Options:{text}")
    assert found.name == "Options"
    given = {key: getattr(value, "name", value) if key == "mode" else value for key, value in found.options.items()}
    assert given == CONVERTED[text]
    assert [type(value) for value in given.values()] == [type(value) for value in CONVERTED[text].values()]
    defaults = find(f"{options}:Options").build().given  # type: ignore[attr-defined]
    assert found.build().given == defaults | found.options  # type: ignore[attr-defined]


BAD = {
    "whole=1.5": "wanted int: Input should be a valid integer, unable to parse string as an integer",
    "whole=": "wanted int: Input should be a valid integer, unable to parse string as an integer",
    "real=much": "wanted float: Input should be a valid number, unable to parse string as a number",
    "flag=maybe": "wanted bool: Input should be a valid boolean, unable to interpret input",
    "choice=c": "wanted a | b | 3: allowed are a, b, 3",
    "mode=quik": "wanted FAST | GOOD: allowed are quick, 2, FAST, GOOD (did you mean `quick`?)",
    "maybe=x": "wanted int | None: Input should be a valid integer, unable to parse string as an integer",
    "numbers=1,x": "wanted list[int]: Input should be a valid integer, unable to parse string as an integer",
    "bounded=10": "Input should be less than or equal to 9",
}


@pytest.mark.parametrize("text", BAD)
def test_a_value_that_does_not_fit_is_told_with_what_was_wanted(text: str, options: Path) -> None:
    key, value = text.split("=")
    told = problem(f"{options}:Options:{text}")
    assert told.startswith(f"processor `Options`: option `{key}` is {value!r}; wanted ")
    assert told.endswith(BAD[text])


def test_a_functions_options_are_its_keyword_arguments(options: Path) -> None:
    found = find(f"{options}:listener:gain=2,mode=good".replace("good", "2"))
    assert issubclass(found.processor, FunctionProcessor)
    assert found.options["gain"] == 2.0
    assert found.options["mode"].name == "GOOD"
    assert found.build().sample_rate == 16_000


def test_the_catalogue_tells_options_types_and_defaults() -> None:
    assert {listing.name: listing for listing in catalogue()}["record"] == Listing(
        "record",
        "built-in",
        "Records the stream, with a JSON sidecar.",
        (
            Option("format", "wav | flac | ogg | opus | mp3", "'wav'"),
            Option("sample_rate", "int | None", "None"),
            Option("layout", "mono-mix | stereo | separate | None", "None"),
            Option("segment", "float | None", "None"),
            Option("max_duration", "float | None", "None"),
            Option("trim", "silence | None", "None"),
            Option("pause_digit", "0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | * | # | A | B | C | D | None", "None"),
            Option("directory", "Path | None", "None"),
            Option("upload", "str | None", "None"),
            Option("keep_local", "bool", "True"),
            Option("on_complete", "str | None", "None"),
        ),
    )


def test_an_entry_points_options_are_told_as_its_annotations_read(site: Path) -> None:
    (site / "my_offered.py").write_text(OPTIONS)
    offer(
        site,
        "offered",
        {"options": "my_offered:Options", "needs": "my_offered:Needs", "function": "my_offered:listener"},
    )
    listed = {listing.name: listing for listing in catalogue() if listing.origin == "offered"}
    assert listed["options"].summary == "Takes options of every kind."
    told = {option.name: (option.type, option.default) for option in listed["options"].options}
    assert told == {
        "text": ("str", "''"),
        "whole": ("int", "0"),
        "real": ("float", "0.0"),
        "flag": ("bool", "False"),
        "where": ("Path", "here"),
        "choice": ("a | b | 3", "'a'"),
        "mode": ("FAST | GOOD", "GOOD"),
        "maybe": ("int | None", "7"),
        "perhaps": ("Path | None", "None"),
        "either": ("int | str", "0"),
        "numbers": ("list[int]", "[]"),
        "words": ("tuple[str, ...]", "()"),
        "bounded": ("int", "5"),
        "anything": ("Any", "None"),
        "bare": ("str", "'text'"),
        "bare_number": ("float", "1.5"),
        "bare_flag": ("bool", "True"),
    }
    assert listed["needs"].options == (
        Option("key", "str", None),
        Option("size", "int", None),
        Option("extra", "int", "0"),
    )
    assert listed["function"].options == (Option("gain", "float", "1.0"), Option("mode", "FAST | GOOD", "FAST"))


def test_a_class_without_a_docstring_has_no_summary(site: Path) -> None:
    (site / "my_bare.py").write_text("from streamsink import Processor\nclass Bare(Processor): pass\n")
    offer(site, "bare", {"bare": "my_bare:Bare"})
    assert next(listing for listing in catalogue() if listing.name == "bare") == Listing("bare", "bare", "", ())


def test_the_examples_can_be_named() -> None:
    for spec, rate in (("answer.py:Answer:pause=0.3", None), ("answer_function.py:answer:pause=0.3", 16_000)):
        found = find(f"{EXAMPLES}/{spec}")
        assert issubclass(found.processor, Processor)
        assert found.options == {"pause": 0.3}
        assert found.build().sample_rate == rate

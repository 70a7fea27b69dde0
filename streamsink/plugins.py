"""Finding processors and building them: from a SPEC to a class with its options, from that to an instance a stream.

    SPEC     NAME, or NAME:key=value,key=value
    NAME     a built-in, an entry point of the group ``streamsink.processors``, ``package.module:Name`` or
             ``path/to/file.py:Name``

A built-in hides an entry point of the same name. While a module or file is imported, its own folder (the working folder
for a module) leads ``sys.path``, as it would for a script; afterwards it is taken out again, so import what lies beside
a file at its top and not inside functions.
"""

from __future__ import annotations

import copy
import difflib
import enum
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from streamsink.errors import ProcessorError, SpeechError, StreamsinkError
from streamsink.processor import FunctionProcessor, Processor
from streamsink.speech.events import VadSettings
from streamsink.speech.vad import check

ENTRY_POINTS = "streamsink.processors"

LOWEST_RATE, HIGHEST_RATE = 8000, 192_000
"""Hz; what a processor may ask for."""

_BUILT_IN = {
    "announce": ("streamsink.processors.announce", "Announce"),
    "echo": ("streamsink.processors.echo", "Echo"),
    "mix": ("streamsink.processors.mix", "Mix"),
    "parrot": ("streamsink.processors.parrot", "Parrot"),
    "record": ("streamsink.processors.record", "Record"),
    "transcribe": ("streamsink.processors.transcribe", "Transcribe"),
}

_OPTIONS_START = re.compile(r":(?=[A-Za-z_]\w*=)")
_OPTIONS_COMMA = re.compile(r",(?=[A-Za-z_]\w*=)")

_PLAIN_HOOKS = (
    "on_frame",
    "on_played",
    "on_dtmf",
    "on_mark",
    "on_speech",
    "on_transcript",
    "on_speaker",
    "on_status",
)
_ASYNC_HOOKS = ("on_start", "on_stop")

_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One thing a processor lets its user choose.

    Attributes:
        name: The keyword.
        type: What it takes, as a type annotation reads.
        default: What it is when not given, as Python writes it; None when it must be given.
    """

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class Listing:
    """One line of what can be named.

    Attributes:
        name: What a SPEC says.
        origin: ``built-in``, or the distribution package that offers it.
        summary: First line of the class's docstring.
        options: Its options, in order.
        problem: Why it cannot be used; None when it can.
    """

    name: str
    origin: str
    summary: str
    options: tuple[Option, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Plugin:
    """A processor that was found, with its options; makes an instance for each stream.

    Attributes:
        name: What logs, metrics and sidecars call it: its NAME, or the class's name where NAME says where that is.
        processor: The class.
        options: Keyword arguments, converted.
    """

    name: str
    processor: type[Processor]
    options: dict[str, Any]

    @property
    def calls_say(self) -> bool:
        """Whether its code calls something named ``say``, as far as can be seen without running it."""
        values = [value for cls in self.processor.__mro__ for value in vars(cls).values()]
        if issubclass(self.processor, FunctionProcessor):
            values.append(self.processor.function)
        return any(_names(value.__code__, "say") for value in values if inspect.isfunction(value))

    def build(self) -> Processor:
        """Make an instance.

        Raises:
            ProcessorError: Its ``__init__`` raised, or it asks for a sample rate, or a voice activity detection, that
                cannot be had.
        """
        try:
            # Copied, since a list that one stream's instance appends to is not another's.
            instance = self.processor(**copy.deepcopy(self.options))
            rate, vad = instance.sample_rate, instance.vad
        except (Exception, SystemExit) as error:
            # A class of an interactive session has no file.
            file = getattr(sys.modules.get(self.processor.__module__), "__file__", None)
            folder = Path(file).parent if file else None
            raise ProcessorError(f"processor `{self.name}` cannot be built: {_where(error, folder)}") from error
        _check_rate(self.name, rate)
        _check_vad(self.name, vad)
        return instance


def _names(code: types.CodeType, name: str) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return name in code.co_names or any(_names(constant, name) for constant in inner)


def find(spec: str) -> Plugin:
    """Find a processor, check it and convert its options.

    Raises:
        ProcessorError: Nothing has that name, what has it is no processor, or the options do not fit.
    """
    name, given = _split(spec)
    short, cls = _resolve(name)
    _check(short, cls)
    return Plugin(short, cls, _convert_options(short, cls, given))


def catalogue() -> list[Listing]:
    """List what a SPEC can name without saying where it is: built-ins and entry points, by name.

    An entry point that cannot be loaded is listed with the reason.
    """
    listings = []
    for name, (module, attribute) in _BUILT_IN.items():
        listings.append(_listing(name, "built-in", getattr(importlib.import_module(module), attribute)))
    for point in _entry_points():
        origin = point.dist.name if point.dist else "unknown package"
        try:
            if point.name in _BUILT_IN:
                raise ProcessorError("hidden by the built-in of this name")
            cls = _load(point)
            _check(point.name, cls)
            listings.append(_listing(point.name, origin, cls))
        except ProcessorError as error:
            listings.append(Listing(point.name, origin, "", (), str(error)))
    return sorted(listings, key=lambda listing: listing.name)


# --- SPEC ------------------------------------------------------------------------------------------------------------


def _split(spec: str) -> tuple[str, dict[str, str]]:
    """Split a SPEC into NAME and what its options say."""
    name, *rest = _OPTIONS_START.split(spec, maxsplit=1)
    given: dict[str, str] = {}
    for option in _OPTIONS_COMMA.split(rest[0]) if rest else ():
        key, value = option.split("=", 1)
        if key in given:
            raise ProcessorError(f"processor `{name}`: option `{key}` is given twice")
        given[key] = value
    if not name:
        raise ProcessorError(f"{spec!r} names no processor; wanted NAME or NAME:key=value,key=value")
    return name, given


def _resolve(name: str) -> tuple[str, Any]:
    """Find what NAME stands for, whatever it is, and what to call it."""
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        return name, getattr(importlib.import_module(module), attribute)
    where, colon, attribute = name.rpartition(":")
    if colon:
        module_found = _import_file(Path(where)) if _is_file(where) else _import_module(where, name)
        return attribute, _attribute(module_found, attribute, where)
    points = _entry_points()
    matching = {point.value: point for point in points if point.name == name}
    if len(matching) > 1:
        raise ProcessorError(f"more than one package offers a processor `{name}`; say which: {', '.join(matching)}")
    for point in matching.values():
        return name, _load(point)
    raise ProcessorError(_not_found(name, [point.name for point in points]))


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _not_found(name: str, offered: list[str]) -> str:
    if _is_file(name):
        return f"`{name}` names a file but no processor in it; wanted {name}:Name"
    known = sorted({*_BUILT_IN, *offered})
    return (
        f"there is no processor `{name}`{_did_you_mean(name, known)}; there are {', '.join(known)}, "
        "or write package.module:Name or path/to/file.py:Name"
    )


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


# --- Importing -------------------------------------------------------------------------------------------------------


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise ProcessorError(f"entry point `{point.name}` ({point.value}) cannot be loaded: {_where(error)}") from error


def _import_module(module: str, name: str) -> ModuleType:
    with _leading_the_path(Path.cwd()):
        try:
            return importlib.import_module(module)
        except (Exception, SystemExit) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and (module == missing or module.startswith(f"{missing}.")):
                hint = "; options are written key=value" if module in _BUILT_IN else ""
                raise ProcessorError(f"`{name}`: there is no module `{module}`{hint}") from error
            raise ProcessorError(f"module `{module}` cannot be imported: {_where(error, Path.cwd())}") from error


def _import_file(path: Path) -> ModuleType:
    try:
        path = path.expanduser().resolve(strict=True)
    except OSError as error:
        raise ProcessorError(f"{path}: {error.strerror}") from error
    # Unique, so that two files of one name are two modules, and one file named twice is one.
    module_name = f"_streamsink_{hashlib.sha256(bytes(path)).hexdigest()[:16]}_{path.stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ProcessorError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up here.
    sys.modules[module_name] = module
    with _leading_the_path(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ProcessorError(f"{path.name} cannot be imported: {_where(error, path.parent)}") from error
    return module


@contextmanager
def _leading_the_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        known = [name for name, value in vars(module).items() if _is_processor(value) and value is not Processor]
        there = f"; it has {', '.join(known)}" if known else ""
        raise ProcessorError(
            f"{where} has no `{attribute}`{_did_you_mean(attribute, known)}{there or '; it has no processor'}"
        ) from None


def _where(error: BaseException, folder: Path | None = None) -> str:
    """Tell an error in one line, with the place it came from: the innermost one in ``folder``, where there is one."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, StreamsinkError):
        # Ours say what to do about it, wherever they come from.
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"]
    places = [f for f in frames if folder is not None and folder in Path(f.filename).parents] or frames
    return f"{places[-1].filename}, line {places[-1].lineno}: {text}" if places else text


# --- Checking --------------------------------------------------------------------------------------------------------


def _is_processor(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Processor)


def _check(name: str, cls: Any) -> None:
    """Raise for what would only fail once a call is there."""
    if not _is_processor(cls) or cls is Processor:
        hint = ""
        if inspect.iscoroutinefunction(cls):
            hint = "; decorate the function with @streamsink.processor()"
        elif isinstance(cls, Processor):
            hint = "; name the class, an instance is made for each stream"
        raise ProcessorError(f"`{name}` is {cls!r}; wanted a subclass of streamsink.Processor{hint}")
    for hook in _PLAIN_HOOKS:
        if inspect.iscoroutinefunction(getattr(cls, hook)):
            raise ProcessorError(f"processor `{name}`: {hook} is `async def`; wanted a plain `def`, or @processor")
    for hook in _ASYNC_HOOKS:
        if not inspect.iscoroutinefunction(getattr(cls, hook)):
            raise ProcessorError(f"processor `{name}`: {hook} is a plain `def`; wanted `async def`")
    _check_rate(name, cls.sample_rate)


def _check_rate(name: str, rate: object) -> None:
    if rate is None or (type(rate) is int and LOWEST_RATE <= rate <= HIGHEST_RATE):
        return
    raise ProcessorError(
        f"processor `{name}`: sample_rate is {rate!r}; wanted None, or {LOWEST_RATE} to {HIGHEST_RATE} Hz as an int"
    )


def _check_vad(name: str, vad: object) -> None:
    if vad is None:
        return
    if not isinstance(vad, VadSettings):
        raise ProcessorError(f"processor `{name}`: vad is {vad!r}; wanted None or VadSettings(...)")
    try:
        check(vad)
    except SpeechError as error:
        raise ProcessorError(f"processor `{name}`: {error}") from None


# --- Options ---------------------------------------------------------------------------------------------------------


def _parameters(cls: type[Processor]) -> dict[str, inspect.Parameter]:
    """What ``__init__`` takes by keyword; for a decorated function, what that takes."""
    parameters = inspect.signature(cls).parameters.values()
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in parameters if parameter.kind in by_keyword}


def _annotation(cls: type[Processor], parameter: inspect.Parameter) -> Any:
    """The type of an option: its annotation, else its default's type, else text."""
    if parameter.annotation is _REQUIRED:
        return str if parameter.default in (_REQUIRED, None) else type(parameter.default)
    function: Any = cls.function if issubclass(cls, FunctionProcessor) else cls.__init__
    # One at a time: beside it stands `stream: Stream`, which may be imported for type checkers only.
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hints = typing.get_type_hints(holder, inspect.unwrap(function).__globals__, include_extras=True)
    except NameError as error:
        raise ProcessorError(
            f"processor `{cls.__name__}`: the annotation of option `{parameter.name}` cannot be read: {error}"
        ) from error
    return hints[parameter.name]


def _convert_options(name: str, cls: type[Processor], given: dict[str, str]) -> dict[str, Any]:
    parameters = _parameters(cls)
    for key in given:
        if key not in parameters:
            allowed = f"its options are {', '.join(parameters)}" if parameters else "it has no options"
            hint = _did_you_mean(key, list(parameters))
            raise ProcessorError(f"processor `{name}` has no option `{key}`{hint}; {allowed}")
    missing = [key for key, parameter in parameters.items() if parameter.default is _REQUIRED and key not in given]
    if missing:
        raise ProcessorError(f"processor `{name}` needs {', '.join(f'`{key}=…`' for key in missing)}")
    options = {}
    for key, text in given.items():
        annotation = _annotation(cls, parameters[key])
        try:
            options[key] = _convert(annotation, text)
        except ValueError as error:
            raise ProcessorError(
                f"processor `{name}`: option `{key}` is {text!r}; wanted {_describe(annotation)}: {error}"
            ) from None
        except PydanticUserError as error:
            raise ProcessorError(
                f"processor `{name}`: option `{key}` is a {_describe(annotation)}, which no text can be converted to"
            ) from error
    return options


def _convert(annotation: Any, text: str) -> Any:
    """Make of ``text`` what the annotation says.

    Raises:
        ValueError: It cannot be; the message says what was wanted.
        PydanticUserError: Nothing is known of such a type.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, text)
    if origin is Literal:
        choices = {str(choice): choice for choice in arguments}
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices = {str(member.value): member for member in annotation} | dict(annotation.__members__)
    else:
        return _convert_value(annotation, origin, text)
    if text not in choices:
        raise ValueError(f"allowed are {', '.join(choices)}{_did_you_mean(text, list(choices))}")
    return choices[text]


def _convert_union(arguments: tuple[Any, ...], text: str) -> Any:
    """Try every member, ``none`` first and text, which takes anything, last."""
    if types.NoneType in arguments and text.lower() in ("none", ""):
        return None
    problem: ValueError | None = None
    for member in sorted(arguments, key=lambda member: member is str):
        if member is not types.NoneType:
            try:
                return _convert(member, text)
            except ValueError as error:
                problem = problem or error
    raise problem or ValueError("only none is allowed")


def _convert_value(annotation: Any, origin: Any, text: str) -> Any:
    adapter = TypeAdapter(annotation)
    try:
        if (origin or annotation) in (list, tuple, set, frozenset):
            return adapter.validate_python(text.split(",") if text else [])
        return adapter.validate_strings(text)
    except ValidationError as error:
        raise ValueError("; ".join(detail["msg"] for detail in error.errors())) from None


def _describe(annotation: Any) -> str:
    """Write a type as its annotation reads, or the choices it leaves."""
    if get_origin(annotation) is Annotated:
        return _describe(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_describe(member) for member in get_args(annotation))
    if annotation is types.NoneType:
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " | ".join(annotation.__members__)
    return re.sub(r"\bpathlib\.(_local\.)?", "", inspect.formatannotation(annotation))


def _listing(name: str, origin: str, cls: type[Processor]) -> Listing:
    options = tuple(
        Option(
            parameter.name,
            _describe(_annotation(cls, parameter)),
            None if parameter.default is _REQUIRED else _default(parameter.default),
        )
        for parameter in _parameters(cls).values()
    )
    # Not inspect.getdoc, which would find the base class's.
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return Listing(name, origin, summary, options)


def _default(value: object) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else repr(value)

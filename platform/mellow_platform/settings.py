"""Options of a job: typed sections, read from a YAML file and the command line, and their `--help`.

Each job takes `--config FILE` and a flag per field (`--learning-rate 3e-4`, `--scaling.workers 4`). This module imports
no heavy package, so that `--help` and errors about options appear at once.
"""

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mellow_platform import storage

DEBUG = "--debug"
LISTED = 12  # most names in an error; --help lists all


@dataclass(frozen=True)
class Metavar:
    """Placeholder of an option's value in `--help`."""

    text: str


@dataclass(frozen=True)
class Location:
    """Marker of fields that contain URIs.

    Attributes:
        exists: True if the job reads the URI, which must then exist at the start; False if the job writes a folder.
        uri: function that returns the URI in a value, or None if the value is not a URI.
    """

    exists: bool
    uri: Callable[[str], str | None] = lambda value: value


def _separated(value: Any) -> Any:
    return [item.strip() for item in str(value).split(",")] if isinstance(value, str | int) else value


def _model(value: str) -> str:
    """Return the option `model` with a local path made absolute; other values are unchanged."""
    if value.startswith("predictions:"):
        return f"predictions:{storage.absolute(value.removeprefix('predictions:'))}"
    return value if _model_uri(value) is None else storage.absolute(value)


def _model_uri(value: str) -> str | None:
    if value == "random" or value.startswith(("http://", "https://", "constant:")):
        return None
    return value.removeprefix("predictions:")


def _decoder_uri(value: str) -> str | None:
    """Return the path or URI of a decoder; None if it is the name of a model on the Hugging Face hub."""
    return value if "://" in value or value.startswith(("/", ".")) or value.endswith(".gguf") else None


Uri = Annotated[str, AfterValidator(storage.absolute), Metavar("URI")]
Input = Annotated[Uri, Location(exists=True)]
Output = Annotated[Uri, Location(exists=False)]
File = Annotated[str, Metavar("FILE"), Location(exists=True)]  # relative to the working directory, submitted jobs' too
Decoder = Annotated[str, Metavar("NAME|URI"), Location(exists=True, uri=_decoder_uri)]
Model = Annotated[
    str, AfterValidator(_model), Metavar("URI|random|constant:TEXT|predictions:URI"), Location(True, _model_uri)
]
Name = Annotated[str, Metavar("NAME")]
Separated = BeforeValidator(_separated)  # lists may be written as [val, test] or, shorter in a shell, val,test
Names = Annotated[list[Name], Separated]


class Section(BaseModel):
    """Base class of options, which refuses unknown names and invalid values."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    def locations(self) -> list[tuple[str, str, bool]]:
        """Return (field, URI, whether the URI must exist) of every URI in the options."""
        found = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                found += [(f"{name}.{inner}", uri, exists) for inner, uri, exists in value.locations()]
            elif location := next(_markers(field.annotation, field.metadata, Location), None):
                uris = (location.uri(text) for text in _texts(value))
                found += [(name, uri, location.exists) for uri in uris if uri]
        return found


Options = TypeVar("Options", bound=Section)


def load(schema: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Return the options in the command line `arguments` (default: `sys.argv`).

    A flag takes precedence over the file of `--config`, which takes precedence over the defaults. Errors end the
    program with status 2 and a message with the option, its value and the valid values.
    """
    fields, parser = flags(schema), command_line(schema)
    known, unknown = parser.parse_known_args(arguments)
    for flag in unknown:
        if flag.startswith("--"):
            name = flag.split("=")[0]
            parser.error(f"{name} is not an option{nearest(name, [dashed(field) for field in fields])}")
        parser.error(f"{flag!r} does not belong to any option")
    typed = {name: text for name, text in vars(known).items() if name in fields}
    try:
        values = read_yaml(known.config) if known.config else {}
    except ValueError as error:
        parser.error(f"--config {error}")
    for name, text in typed.items():
        target = values
        *sections, leaf = name.split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                parser.error(f"--config {known.config}: {section} is {target!r}; expected `option: value` lines")
        try:
            target[leaf] = _value(text, fields[name].annotation)
        except yaml.YAMLError as error:
            parser.error(f"{dashed(name)} {text}: not YAML: {_line(error)}")
    try:
        return validated(schema, values, typed)
    except ValueError as error:
        parser.error(str(error))


def validated(schema: type[Options], values: dict[str, Any], typed: dict[str, str] | None = None) -> Options:
    """Return `values` as options.

    Args:
        typed: values as written on the command line, by dotted name.

    Raises:
        ValueError: a value is not valid; the message contains the option, its value and the valid values.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        problems = [_explain(item, flags(schema), typed or {}) for item in error.errors()]
        raise ValueError("\n".join(dict.fromkeys(problems))) from error


def read_yaml(path: str) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        ValueError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}; expected a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file: {_line(error)}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path}: expected `option: value` lines, found {type(values).__name__}")
    return values or {}


def command_line(schema: type[Section]) -> argparse.ArgumentParser:
    """Return the parser of a job's options, which returns values as text."""
    fields = flags(schema)
    required = {name: field for name, field in fields.items() if field.is_required()}
    parser = argparse.ArgumentParser(
        usage=" ".join(
            ["%(prog)s", *(f"{dashed(name)} {metavar(field)}" for name, field in required.items()), "[options]"]
        ),
        description=schema.__doc__,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    needed, general = parser.add_argument_group("required options"), parser.add_argument_group("options")
    general.add_argument("-h", "--help", action="help", help="print this help and stop")
    general.add_argument(
        "--config", metavar="FILE", help="YAML file with options (`learning_rate: 3e-4`); flags take precedence over it"
    )
    general.add_argument(
        DEBUG, action="store_true", help="print the traceback of a failure here, not only to its log file"
    )
    groups = {}
    for name, section in sections(schema).items():
        groups[name] = parser.add_argument_group(f"{name} options", section.__doc__)
    for name, field in fields.items():
        group = needed if name in required else groups.get(name.rpartition(".")[0], general)
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        group.add_argument(
            dashed(name),
            metavar=metavar(field),
            help=help_text(field).replace("%", "%%"),
            default=argparse.SUPPRESS,
            **switch,
        )
    return parser


class _Help(argparse.HelpFormatter):
    """Help formatter that shows no value for switches that are off by default, and no brackets around other values."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs == "?" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).rstrip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def flags(schema: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return every option of `schema` and of the sections inside it, by dotted name."""
    fields: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields |= flags(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def sections(schema: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Return every section inside `schema`, by dotted name."""
    found: dict[str, type[Section]] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {prefix + name: field.annotation} | sections(field.annotation, f"{prefix}{name}.")
    return found


def dashed(name: str) -> str:
    """Return the flag of a field: `--scaling.min-workers` for `scaling.min_workers`."""
    return f"--{name.replace('_', '-')}"


def metavar(field: FieldInfo) -> str:
    """Return the placeholder of a field's value, with its choices in braces; "" for a switch that is off by default."""
    return "" if field.annotation is bool and field.default is False else _placeholder(field.annotation, field.metadata)


def help_text(field: FieldInfo) -> str:
    """Return the description and the default, unless the option has none or the description contains it."""
    text, default = field.description or "", field.default
    if field.is_required() or "(default: " in text or default in (None, [], {}):
        return text
    match default:
        case bool():
            default = str(default).lower()
        case float():
            default = f"{default:g}"
        case list():
            default = ", ".join(map(str, default))
    return f"{text} (default: {default})"


def nearest(name: str, valid: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the most similar valid name, or else all valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid: {', '.join(valid)}" if len(valid) <= LISTED else "; --help lists the valid ones"


def _placeholder(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    if marker := next((item for item in metadata if isinstance(item, Metavar)), None):
        return marker.text
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _placeholder(arguments[0], arguments[1:])
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin in (Union, UnionType):
        return "|".join(_placeholder(each) for each in arguments if each is not type(None))
    if origin is list:
        item = _placeholder(arguments[0])
        return f"{item}[,...]" if item.startswith("{") else f"{item}[,{item}...]"
    if origin is dict:
        return "YAML" if arguments[1] is Any else f"{{NAME: {_placeholder(arguments[1])}}}"
    return {bool: "{true,false}", int: "INT", float: "FLOAT"}.get(annotation, "TEXT")


Marker = TypeVar("Marker")


def _markers(annotation: Any, metadata: Sequence[Any], kind: type[Marker]) -> Iterator[Marker]:
    """Yield the markers of a kind anywhere in a field's type."""
    yield from (item for item in metadata if isinstance(item, kind))
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _markers(arguments[0], arguments[1:], kind)
    elif get_origin(annotation) is not Literal:
        for each in arguments:
            yield from _markers(each, (), kind)


def _texts(value: Any) -> list[str]:
    """Return the text, or the texts in a list or in the values of a dict."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value] if value is not None else []


def _explain(error: Any, fields: dict[str, FieldInfo], typed: dict[str, str]) -> str:
    """Return one of pydantic's errors as a sentence about the option."""
    parts = list(map(str, error["loc"]))
    # Parts of a location after the option's name are items of a list and alternatives of a union.
    name = next(
        (known for end in range(len(parts), 0, -1) if (known := ".".join(parts[:end])) in fields), ".".join(parts)
    )
    if error["type"] == "extra_forbidden":
        return f"{name} is not an option{nearest(name, fields)}"
    if error["type"] == "missing":
        return f"{dashed(name)} is required: {fields[name].description}" if name in fields else f"{name} is required"
    problem = re.sub(r"^\w+ should ", "must ", error["msg"].removeprefix("Value error, "))
    if error["type"] == "model_type":
        problem = "must contain `option: value` lines"
    given = f" (given {error['input']!r})" if name and (name not in typed or isinstance(error["loc"][-1], int)) else ""
    place = f"{dashed(name)} {typed[name]}: " if name in typed else f"{name}: " if name else ""
    return f"{place}{problem}{given}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _value(text: str, annotation: Any) -> Any:
    """Return a flag's value: its text as written if the field takes only text, otherwise the text parsed as YAML.

    So a question may contain a colon, and a name may be a number; `null` is None unless the field requires text.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in alternatives}
    if kinds - {type(None)} == {str}:
        return None if text == "null" and annotation is not str else text
    try:  # YAML reads 1e-3 as text
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text if text.startswith("/") or "://" in text else yaml.safe_load(text)

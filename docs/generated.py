"""Fill the placeholders of the documentation with tables generated from the code: a hook of MkDocs (mkdocs.yml).

A line such as `{{ options train }}` calls the function `options("train")` of this file and is replaced by its Markdown.
"""

import argparse
import ast
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mellow_platform.settings import Section, dashed, help_text, metavar

REPOSITORY = Path(__file__).resolve().parents[1]
FIGURES = REPOSITORY / "docs" / "figures.json"
PLACEHOLDER = re.compile(r"^\{\{ (\w+)(?: (\S+))? \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholders of a page; called by MkDocs.

    Raises:
        KeyError: a placeholder names no function.
    """
    return PLACEHOLDER.sub(lambda match: GENERATORS[match[1]](*filter(None, [match[2]])), markdown)


def jobs() -> list[str]:
    """Return the names of all jobs."""
    return sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py"))


def job_options(job: str) -> type[Section]:
    """Return the options class that a job passes to `job.run`."""
    tree = ast.parse((REPOSITORY / "jobs" / f"{job}.py").read_text())
    (name,) = (
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "job.run" and isinstance(node.args[0], ast.Name)
    )
    return getattr(importlib.import_module(f"jobs.{job}"), name)


def options(job: str) -> str:
    """Return a table of a job's options per section."""
    schema = job_options(job)
    return f"{schema.__doc__}\n\n" + _sections(schema, "", lambda name: dashed(name))


def arguments(application: str) -> str:
    """Return a table of the `args` of an application in serve/config.yaml: `endpoint` or `model`."""
    from serve.ingress import EndpointArguments
    from serve.model import ModelArguments

    models: dict[str, type[BaseModel]] = {"endpoint": EndpointArguments, "model": ModelArguments}
    return _sections(models[application], "", str)


def commands() -> str:
    """Return the help of `mellow` and of each of its commands."""
    from mellow_platform.cli import parser

    os.environ["COLUMNS"] = "100"
    return "\n\n".join(f"## `{each.prog}`\n\n```text\n{each.format_help()}```" for each in _parsers(parser()))


def http() -> str:
    """Return the routes of the endpoint with the fields of requests and responses, from its OpenAPI schema."""
    schema = openapi()
    parts, bodies = [], set()
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(f"## `{method.upper()} {path}`\n\n{route['description']}")
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                parts.append(f"Request body: `{kind}`.\n\n{_properties(body['schema'], schema)}")
                bodies.add(_name(body["schema"]))
            rows = []
            for status, response in route["responses"].items():
                body = response.get("content", {}).get("application/json", {}).get("schema", {})
                link = f"[{_name(body)}](#{_name(body).lower()})" if "$ref" in body else ""
                rows.append([f"`{status}`", _one_line(response["description"]), link])
            # FastAPI lists 422 for every body that it checks; the endpoint answers such requests with 400.
            rows = [row for row in rows if row[0] != "`422`"]
            parts.append(_table(["status", "meaning", "JSON body"], rows))
    parts.append("## Objects")
    for name, each in schema["components"]["schemas"].items():
        if "properties" in each and name not in bodies | {"HTTPValidationError", "ValidationError"}:
            parts.append(f"### {name}\n\n{each.get('description', '')}\n\n{_properties(each, schema)}")
    return "\n\n".join(parts)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI schema that the endpoint serves at /openapi.json."""
    from serve.api import create_app
    from serve.limits import RequestLimits

    endpoint: Any = SimpleNamespace(limits=RequestLimits(), metrics=None)
    return create_app(endpoint, keys=None, allow_anonymous=False).openapi()


def figures() -> str:
    """Return the recorded figures of every benchmark with command and machine."""
    parts = []
    for name, entry in json.loads(FIGURES.read_text()).items():
        machine = f"Machine: {entry['machine']}." + (f" Recorded {entry['date']}." if entry.get("date") else "")
        parts.append(f"## {entry['title']} {{#{name}}}\n\n```sh\n{entry['command']}\n```\n\n{machine}")
        parts.append(_figures(entry["figures"]))
    return "\n\n".join(parts)


def modules(package: str) -> str:
    """Return a table of the modules of a folder with the first sentence of their docstrings."""
    files = sorted((REPOSITORY / package).glob("*.py"))
    return _table(
        ["module", "contents"], [[f"`{path.stem}`", summary(path)] for path in files if path.stem != "__init__"]
    )


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    return _one_line((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0])


GENERATORS: dict[str, Callable[..., str]] = {
    function.__name__: function for function in (options, arguments, commands, http, figures, modules)
}


def _sections(model: type[BaseModel], prefix: str, shown: Callable[[str], str]) -> str:
    """Return a table of a model's fields, then one per nested model."""
    rows, nested = [], []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            nested.append(f"**`{prefix}{name}`**: {kind.__doc__}\n\n{_sections(kind, f'{prefix}{name}.', shown)}")
        else:
            value = metavar(field) or "switch"
            rows.append([f"`{shown(prefix + name)}`", f"`{value}`", _description(field)])
    table = [_table(["option", "value", "meaning"], rows)] if rows else []
    return "\n\n".join([*table, *nested])


def _description(field: FieldInfo) -> str:
    text = field.description or "" if field.default_factory else help_text(field)
    return f"**required**: {text}" if field.is_required() else text


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _parsers(each)


def _properties(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if "$ref" in schema:
        schema = root["components"]["schemas"][_name(schema)]
    required = schema.get("required", [])
    rows = [
        [f"`{name}`", _type(field), _one_line(field.get("description", "")), "yes" if name in required else ""]
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(["field", "type", "meaning", "required"], rows)


def _name(schema: dict[str, Any]) -> str:
    """Return the name of the object that a JSON schema refers to."""
    return schema.get("$ref", "").rpartition("/")[2]


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON schema's type in a few words, with its limits."""
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(each) for each in choices))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in names.items() if name in schema]
    return ", ".join([schema.get("contentMediaType", schema.get("type", "any")), *limits])


def _figures(values: dict[str, Any]) -> str:
    """Return the figures of one benchmark: a table of the single numbers, and one per nested table."""
    rows, parts = [], []
    for name, value in values.items():
        if isinstance(value, list):
            parts.append(_grid(value))
        elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            parts.append(_grid([{name: row} | cells for row, cells in value.items()]))
        elif isinstance(value, dict):
            rows += [[f"{name} {inner}", each] for inner, each in value.items()]
        else:
            rows.append([name, value])
    single = _table(["figure", "value"], [[_words(name), _number(value)] for name, value in rows])
    return "\n\n".join([*parts, single] if rows else parts)


def _grid(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return _table(list(map(_words, columns)), [[_number(row.get(column)) for column in columns] for row in rows])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(each)}" for name, each in value.items())
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(cell: str) -> str:
    """Return a cell whose bars are not taken for its end; in code, Markdown reads them as they are."""
    return "`".join(part if number % 2 else part.replace("|", r"\|") for number, part in enumerate(cell.split("`")))

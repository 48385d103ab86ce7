"""Writes those parts of the reference that are in the code: commands, configuration files, headers on the wire."""

import json
import re
import types
import typing
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import annotated_types
import typer
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.pycode import ModuleAnalyzer
from typer.cli import get_docs_for_click

from hpc_bridge import __main__ as bridge
from hpc_bridge import bulk_config, config, metrics, switch, transfer, transfer_config
from stream import __main__ as xpcs
from stream import config as run_config
from stream import gateway_metrics, wire
from stream.gateway_runs import GatewayRuns
from stream.gateway_status import GatewayStatus
from stream.live.metrics import Metrics

RUN = (
    *(run_config.Configuration, run_config.SourceSection, run_config.OperatorsSection, run_config.MultiTauSection),
    *(run_config.TwoTimeSection, run_config.CheckpointSection),
)
SITE = (config.Site, config.Heartbeats, config.Queue)
BEAMLINE = (config.Beamline, config.Account, bulk_config.Files, bulk_config.Route, transfer.Place, switch.Switching)
GLOBUS = (transfer_config.Globus,)


def write_all(folder: Path) -> None:
    """Write all of them, as Markdown that pages include; what did not change is left alone: builds stay short."""
    pages = {
        "xpcs-stream.md": commands(xpcs.app, "xpcs-stream"),
        "hpc-bridge.md": commands(bridge.app, "hpc-bridge"),
        "run.md": tables(RUN),
        "site.md": tables(SITE),
        "beamline.md": tables(BEAMLINE),
        "globus.md": tables(GLOBUS),
        "headers.md": tables(tuple(headers())),
        "metrics.md": served(),
    }
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        file = folder / name
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def headers() -> Iterable[type[BaseModel]]:
    """Return the headers of messages."""
    return (value for name, value in vars(wire).items() if name.endswith("Header") and not name.startswith("_"))


def served() -> str:
    """Return what Prometheus is told by each process, in a table."""
    runs = GatewayRuns(None, None)
    registries = {
        "The live page: `xpcs-stream live`, `--live`": Metrics()._registry,
        "`xpcs-stream gateway --metrics`": gateway_metrics.registry(
            runs, GatewayStatus(None, runs, [], None), [], None
        ),
        "`hpc-bridge up --metrics`": metrics.Metrics().registry,
    }
    return "\n\n".join(f"## {title}\n\n{_families(registry)}" for title, registry in registries.items())


def _families(registry: CollectorRegistry) -> str:
    lines = ["| Metric | Kind | What it is |", "| --- | --- | --- |"]
    for family in registry.collect():
        if not family.name.startswith("process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(lines)


def commands(app: typer.Typer, name: str) -> str:
    """Return a section for every command of a program, with all its options: what its `--help` says."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name=name)
    text = re.sub(r"\[/?bold\]", "**", text).replace("**Usage**:\n\n", "").replace("```console\n$ ", "```text\n")
    # The list of commands is cut off in the middle of sentences, and the sections are a list, too.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text).partition("\n")[2]
    text = re.sub(r"(?m)^## ", "### ", text)
    text = re.sub(r"(?m)^\* `--help`: .*\n", "", text).replace("**Options**:\n\n##", "##")
    text = re.sub(r"(?m)^\* (`.*?`): ", r"\1\n: ", text)
    text = re.sub(r"(?m)^(`.*`\n: .*)\n(?=`)", r"\1\n\n", text)
    return "\n\n".join(_example(paragraph, name) for paragraph in text.split("\n\n"))


def _example(paragraph: str, name: str) -> str:
    of_example = (f"{name} ", "zmq+dectris://")
    return f"```text\n{paragraph}\n```" if paragraph.startswith(of_example) else paragraph


def tables(models: tuple[type[BaseModel], ...]) -> str:
    """Return a table for every section: its fields, what they are, what they are if they are not given."""
    return "\n\n".join(_table(model) for model in models)


def _table(model: type[BaseModel]) -> str:
    lines = [f"### {model.__name__}", "", _plain(model.__doc__ or ""), ""]
    said = _said(model)
    for name, field in model.model_fields.items():
        lines += [f"`{name}`", f": {_what(field)}", ""]
        if text := said.get(name, ""):
            lines += [f"  {_plain(text)}", ""]
    return "\n".join(lines)


def _said(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of fields, also of those that are inherited."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            documented = ModuleAnalyzer.for_module(each.__module__).find_attr_docs()
            found |= {name: " ".join(text) for (of, name), text in documented.items() if of == each.__name__}
    return found


def _what(field) -> str:
    kind = _kind(field.annotation, field.metadata)
    if field.is_required():
        return f"{kind}, required"
    default = field.default_factory() if field.default is PydanticUndefined else field.default
    is_time = "time" in kind and isinstance(default, float)
    return f"{kind}, {_default(timedelta(seconds=default) if is_time else default)}"


def _default(value: object) -> str:
    match value:
        case None | BaseModel() | () | {}:
            return "may be left out"
        case timedelta():
            return f"`{value.total_seconds():g} s` if not given"
        case _:
            return f"`{json.dumps(value, default=str)}` if not given"


_KINDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    timedelta: "time, as `30 s`",
    dict: "map",
    list: "list",
    typing.Any: "anything",
}


def _kind(annotation, metadata=()) -> str:
    """Return what a value is, in words, with its bounds."""
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(of[0], of[1:])
    if any(getattr(each, "func", None) is run_config._positive_seconds for each in metadata):
        return "time, as `30 s`"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(each, metadata) for each in of if each is not type(None))
    if origin is typing.Literal:
        return " or ".join(f"`{each}`" for each in of)
    if origin is dict:
        return f"map by name: {_kind(of[1])}"
    if origin in (tuple, list):
        inside = [_kind(each) for each in of if each is not Ellipsis]
        return f"list: {inside[0]}" if Ellipsis in of or origin is list else f"list of {' and '.join(inside)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(metadata)


def _bounds(metadata) -> str:
    words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    found = []
    for each in (one for several in metadata for one in _single(several)):
        found += [f"{word} {getattr(each, name)}" for name, word in words.items() if hasattr(each, name)]
    return f" {' '.join(found)}" if found else ""


def _single(constraint) -> Iterable[object]:
    """Pydantic's own Field holds several."""
    is_group = isinstance(constraint, annotated_types.GroupedMetadata)
    return constraint if is_group else getattr(constraint, "metadata", [constraint])


def _plain(text: str) -> str:
    """Return Markdown of a docstring, which is reStructuredText."""
    return re.sub(r"``(.*?)``", r"`\1`", " ".join(text.split()))

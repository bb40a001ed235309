"""The flags of more than one command; the configuration's come from its fields."""

import ast
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

import typer

from cluster.config import EngineConfig, FleetConfig
from cluster.config_loader import SIZES

Url = Annotated[
    str, typer.Option(envvar="LORAFLEET_URL", help="Where the fleet (or a replica) answers.")
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="LORAFLEET_API_KEY", help="Key, when the fleet wants one.")
]
Filter = Annotated[
    str, typer.Argument(metavar="[NAME]", help="Only adapters whose name has this in it.")
]
AllRows = Annotated[bool, typer.Option("--all", help="Every adapter, however many there are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print all there is as JSON.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with `api_keys`, one a line: they may use models."),
]
_Keys = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="One of `api_keys`; programs of this machine can see it, so rather name a file. "
        "Repeat it for more.",
    ),
]
_AdminKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with `admin_keys`, one a line: they may change it."),
]
_Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML with the fields of the configuration; flags win."),
]
# The fields that have a flag, in the order of --help, and what their options have beside the rest.
_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "DIR"},
    "adapters": {"metavar": "NAME=PATH"},
    "replicas": {},
    "port": {},
    "host": {},
    "device": {},
    "dtype": {},
    "served_model_name": {"metavar": "NAME"},
    "adapter_roots": {"metavar": "DIR"},
    "adapter_sources": {"metavar": "DIR"},
    "adapter_memory": {"metavar": "SIZE"},
    "host_memory": {"metavar": "SIZE"},
    "kv_memory": {"metavar": "SIZE"},
    "device_memory": {"metavar": "SIZE"},
    "rank_max": {},
    "slots_max": {},
    "context_tokens_max": {},
    "batch_rows_max": {},
    "queue_max": {},
    "allowed_origins": {"metavar": "ORIGIN"},
    "strict_fields": {},
    "request_log": {"metavar": "FILE"},
    "default_is_base": {},
    "tool_parser": {},
    "fair_share": {},
    "threads": {},
    "tensor_parallel": {},
    "redis_url": {"metavar": "URL", "envvar": "LORAFLEET_REDIS_URL"},
    "directory": {"metavar": "DIR"},
    "adapter_disk": {"metavar": "SIZE"},
}

# What others call a field.
_ALIASES = {
    "context_tokens_max": "--max-model-len",
    "allowed_origin": "--allowed-origins",
    "tool_parser": "--tool-call-parser",
}

Command = Callable[[Mapping[str, Any]], None]


def with_flags(*without: str) -> Callable[[Command], Callable[..., None]]:
    """Gives a command --config and a flag for each field in `_OPTIONS` that is not in `without`.

    The command gets all of them. None: not given, so the configuration's default holds.
    """
    made = {**_flags(EngineConfig), **_flags(FleetConfig)}
    flags = [made[name] for name in _OPTIONS if name not in without]
    flags.append(_parameter("api_key_file", _KeyFile))
    flags.append(_parameter("api_key", _Keys))
    flags.append(_parameter("admin_key_file", _AdminKeyFile))
    flags.append(_parameter("config", _Config))

    def decorate(command: Command) -> Callable[..., None]:
        @wraps(command)
        def called(**given: Any) -> None:
            command(given)

        called.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        return called

    return decorate


def documentation(config: type) -> dict[str, str]:
    """Field → the string literal right below it in the source."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for pair in pairwise(tree.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found


def _flags(config: type) -> dict[str, inspect.Parameter]:
    hints, documented = typing.get_type_hints(config), documentation(config)
    return {
        field.name: _flag(field, hints[field.name], documented.get(field.name, ""))
        for field in fields(config)
        if field.name in _OPTIONS
    }


def _flag(field: "Field[Any]", hint: Any, text: str) -> inspect.Parameter:
    """Sizes and choices are text here: what is wrong with them the configuration says."""
    name, kind = field.name, hint
    if isinstance(kind, UnionType):
        (kind,) = (member for member in typing.get_args(kind) if member is not NoneType)
    if name.endswith(SIZES) or typing.get_origin(kind) is Literal:
        kind = str
    if typing.get_origin(kind) in (tuple, Mapping):
        name, kind = name.removesuffix("s"), list[str]
        text += " Repeat it for more."
    elif kind is not bool and field.default not in (MISSING, None):
        text += f" Default: {field.default}."
    names, beside = [f"--{name.replace('_', '-')}"], _OPTIONS[field.name]
    if name in _ALIASES:
        names.append(_ALIASES[name])
    if kind is bool:
        beside = {**beside, "metavar": " "}  # it takes no value
    option = typer.Option(*names, help=text.strip(), **beside)
    return _parameter(name, Annotated[kind | None, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)

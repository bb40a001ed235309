"""Reads a configuration from plain values, and rejects unknown keys and wrong types."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from cluster.config import EngineConfig, FleetConfig
from cluster.errors import ConfigError

# Ends of the names of fields in bytes, which may be given as '64MiB'.
SIZES = ("_memory", "_disk")
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

Config = TypeVar("Config")


def parse_bytes(text: str, field: str) -> int:
    """'64MiB' → 67108864. A bare number is bytes. Raises ConfigError naming the field."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{field}: {text!r} is not a size such as 64MiB or 2GiB", field=field)
    return int(float(match[1]) * _UNITS[match[2].lower()])


def load(kind: type[Config], data: Mapping[str, Any], where: str = "") -> Config:
    """Builds a frozen dataclass from parsed YAML or JSON.

    Fields whose name ends in `_memory` or `_disk` accept sizes such as '64MiB'. Unknown keys and
    wrong types raise ConfigError naming the key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'configuration'}: {data!r} is not a mapping", field=where)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ConfigError(f"{path}: unknown key ({_nearest(kind, key)})", field=path)
        if key.endswith(SIZES) and isinstance(value, str):
            value = parse_bytes(value, path)
        values[key] = _check(hints[key], value, path)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        path = f"{where}.{missing[0]}" if where else missing[0]
        raise ConfigError(f"{path}: required", field=path)
    return kind(**values)


def _nearest(kind: type, key: str) -> str:
    """What may have been meant by an unknown key of this configuration."""
    own = [field.name for field in dataclasses.fields(kind)]
    inner = [field.name for field in dataclasses.fields(EngineConfig)]
    if kind is FleetConfig and key in inner:
        return f"did you mean engine.{key}?"
    if kind is EngineConfig and key in {field.name for field in dataclasses.fields(FleetConfig)}:
        return f"did you mean {key}, outside of engine?"
    close = difflib.get_close_matches(str(key), own, 1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(own))}"


def _check(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _check(hint, value, path)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise ConfigError(
                f"{path}: {value!r} is not one of {', '.join(map(str, args))}", field=path
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: {value!r} is not a list", field=path)
        return tuple(_check(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {value!r} is not a mapping", field=path)
        return {str(k): _check(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return load(hint, value, path)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: {value!r} is not of type {hint.__name__}", field=path)
    return value

"""Reads single fields of a checkpoint's `config.json`, without torch."""

import math
from collections.abc import Mapping
from typing import Any

from cluster.errors import ModelUnsupported


def integer(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A positive integer. The default, if given, also replaces null."""
    value = _given(config, name, where, default)
    if not is_integer(value) or value < 1:
        raise wrong(where, name, value, "a positive integer")
    return int(value)


def number(config: Mapping[str, Any], name: str, where: str, default: float | None = None) -> float:
    """A positive number. The default, if given, also replaces null."""
    value = _given(config, name, where, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise wrong(where, name, value, "a positive number")
    return float(value)


def _given(config: Mapping[str, Any], name: str, where: str, default: float | None) -> Any:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if name not in config:
        raise ModelUnsupported(f"{where}: no {name!r}", field="model")
    return value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def wrong(where: str, name: str, value: Any, wanted: str) -> ModelUnsupported:
    return ModelUnsupported(f"{where}: {name} {value!r} is not {wanted}", field="model")

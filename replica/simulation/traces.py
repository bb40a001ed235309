"""Recorded arrivals: when each request came, and its lengths. Text in, values out.

The columns tell two formats apart:

- Azure's LLM inference traces, CSV: TIMESTAMP, ContextTokens, GeneratedTokens.
- Mooncake's traces, JSON lines: timestamp (ms), input_length, output_length and, if prompts share
  prefixes, hash_ids (one for each 512 tokens).
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from cluster.errors import ConfigError

# Prompt tokens that one of Mooncake's hash ids stands for.
BLOCK_TOKENS = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Recorded:
    """at_s: since any fixed time. blocks: ids of the prompt's parts, BLOCK_TOKENS tokens each."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(lines: Iterable[str], where: str) -> list[Recorded]:
    """Requests in order of time. Those with an empty prompt or output are left out.

    where: names the file in the ConfigError of a malformed line.
    """
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    columns: list[str] | None = None
    if numbered and not numbered[0][1].startswith("{"):
        n, header = numbered.pop(0)
        columns = _columns(header, f"{where}, line {n}")
    if not numbered:
        raise ConfigError(f"{where}: no requests", field="arrivals.trace")
    recorded = [_read(line, columns, f"{where}, line {n}") for n, line in numbered]
    answered = [r for r in recorded if r.prompt_tokens > 0 and r.output_tokens > 0]
    return sorted(answered, key=lambda request: request.at_s)


def _columns(header: str, where: str) -> list[str]:
    columns = header.split(",")
    for name in _AZURE:
        if name not in columns:
            raise ConfigError(
                f"{where}: no column {name} in {header[:80]!r}", field="arrivals.trace"
            )
    return columns


def _read(line: str, columns: list[str] | None, where: str) -> Recorded:
    """columns: None for JSON."""
    try:
        return _mooncake(line) if columns is None else _azure(line, columns)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", field="arrivals.trace") from error


def _azure(line: str, columns: list[str]) -> Recorded:
    cells = next(csv.reader([line]))
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} columns, but the first line has {len(columns)}")
    row = dict(zip(columns, cells, strict=True))
    at = _column(row, "TIMESTAMP", "a date and time", datetime.fromisoformat)
    if at.tzinfo is None:
        # Local time would jump within a trace where daylight saving starts or ends.
        at = at.replace(tzinfo=UTC)
    prompt = _column(row, "ContextTokens", "a whole number", int)
    return Recorded(at.timestamp(), prompt, _column(row, "GeneratedTokens", "a whole number", int))


def _mooncake(line: str) -> Recorded:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{line[:80]!r} is not a JSON object")
    return Recorded(
        _column(row, "timestamp", "a number", _finite) / 1e3,
        _column(row, "input_length", "a whole number", _whole),
        _column(row, "output_length", "a whole number", _whole),
        _column({"hash_ids": [], **row}, "hash_ids", "a list of whole numbers", _wholes),
    )


def _column(row: Mapping[str, Any], name: str, kind: str, convert: Callable[[Any], Value]) -> Value:
    """kind: what `convert` accepts, in words."""
    if name not in row:
        raise ValueError(f"no column {name}")
    try:
        return convert(row[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {row[name]!r} is not {kind}") from error


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _wholes(values: list[object]) -> tuple[int, ...]:
    return tuple(map(_whole, values))

"""Recorded arrivals: when each request came, and how long it was. Text in, values out.

Two formats are known by their columns:

- Azure's LLM inference traces, CSV: TIMESTAMP, ContextTokens, GeneratedTokens.
- Mooncake's traces, JSON lines: timestamp (ms), input_length, output_length and, where prompts
  share their beginnings, hash_ids (one for each 512 tokens).
"""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.errors import ConfigError

# Tokens of a prompt that one of Mooncake's hash ids stands for.
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Recorded:
    """at_s: since any fixed time. blocks: names of the prompt's parts, BLOCK_TOKENS each."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(lines: Iterable[str], where: str) -> list[Recorded]:
    """In order of time; requests that were answered with nothing are left out.

    where: names the file in the ConfigError that a line raises which is not as it should be.
    """
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{where}: no requests", field="arrivals.trace")
    columns: list[str] | None = None
    if not numbered[0][1].startswith("{"):
        columns = next(csv.reader([numbered.pop(0)[1]]))
    recorded = [_read(line, columns, f"{where}, line {n}") for n, line in numbered]
    answered = [r for r in recorded if r.prompt_tokens > 0 and r.output_tokens > 0]
    return sorted(answered, key=lambda request: request.at_s)


def _read(line: str, columns: list[str] | None, where: str) -> Recorded:
    """columns: None of JSON."""
    try:
        if columns is None:
            return _mooncake(json.loads(line))
        return _azure(dict(zip(columns, next(csv.reader([line])), strict=True)))
    except KeyError as error:
        raise ConfigError(f"{where}: no column {error}", field="arrivals.trace") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}", field="arrivals.trace") from error


def _azure(row: Mapping[str, str]) -> Recorded:
    at = datetime.fromisoformat(row["TIMESTAMP"][:26])  # it has more digits than there are of a µs
    return Recorded(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(row: Mapping[str, Any]) -> Recorded:
    return Recorded(
        row["timestamp"] / 1e3,
        int(row["input_length"]),
        int(row["output_length"]),
        tuple(map(int, row.get("hash_ids", ()))),
    )

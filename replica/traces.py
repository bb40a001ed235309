"""Recorded arrivals: when each request came, and how long it was. Text in, values out.

Two formats are known by their columns:

- Azure's LLM inference traces, CSV: TIMESTAMP, ContextTokens, GeneratedTokens.
- Mooncake's traces, JSON lines: timestamp (ms), input_length, output_length and, where prompts
  share their beginnings, hash_ids (one for each 512 tokens).
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from cluster.errors import ConfigError

# Tokens of a prompt that one of Mooncake's hash ids stands for.
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Recorded:
    """at_s: since any fixed time. blocks: names of the prompt's beginnings, BLOCK_TOKENS each."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(lines: Iterable[str], where: str) -> list[Recorded]:
    """In order of time. where: names the file in the ConfigError that a bad line raises."""
    numbered = ((n, line.strip()) for n, line in enumerate(lines, 1))
    filled = [(n, line) for n, line in numbered if line]
    if not filled:
        raise ConfigError(f"{where}: no requests", field="arrivals.trace")
    read = _mooncake if filled[0][1].startswith("{") else _azure
    recorded = []
    number = filled[0][0]
    try:
        for number, request in read(filled):
            if request.prompt_tokens < 1 or request.output_tokens < 1:
                continue  # some of Azure's requests were answered with nothing
            recorded.append(request)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{where}: near line {number}: {what}", field="arrivals.trace") from error
    return sorted(recorded, key=lambda request: request.at_s)


def _azure(lines: list[tuple[int, str]]) -> Iterator[tuple[int, Recorded]]:
    for (number, _), row in zip(lines[1:], csv.DictReader(line for _, line in lines), strict=False):
        yield (
            number,
            Recorded(
                datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            ),
        )


def _mooncake(lines: list[tuple[int, str]]) -> Iterator[tuple[int, Recorded]]:
    for number, line in lines:
        row = json.loads(line)
        yield (
            number,
            Recorded(
                row["timestamp"] / 1e3,
                row["input_length"],
                row["output_length"],
                tuple(row.get("hash_ids", ())),
            ),
        )

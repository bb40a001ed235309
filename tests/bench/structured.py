"""Answers under JSON schemas: how many are valid, and what constrained rows cost a step.

Run with `python -m tests.bench.structured`. Random weights and a byte-level tokenizer: the grammar
alone makes an answer valid. The compared batches take turns step by step in one process.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema

from cluster.config import EngineConfig
from replica.api.structured import checked, json_grammar
from replica.api.text import Text
from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.decode import MODEL
from tests.models import make_model

PROMPT = tuple(range(6, 70))
TOKENS_MAX = 1000


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Of the keywords that people use in structured output; every string and array is bounded."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "format", "pattern"]
    if depth:
        kinds += ["object", "object", "array", "anyOf"]
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(["red", "green", 7, None, True, "ä"], rng.randint(1, 4))}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{2,6}$", r"^\d{3}-\d{2}$"])}
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 12)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": 1}
        case "object":
            names = [f"f{i}" for i in range(rng.randint(0, 5))]
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.6],
                "additionalProperties": False,
            }
        case "array":
            return {
                "type": "array",
                "items": random_schema(rng, depth - 1),
                "minItems": rng.randint(0, 1),
                "maxItems": rng.randint(1, 3),
            }
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}


def answers(directory: Path, count: int, seed: int, plan_depth: int) -> tuple[int, list[str]]:
    """How many of `count` answers to random schemas are valid, and what is wrong with others."""
    model = make_model(directory / "tiny", max_position_embeddings=2048)
    text, rng = Text.read(model), random.Random(seed)
    engine = Engine(EngineConfig(model, threads=1, seed=0, plan_depth=plan_depth))
    schemas = {f"r{n}": random_schema(rng) for n in range(count)}
    for name, schema in schemas.items():
        grammar = checked("schema", json_grammar(schema))
        sampling = Sampling(max_tokens=TOKENS_MAX, temperature=1.0, grammar=grammar)
        engine.add(NewRequest(name, PROMPT, sampling))
    tokens: dict[str, list[int]] = {name: [] for name in schemas}
    wrong = []
    while engine.has_work:
        for delta in engine.step():
            if delta.error is not None:
                wrong.append(f"{schemas[delta.request_id]}: {delta.error}")
            tokens[delta.request_id] += delta.tokens
    engine.close()
    for name, schema in schemas.items():
        answer = text.decode(tokens[name])
        try:
            jsonschema.validate(json.loads(answer), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{schema}: {answer!r}: {type(error).__name__}")
    return count - len(wrong), wrong


def step_times(directory: Path, rows: int, steps: int, rounds: int) -> dict[int, float]:
    """Constrained rows of a batch of `rows` → median step, in ms."""
    model = make_model(directory / "model", **MODEL)
    grammar = json_grammar({"type": "array", "items": {"type": "string"}})
    counts = (0, 1, rows)
    engines = {}
    for count in counts:
        engine = Engine(EngineConfig(model, batch_rows_max=rows, seed=0, plan_depth=1))
        for n in range(rows):
            sampling = Sampling(
                max_tokens=TOKENS_MAX,
                temperature=1.0,
                seed=n,
                ignore_eos=True,
                grammar=grammar if n < count else None,
                logit_bias=((1, -100.0),) if n < count else (),  # it goes on and on
            )
            engine.add(NewRequest(f"r{n}", PROMPT, sampling))
        while engine.report().queued_tokens:
            engine.step()
        engines[count] = engine
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds * steps):
        for count, engine in engines.items():
            start_s = time.perf_counter()
            engine.step()
            times[count].append(time.perf_counter() - start_s)
    for engine in engines.values():
        engine.close()
    return {count: statistics.median(each) * 1e3 for count, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for plan_depth in (1, 2):
            valid, wrong = answers(
                Path(directory) / str(plan_depth), args.schemas, args.seed, plan_depth
            )
            print(f"plan depth {plan_depth}: {valid} of {args.schemas} answers are valid")
            print(*wrong[:10], sep="\n", end="\n" if wrong else "")
        times = step_times(Path(directory), args.rows, args.steps, args.rounds)
    base = times[0]
    print("| constrained rows of 32 | ms a step | against none |\n|---|---|---|")
    for count, ms in times.items():
        print(f"| {count} | {ms:.2f} | {ms / base:.3f} |")


if __name__ == "__main__":
    main()

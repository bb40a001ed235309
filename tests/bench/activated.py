"""A conversation of eight turns over the base model and three adapters, each in its turn: what is
computed and how long the first token takes, with plain adapters and with activated ones.

    python -m tests.bench.activated [--message-tokens N] [--answer-tokens N]

An activated adapter changes only what follows its invocation, so it goes on from the base model's
keys and values of all that was said before; a plain one computes all of it with its own. Both kinds
have the same weights. The log-probabilities of all answers are compared with transformers and PEFT,
in float32.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config import EngineConfig
from cluster.values import Version
from replica.adapters.adapter_files import inspect
from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from tests.bench.decode import MODEL
from tests.models import make_adapter, make_model
from tests.packed import reference

NAMES = (None, "a", "b", "c")
TURNS = 8
CALL = (7, 300, 9)
RANK = 16
VOCAB_FROM, VOCAB_TO = 10, 290  # no special token, and none of CALL's 300
COMPARED = 20  # log-probabilities a token


@dataclass(frozen=True, slots=True)
class Turn:
    """difference: the largest one of its answer's log-probabilities from PEFT's."""

    name: str | None
    prompt_tokens: int
    computed: int
    ttft_s: float
    difference: float


class Speaker:
    """An engine with three adapters of one kind."""

    def __init__(self, directory: Path, model: str, activated: bool) -> None:
        calls = {"alora_invocation_tokens": list(CALL)} if activated else {}
        self._model = model
        self._paths = {
            name: make_adapter(directory / name, model, rank=RANK, seed=seed, **calls)
            for seed, name in enumerate(NAMES)
            if name is not None
        }
        self.engine = Engine(EngineConfig(model, device="cpu", dtype="float32", kv_memory=2**30))
        self._digests: dict[str | None, str | None] = {None: None}
        for name, path in self._paths.items():
            info = inspect(path, self.engine.shape, RANK)
            size = info.rank, info.parameters
            self.engine.register(
                Version(name, info.digest, path, *size, invocation=info.invocation), path
            )
            self._digests[name] = info.digest

    def answer(
        self, name: str | None, prompt: Sequence[int], tokens: int
    ) -> tuple[Turn, list[int]]:
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=COMPARED)
        started_s, first_s, cached = time.monotonic(), 0.0, 0
        said: list[int] = []
        told: list[dict[int, float]] = []
        self.engine.add(NewRequest("turn", tuple(prompt), sampling, self._digests[name]))
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None, delta.error
                if delta.tokens and not said:
                    first_s, cached = time.monotonic() - started_s, delta.cached_tokens
                said += delta.tokens
                told += [dict(each.top) for each in delta.logprobs]
        path = None if name is None else self._paths[name]
        wanted = reference(self._model, path, [*prompt, *said[:-1]])[len(prompt) - 1 :]
        difference = max(
            abs(value - float(right[token]))
            for own, right in zip(told, wanted, strict=True)
            for token, value in own.items()
        )
        return Turn(name, len(prompt), len(prompt) - cached, first_s, difference), said


def converse(speaker: Speaker, message: int, answer: int, seed: int) -> list[Turn]:
    rng = random.Random(seed)
    history: list[int] = []
    turns = []
    for n in range(TURNS):
        name = NAMES[n % len(NAMES)]
        history += [rng.randrange(VOCAB_FROM, VOCAB_TO) for _ in range(message)]
        history += CALL if name is not None else ()
        turn, said = speaker.answer(name, history, answer)
        history += said
        turns.append(turn)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--message-tokens", type=int, default=460)
    parser.add_argument("--answer-tokens", type=int, default=48)
    args = parser.parse_args()
    length = TURNS * (args.message_tokens + len(CALL) + args.answer_tokens)
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", **MODEL | {"max_position_embeddings": length})
        found: dict[str, list[Turn]] = {}
        for kind in ("plain", "activated"):
            speaker = Speaker(Path(directory) / kind, model, kind == "activated")
            with closing(speaker.engine):
                converse(speaker, 32, 2, seed=1)  # warms up
                found[kind] = converse(speaker, args.message_tokens, args.answer_tokens, seed=2)
    print("| turn | by | prompt | computed, plain | activated | TTFT, plain | activated |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for n, (plain, activated) in enumerate(zip(*found.values(), strict=True), start=1):
        print(
            f"| {n} | {plain.name or 'base'} | {plain.prompt_tokens:,} | {plain.computed:,} | "
            f"{activated.computed:,} | {plain.ttft_s:.2f} s | {activated.ttft_s:.2f} s |"
        )
    computed = {kind: sum(turn.computed for turn in turns) for kind, turns in found.items()}
    ttft = {kind: statistics.mean(t.ttft_s for t in turns) for kind, turns in found.items()}
    print(
        f"| all | | | {computed['plain']:,} | {computed['activated']:,} | "
        f"{ttft['plain']:.2f} s | {ttft['activated']:.2f} s |"
    )
    worst = max(turn.difference for turns in found.values() for turn in turns)
    print(f"\nlargest difference from PEFT's log-probabilities: {worst:.1e}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

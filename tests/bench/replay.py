"""Replays arrivals on a real engine in real time, as the simulator does on a virtual clock."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from replica.engine.engine import Engine
from replica.scheduling.request import NewRequest, Sampling
from replica.simulation.simulator import RequestStats
from replica.simulation.workloads import Arrival


@dataclass(slots=True)
class Replay:
    """records: one an arrival; times are seconds since the replay's start. tokens: each one's."""

    records: list[RequestStats] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


def replay(
    engine: Engine,
    woken: threading.Event,
    arrivals: Sequence[Arrival],
    prompts: Sequence[tuple[int, ...]],
    digests: Mapping[str | None, str | None],
) -> Replay:
    """Returns when all requests have ended. Raises the error of the first one that fails.

    woken: set by the engine's `wake`. prompts: one an arrival. digests: adapter name → digest.
    """
    run = Replay([RequestStats(arrival) for arrival in arrivals], [[] for _ in arrivals])
    start_s = time.monotonic()
    coming = 0
    while coming < len(arrivals) or engine.has_work:
        now_s = time.monotonic() - start_s
        while coming < len(arrivals) and arrivals[coming].at_s <= now_s:
            arrival = arrivals[coming]
            sampling = Sampling(max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True)
            digest = digests[arrival.adapter]
            engine.add(NewRequest(str(coming), prompts[coming], sampling, digest))
            coming += 1
        woken.clear()
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            index = int(delta.request_id)
            run.records[index].token(time.monotonic() - start_s)
            run.tokens[index] += delta.tokens
        if engine.idle:
            due_s = arrivals[coming].at_s if coming < len(arrivals) else now_s + 1.0
            wake_s = engine.wake_s - start_s if engine.wake_s is not None else due_s
            woken.wait(max(min(due_s, wake_s) - (time.monotonic() - start_s), 0.0))
    return run

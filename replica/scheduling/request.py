"""One request's life.

             ┌──────── preempted ───────┐
             v                          │
  ──> WAITING ────── admitted ─────> RUNNING ── last token ──> FINISHED
             ^                       ^  │
             │              resumed  │  │ parked
             │                       │  v
             └── pages dropped ───── PARKED

WAITING: has no pages. RUNNING: holds pages and a row of the batch. PARKED: holds pages, but its
adapter has left the device. From each of the three it may also become CANCELLED or FAILED, or
FINISHED: the step in flight when it left the batch may have had its last token. These three are
final: a request reaches exactly one of them, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from cluster.errors import FleetError


class Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED})

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: ENDED | {Phase.RUNNING},
    Phase.RUNNING: ENDED | {Phase.WAITING, Phase.PARKED},
    Phase.PARKED: ENDED | {Phase.RUNNING, Phase.WAITING},
    Phase.FINISHED: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
}


class Finish(StrEnum):
    """Why a request ended well, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Ranges are checked where the request enters (`server.py`).

    temperature: 0 is greedy. top_k: 0 is off. seed: None lets the engine draw one.
    stop_tokens: ids that end the request besides the model's own end-of-sequence ids.
    ignore_eos: the model's end-of-sequence ids do not end it.
    min_tokens: no end-of-sequence or stop token before this many were generated.
    logprobs: how many alternatives to report a token; None reports nothing, 0 only the chosen one.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What enters the engine.

    digest: the adapter's version, None for the base model. priority: lower goes first, as in vLLM.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    digest: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms. token: the chosen one. top: (token, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampled(NamedTuple):
    """What the batch gave a row that was to sample."""

    token: int
    logprobs: TokenLogprobs | None = None


class Delta(NamedTuple):
    """What one step gave one request. The last delta of a request has `finish` or `error`.

    A tuple, for one is made for each row and step. logprobs: one a token when the request asked for
    them, else empty. cached_tokens: prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    error: FleetError | None = None
    cached_tokens: int = 0

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(slots=True)
class Request:
    """A request inside the engine; only the scheduler changes it.

    place: the adapter it needs on the device; None when it needs none. stops: tokens that end it,
    once it has its `min_tokens`. tokens_max: prompt + output when it ends by length.

    What was planned is counted before it has committed (`flight.py`): tokens: length of prompt +
    output, with a token that a step in flight will give. computed: those of them whose keys and
    values lie in `pages` when that step has committed. step: the last step that has a row of it.
    lost: up to which token it was computed when it last gave its pages up.

    cached: prompt tokens that were found in the prefix cache when it began. published: full pages
    that others can find; link: names the last of them. slot: its adapter's, while it runs.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    digest: str | None
    adapter_key: str | None
    priority: int
    arrived_s: float
    phase: Phase = Phase.WAITING
    output: list[int] = field(default_factory=list)
    stops: frozenset[int] = frozenset()
    tokens_max: int = 0
    tokens: int = field(init=False)
    computed: int = 0
    step: int = 0
    lost: int = 0
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    published: int = 0
    link: str | int | None = None
    slot: int = 0

    def __post_init__(self) -> None:
        self.tokens = len(self.prompt) + len(self.output)

    @property
    def begun(self) -> bool:
        """It has a token, or a step in flight will give it one."""
        return self.tokens > len(self.prompt)

    @property
    def remaining(self) -> int:
        """Upper bound of the tokens still to be generated."""
        return self.sampling.max_tokens - len(self.output)

    def slice(self, start: int, end: int) -> Sequence[int]:
        """Tokens [start, end) of prompt + output; all of them must be known."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        if start >= split:
            return self.output[start - split : end - split]
        return [*self.prompt[start:], *self.output[: end - split]]

    def become(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.id}: {self.phase} cannot become {phase}"
        self.phase = phase

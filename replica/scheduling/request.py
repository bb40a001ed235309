"""One request's life.

             ┌──────── preempted ───────┐
             v                          │
  ──> WAITING ────── admitted ─────> RUNNING ── last token ──> FINISHED
             ^                       ^  │
             │              resumed  │  │ parked
             │                       │  v
             └── pages dropped ───── PARKED

    WAITING    has no pages
    RUNNING    holds pages and a row of the batch
    PARKED     holds pages, but its adapter left the device

From each of the three it may also become CANCELLED, FAILED, or FINISHED: a step in flight may yield
its last token after it left the batch. These three are final: a request reaches exactly one of
them, once.
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
    """How tokens are chosen. The API checks the ranges.

    temperature: 0 is greedy.
    top_k: 0 is off.
    seed: None lets the engine draw one.
    stop_tokens: ids that end the request besides the model's own end-of-sequence ids.
    ignore_eos: the model's end-of-sequence ids do not end the request.
    min_tokens: generate at least this many before an end-of-sequence or stop token may end it.
    logprobs: alternatives to report per token; 0 reports the chosen token only, None nothing.
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

    digest: the adapter's version; None for the base model. priority: lower goes first, as in vLLM.
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
    """The token chosen for a row. finite: False if the logits are not, and the token is any."""

    token: int
    logprobs: TokenLogprobs | None = None
    finite: bool = True


class Delta(NamedTuple):
    """What one step yields for one request. The last delta has `finish` or `error`.

    A tuple for speed: one is made for each row and step.
    logprobs: one per token if the request asked for them, else empty.
    cached_tokens: prompt tokens found in the prefix cache; set on the first delta.
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
    """A request inside the engine. Only the scheduler changes it.

    adapter_key: what it needs in the adapter cache; None if nothing.
    stops: tokens that end it, once it has `min_tokens`.
    tokens_max: prompt + output when it ends by length.
    tokens: prompt + output, with the token that a step in flight will yield.
    computed: how many of these have keys and values in `pages` once that step has committed.
    step: the last step that has a row of it.
    lost: how many tokens were computed when it last gave up its pages.
    cached: prompt tokens found in the prefix cache at its start.
    published: full pages that other requests can match.
    link: identifies the last of these.
    slot: its adapter's, while it runs.

    `tokens`, `computed` and `step` count planned steps before they commit (`in_flight.py`).
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
        """It has a token, or a step in flight will yield one."""
        return self.tokens > len(self.prompt)

    @property
    def remaining(self) -> int:
        """Upper bound on the tokens still to generate."""
        return self.sampling.max_tokens - len(self.output)

    def slice(self, start: int, end: int) -> Sequence[int]:
        """Tokens [start, end) of prompt + output. All of them must be known."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        if start >= split:
            return self.output[start - split : end - split]
        return [*self.prompt[start:], *self.output[: end - split]]

    def become(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.id}: {self.phase} cannot become {phase}"
        self.phase = phase

"""One request's life.

             ┌─────── pages lost ───────┐
             v                          │
  ──> WAITING ────── admitted ─────> RUNNING ── last token ──> FINISHED
             ^                       ^  │
             │              resumed  │  │ parked, or pages copied to the host
             │                       │  v
             └── pages dropped ───── PARKED

    WAITING    has no pages
    RUNNING    holds pages and a row of the batch
    PARKED     keeps its pages without a row, on the device or in host memory (`page_copies.py`)

From each of the three it may also become CANCELLED, FAILED, or FINISHED: a step in flight may yield
its last token after it left the batch. These three are final: a request reaches exactly one of
them, once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self

from cluster.errors import FleetError
from replica.scheduling.pages import Fork, Prefix, Root


class Phase(StrEnum):
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
    min_p: least probability of a token, as a share of the most probable one's; 0 is off.
    repetition_penalty: divides the logits, or multiplies negative ones, of all tokens in the prompt
    and the output; 1 is off. presence_penalty is subtracted once from the logit of each token in
    the output, frequency_penalty once an occurrence.
    logit_bias: (token, number to add to its logit). allowed_tokens: the only ones; None allows all.
    bad_words: sequences of tokens that must not be completed. grammar: what the output must match,
    in llguidance's form.
    prompt_logprobs: as `logprobs`, for the prompt's tokens. embeds: report the state of the last
    token of the prompt.
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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    prompt_logprobs: int | None = None
    embeds: bool = False

    @property
    def asks_of_prompt(self) -> bool:
        return self.prompt_logprobs is not None or self.embeds

    @property
    def penalizes(self) -> bool:
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0)

    @property
    def looks_back(self) -> bool:
        """The next token depends on earlier tokens not only through the model."""
        return self.penalizes or bool(self.bad_words)

    @property
    def adjusts(self) -> bool:
        """It changes logits before temperature, top-k, top-p and min-p."""
        restricts = self.allowed_tokens is not None or self.grammar is not None
        return restricts or self.looks_back or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What enters the engine.

    digest: the adapter's version; None for the base model. priority: lower goes first, as in vLLM.
    salt: cached prefixes are shared with this salt only.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    digest: str | None = None
    priority: int = 0
    salt: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms. token: the chosen one. top: (token, logprob), best first. rank: how many
    tokens are at least as likely; only for tokens of a prompt.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What `Sampling` asks of a prompt, or of a part of it.

    logprobs: of its tokens in order, without the first, which follows nothing. embedding: the last
    token's state after the last norm, as little-endian float32.
    """

    logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None


class Sampled(NamedTuple):
    """The token chosen for a row. finite: False if the logits are not, and the token is any.
    allowed: False if the request's parameters allow none, and the token is any.
    """

    token: int
    logprobs: TokenLogprobs | None = None
    finite: bool = True
    allowed: bool = True


class Delta(NamedTuple):
    """What one step yields for one request. The last delta has `finish` or `error`.

    logprobs: one per token if the request asked for them, else empty.
    cached_tokens: prompt tokens found in the prefix cache; set on the first delta.
    queued_s: from the request's arrival to its first row; set on the first delta.
    prompt: set on the first delta, if the request asked for it.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    error: FleetError | None = None
    cached_tokens: int = 0
    queued_s: float = 0.0
    prompt: PromptResult | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(slots=True)
class Outputs:
    """What a step yields. Iterates over all of it as deltas.

    tokens: (request id, token), of the rows that yield nothing else. These are nearly all, so they
    stay small until they are where their readers are. They come before the deltas, of which one may
    be a request's last.
    """

    deltas: list[Delta] = field(default_factory=list)
    tokens: list[tuple[str, int]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Delta]:
        for request_id, token in self.tokens:
            yield Delta(request_id, (token,))
        yield from self.deltas

    def __iadd__(self, more: Self) -> Self:
        self.deltas += more.deltas
        self.tokens += more.tokens
        return self

    def __bool__(self) -> bool:
        return bool(self.deltas or self.tokens)


@dataclass(slots=True)
class Request:
    """A request inside the engine. Only the scheduler changes it.

    adapter_key: what it needs in the adapter cache; None if nothing.
    stops: tokens that end it, once it has `min_tokens`.
    tokens_max: prompt + output when it ends by length.
    tokens: prompt + output, with the token that a step in flight will yield.
    computed: how many of these have keys and values once that step has committed.
    step: the last step that has a row of it.
    lost: how many tokens were computed when it last gave up its pages.
    pages: on the device, in the order of its tokens.
    host_pages: in host memory.
    copying: the copy between these two, until it is done.
    back_at: what was computed when its pages last came back.
    cached: prompt tokens found in the prefix cache at its start.
    published: full pages that other requests can match.
    link: identifies the last of these.
    prefix: what the prefix cache had for it when it last found too few pages.
    slot: its adapter's, while it runs.
    base_tokens: how many at the start of its prompt the base model computes (`activation.py`).
    decodes_until: a row of this many tokens is a decode row, and needs no page. quiet_until: up to
    this many tokens, one that commits fills no page, and its token is not the last by length. Both
    spare a step the closer look, and are 0 if it takes one.
    stepwise: a row is planned only once its last token is known, since a grammar decides what may
    follow it.

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
    admitted_s: float | None = None
    first_s: float | None = None
    stops: frozenset[int] = frozenset()
    tokens_max: int = 0
    tokens: int = field(init=False)
    computed: int = 0
    step: int = 0
    lost: int = 0
    pages: list[int] = field(default_factory=list)
    host_pages: list[int] = field(default_factory=list)
    copying: int | None = None
    back_at: int = -1
    cached: int = 0
    published: int = 0
    link: Root | int = None
    prefix: Prefix | None = None
    slot: int = 0
    stepwise: bool = False
    salt: str | None = None
    base_tokens: int = 0
    decodes_until: int = 0
    quiet_until: int = 0

    def __post_init__(self) -> None:
        self.tokens = len(self.prompt) + len(self.output)

    @property
    def root(self) -> Root:
        """What its cached prefix begins with."""
        digest = None if self.base_tokens else self.digest
        return digest if self.salt is None else (digest, self.salt)

    def fork(self, page_tokens: int) -> Fork | None:
        if not self.base_tokens or self.digest is None:
            return None
        return Fork(self.base_tokens // page_tokens, (self.digest, self.base_tokens))

    @property
    def begun(self) -> bool:
        """It has a token, or a step in flight will yield one."""
        return self.tokens > len(self.prompt)

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

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
        self.decodes_until = self.quiet_until = 0

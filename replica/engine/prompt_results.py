"""What requests asked of their prompts, put together from the parts that steps yield.

Parts are kept by position: a prompt that lost its pages is computed again, to the same effect.
"""

from collections.abc import Mapping, Sequence

from cluster.errors import BadRequest
from replica.model.launch import Asked
from replica.scheduling.plan import Work
from replica.scheduling.request import Delta, NewRequest, PromptResult, Request, TokenLogprobs


class PromptResults:
    """Of each request until its first token. supported: False refuses all."""

    def __init__(self, supported: bool) -> None:
        self._supported = supported
        self._logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self._embeddings: dict[str, bytes] = {}

    def check(self, new: NewRequest) -> None:
        """Raises BadRequest."""
        if not self._supported and new.sampling.asks_of_prompt:
            field = "input" if new.sampling.embeds else "prompt_logprobs"
            raise BadRequest(
                f"{field}: this architecture yields no log-probabilities of prompts, and no "
                f"embeddings",
                field=field,
            )

    def add(self, request: Request) -> None:
        if request.sampling.asks_of_prompt:
            scores = request.sampling.prompt_logprobs is not None
            self._logprobs[request.id] = [None] * (len(request.prompt) - 1 if scores else 0)

    def asked(self, request: Request, start: int, end: int, sample: bool) -> Asked | None:
        """What the row that computes tokens [start, end) tells."""
        if request.id not in self._logprobs:
            return None
        top = request.sampling.prompt_logprobs
        following = () if top is None else request.prompt[start + 1 : end + 1]
        embeds = request.sampling.embeds and sample
        return Asked(following, top or 0, embeds) if following or embeds else None

    def take(self, rows: Sequence[Work], found: Mapping[int, PromptResult]) -> None:
        """found: by row, what a step has yielded."""
        for row, part in found.items():
            request, start = rows[row].request, rows[row].start
            if request.id not in self._logprobs:
                continue  # it has ended meanwhile
            self._logprobs[request.id][start : start + len(part.logprobs)] = part.logprobs
            if part.embedding is not None:
                self._embeddings[request.id] = part.embedding

    def join(self, deltas: list[Delta]) -> list[Delta]:
        """The same deltas, and first ones with what their requests asked."""
        return [self._joined(delta) for delta in deltas] if self._logprobs else deltas

    def remove(self, request_id: str) -> None:
        self._logprobs.pop(request_id, None)
        self._embeddings.pop(request_id, None)

    def _joined(self, delta: Delta) -> Delta:
        if not delta.tokens or delta.request_id not in self._logprobs:
            return delta
        logprobs = tuple(each for each in self._logprobs[delta.request_id] if each is not None)
        assert len(logprobs) == len(self._logprobs[delta.request_id]), "a part of a prompt is lost"
        result = PromptResult(logprobs, self._embeddings.get(delta.request_id))
        self.remove(delta.request_id)
        return delta._replace(prompt=result)

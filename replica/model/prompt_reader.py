"""What rows tell of their prompts: log-probabilities of given tokens, and states of last tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from replica.model.launch import Asked
from replica.model.logit_rules import to_device
from replica.scheduling.request import PromptResult, TokenLogprobs

# The float32 logits of so many positions at a time are in memory.
_LOGITS_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class AskedRow:
    """row: its index in the launch. begin, end: its tokens in the batch."""

    row: int
    begin: int
    end: int
    asked: Asked


@dataclass(frozen=True, slots=True)
class PromptTensors:
    """scores: for each following token of all rows its logprob and rank, [tokens], and the largest
    logprobs and their tokens, [tokens, top]. states: float32 [rows that embed, hidden].
    """

    rows: tuple[AskedRow, ...]
    scores: tuple[torch.Tensor, ...]
    states: torch.Tensor

    def to_host(self) -> "PromptTensors":
        """An asynchronous copy, as `Choice.to_host`."""
        scores = tuple(t.to("cpu", non_blocking=True) for t in self.scores)
        return PromptTensors(self.rows, scores, self.states.to("cpu", non_blocking=True))

    def read(self) -> dict[int, PromptResult]:
        """By the row's index in the launch."""
        chosen, ranks, values, tokens = (t.tolist() for t in self.scores)
        states = iter(self.states.cpu().numpy().astype("<f4"))
        found, at = {}, 0
        for each in self.rows:
            asked, logprobs = each.asked, []
            for i, token in enumerate(asked.following, start=at):
                top = zip(tokens[i][: asked.top], values[i][: asked.top], strict=True)
                logprobs.append(TokenLogprobs(token, chosen[i], tuple(top), ranks[i]))
            at += len(asked.following)
            embedding = next(states).tobytes() if asked.embeds else None
            found[each.row] = PromptResult(tuple(logprobs), embedding)
        return found


def read_prompts(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab: int,
    rows: Iterable[AskedRow],
) -> PromptTensors:
    """hidden: [tokens, hidden] of the batch. head: gives logits [positions, vocab] of tokens of the
    batch. On CUDA nothing here waits for the device.
    """
    rows = tuple(rows)
    positions = [each.begin + i for each in rows for i in range(len(each.asked.following))]
    following = [token for each in rows for token in each.asked.following]
    top = min(max((each.asked.top for each in rows), default=0), vocab)
    last = [each.end - 1 for each in rows if each.asked.embeds]
    at = to_device(np.array([positions, following]), np.int64, hidden.device)
    most = max(1, _LOGITS_BYTES // (4 * vocab))
    parts = [
        _scores(head(at[0, i : i + most]), at[1, i : i + most], top)
        for i in range(0, max(len(following), 1), most)
    ]
    states = hidden.index_select(0, to_device(last, np.int64, hidden.device)).float()
    return PromptTensors(rows, tuple(map(torch.cat, zip(*parts, strict=True))), states)


def _scores(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> tuple[torch.Tensor, ...]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])
    best = logprobs.topk(top)
    return chosen[:, 0], (logprobs >= chosen).sum(-1), best.values, best.indices

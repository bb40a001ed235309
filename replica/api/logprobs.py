"""Log-probabilities in the shapes of OpenAI's completions and of vLLM's `prompt_logprobs`."""

from collections.abc import Sequence
from typing import Any

from replica.api.text import Text
from replica.scheduling.request import PromptResult, TokenLogprobs


def token_name(text: Text, token: int, as_ids: bool) -> tuple[str, bytes]:
    """A token's display name, and its bytes."""
    data = text.token_bytes(token)
    return f"token_id:{token}" if as_ids else data.decode(errors="replace"), data


def completion_logprobs(
    text: Text,
    entries: Sequence[TokenLogprobs | int],
    offsets: Sequence[int],
    top: int,
    as_ids: bool,
) -> dict[str, Any]:
    """entries: the id of a token that has no log-probability, as a prompt's first. offsets: where
    each begins in the text.
    """
    names, values, best = [], list[float | None](), list[dict[str, float] | None]()
    for entry in entries:
        if isinstance(entry, int):
            names.append(token_name(text, entry, as_ids)[0])
            values.append(None)
            best.append(None)
            continue
        names.append(token_name(text, entry.token, as_ids)[0])
        values.append(entry.logprob)
        others = {token_name(text, token, as_ids)[0]: p for token, p in entry.top[:top]}
        best.append({names[-1]: entry.logprob} | others)
    return {
        "text_offset": list(offsets),
        "token_logprobs": values,
        "tokens": names,
        "top_logprobs": best,
    }


def prompt_offsets(text: Text, tokens: Sequence[int], echo: str) -> list[int]:
    """Where each token of a prompt begins in its text, in characters. Tokens that the tokenizer has
    added take no space.
    """
    data, at, characters = echo.encode(), 0, 0
    offsets = []
    for token in tokens:
        offsets.append(characters)
        own = text.token_bytes(token)
        if own.startswith(b" ") and not data.startswith(own, at):
            own = own[1:]  # SentencePiece's space before a text
        if data.startswith(own, at) or token not in text.special:
            at += len(own)
            characters += sum(byte & 0xC0 != 0x80 for byte in own)
    return offsets


def prompt_logprobs(
    text: Text, found: PromptResult | None, top: int
) -> list[dict[str, Any] | None]:
    """As vLLM has them: nothing for the first token, then {token id: …} for each."""
    rows: list[dict[str, Any] | None] = [None]
    for entry in () if found is None else found.logprobs:
        ranked = [(entry.token, entry.logprob, entry.rank)]
        ranked += [(token, p, rank) for rank, (token, p) in enumerate(entry.top[:top], start=1)]
        row: dict[str, Any] = {}
        for token, logprob, rank in ranked:
            name = token_name(text, token, as_ids=False)[0]
            row.setdefault(str(token), {"logprob": logprob, "rank": rank, "decoded_token": name})
        rows.append(row)
    return rows

"""Splits what a model thinks, between <think> and </think>, from its answer, as vLLM does."""

from replica.api.stop_strings import overlap

BEGIN, END = "<think>", "</think>"


def reasons(template: str | None) -> bool:
    """True if a chat template shows that the model thinks before it answers."""
    return template is not None and END in template


class ReasoningReader:
    """Splits one choice's text as it arrives.

    inside: the prompt ends with the begin mark. Otherwise the text thinks if it begins with it.
    """

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._decided = inside
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """What is thought and what is answered."""
        return self._read(text, final=False)

    def flush(self) -> tuple[str, str]:
        """At the end of the text."""
        return self._read("", final=True)

    def _read(self, text: str, final: bool) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        if not self._decided:
            start = text.lstrip()
            if not final and BEGIN.startswith(start):
                self._held = text
                return "", ""
            self._decided = True
            if start.startswith(BEGIN):
                self._inside, text = True, start.removeprefix(BEGIN)
        if not self._inside:
            return "", text
        thought, end, answer = text.partition(END)
        if end:
            self._inside = False
            return thought, answer
        kept = 0 if final else overlap(thought, END)
        thought, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
        return thought, ""

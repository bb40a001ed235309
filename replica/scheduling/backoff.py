"""When a failed load is retried, and which requests wait for that.

    load fails ── pause ──> retry fails ── twice the pause ──> retry fails ── … up to the longest

Requests that have tokens wait for the retries until the pause is the longest. Others fail at once.
A registration ends the pause, because the files may be repaired.
"""

from cluster.errors import AdapterFailed
from replica.scheduling.adapter import Adapter
from replica.scheduling.request import Request
from replica.scheduling.waiting import Waiting


class Backoff:
    """Failed adapters.

    first_s, longest_s: pauses before a retry.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self.adapters: dict[str, Adapter] = {}
        self._first_s = first_s
        self._longest_s = longest_s

    def start(self, adapter: Adapter, reason: str, now_s: float) -> None:
        """Its load failed."""
        adapter.failures += 1
        pause_s = min(self._first_s * 2.0 ** min(adapter.failures - 1, 62), self._longest_s)
        adapter.retry_s = now_s + pause_s
        adapter.given_up = pause_s >= self._longest_s
        adapter.reason = reason
        self.adapters[adapter.digest] = adapter

    def end(self, digest: str) -> None:
        """It loads, is registered again, or leaves."""
        adapter = self.adapters.pop(digest, None)
        if adapter is not None:
            adapter.reason = None

    def paused(self, now_s: float) -> set[str]:
        """Adapters that may not load yet."""
        return {digest for digest, adapter in self.adapters.items() if now_s < adapter.retry_s}

    def failing(self, waiting: Waiting, now_s: float) -> list[tuple[Request, AdapterFailed]]:
        """Requests that fail instead of waiting for the retry, and why."""
        found = []
        for digest in sorted(self.paused(now_s)):
            adapter = self.adapters[digest]
            left_s = adapter.retry_s - now_s
            message = f"the adapter did not load: {adapter.reason}; retried in {left_s:.1f} s"
            for request in waiting.group(digest):
                if adapter.given_up or not request.begun:
                    error = AdapterFailed(message, field="model", retry_after_s=left_s)
                    found.append((request, error))
        return found

    def next_retry_s(self, waiting: Waiting, now_s: float) -> float | None:
        """When the first load is retried that a request waits for."""
        waited_for = filter(waiting.waited_for, self.paused(now_s))
        return min((self.adapters[digest].retry_s for digest in waited_for), default=None)

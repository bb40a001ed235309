"""Renders adapters' chat templates in a process that is killed when one takes too long.

    none ── a template ──> running ── too long, too much memory, gone ──> killed ──> none

A template is foreign code. Jinja's sandbox keeps it from files and variables, but not from endless
loops. After an overrun its chats are refused for `REFUSED_S`, so that it holds up others once. Only
those of less than half the size go on: one huge chat must not end everyone's with that adapter.
"""

import asyncio
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import AdapterFailed, BadRequest

DEADLINE_S = 2.0
REFUSED_S = 60.0
MEMORY_BYTES = 512 * 2**20
# What compiled templates may keep of it.
KEPT_BYTES_MAX = 256 * 2**20
REQUEST_BYTES_MAX = 16 * 2**20
_ANSWER_BYTES_MAX = 64 * 2**20
_START_S = 60.0
_ALARM_S = 10
# Keys and tokens of the replica's environment stay here.
_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TZ")
_CHILD = Path(__file__).with_name("template_child.py")

# The first byte of an answer, see `template_child.py`.
_RENDERED, _SYNTAX = b"r", b"s"


class TemplateOverrun(Exception):
    """The template took too much, now or less than `REFUSED_S` ago. Says what."""


@dataclass(frozen=True, slots=True)
class _Overrun:
    """size_bytes: of the request that took too much, without the template."""

    until_s: float
    reason: str
    size_bytes: int

    def error(self, now_s: float) -> TemplateOverrun:
        left_s = self.until_s - now_s
        return TemplateOverrun(f"{self.reason}; its chats are refused for {left_s:.0f} s")


class TemplateProcess:
    """`render` is for one event loop. The process starts with the first template."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "templates")
        self._child: _Child | None = None
        self._overruns: dict[str, _Overrun] = {}  # by template
        self._checking = threading.Lock()
        self._turns = weakref.WeakValueDictionary[str, asyncio.Lock]()

    async def render(self, template: str, request: Mapping[str, Any]) -> str:
        """request: `special_tokens`, `messages` and `options` of `apply_chat_template`.

        Raises TemplateOverrun, BadRequest with the template's own reason, or AdapterFailed.
        """
        loop = asyncio.get_running_loop()
        # One at a time of each template, so that others wait for one of its renderings, not all.
        turn = self._turns.setdefault(template, asyncio.Lock())
        async with turn:
            kind, text = await loop.run_in_executor(self._thread, self._run, template, request)
        if kind != _RENDERED:
            raise BadRequest(text, field="messages")
        return text

    def syntax_error(self, template: str) -> str | None:
        """Blocking. Raises TemplateOverrun or AdapterFailed."""
        messages = [{"role": "user", "content": ""}]
        request = {"special_tokens": {}, "messages": messages, "options": {}}
        with self._checking:  # one at a time, so that chats wait for one of them, not all
            kind, text = self._thread.submit(self._run, template, request).result()
        return text if kind == _SYNTAX else None

    def _run(self, template: str, request: Mapping[str, Any]) -> tuple[bytes, str]:
        """On its own thread."""
        try:
            body = json.dumps({**request, "template": template}).encode()
        except RecursionError as error:
            raise BadRequest("nested too deep", field="messages") from error
        if len(body) > REQUEST_BYTES_MAX:
            raise BadRequest(
                f"{len(body)} bytes of JSON, the maximum is {REQUEST_BYTES_MAX}", field="messages"
            )
        now_s, size_bytes = time.monotonic(), len(body) - len(template)
        self._overruns = {t: o for t, o in self._overruns.items() if o.until_s > now_s}
        overrun = self._overruns.get(template)
        if overrun is not None and size_bytes * 2 >= overrun.size_bytes:
            raise overrun.error(now_s)
        try:
            return self._answer(body)
        except (OSError, ValueError) as error:
            reason = f"it took more than {MEMORY_BYTES >> 20} MiB, or broke its process"
            if isinstance(error, TimeoutError):
                reason = f"it took longer than {DEADLINE_S:g} s"
            now_s = time.monotonic()
            overrun = _Overrun(now_s + REFUSED_S, reason, size_bytes)
            self._overruns[template] = overrun
            raise overrun.error(now_s) from error

    def _answer(self, body: bytes, again: bool = True) -> tuple[bytes, str]:
        """Raises AdapterFailed, or OSError or ValueError: then the process has ended."""
        if self._child is None or self._child.ended:
            self._child = _Child()
        child = self._child
        try:
            answer = child.answer(body)
        except (OSError, ValueError) as error:
            self._child = None
            killed = child.end() in (-signal.SIGKILL, -signal.SIGTERM)
            if not (again and killed and isinstance(error, ConnectionError)):
                raise
            # Somebody else did that, such as the kernel for want of memory. Only if it happens
            # again, the template may be at fault.
            return self._answer(body, again=False)
        if child.kept_bytes > KEPT_BYTES_MAX:
            child.end()
            self._child = None
        return answer


class _Child:
    """The process. Blocking, and for one thread."""

    def __init__(self) -> None:
        """Raises AdapterFailed if it does not start."""
        try:
            self._popen, self._socket = _started()
        except OSError as error:
            raise _not_started(str(error)) from error
        self.end = weakref.finalize(self, _end, self._popen, self._socket)
        try:
            self._received(time.monotonic() + _START_S)
            self._bytes_at_start = self._resident_bytes()
        except OSError as error:
            self.end()
            raise _not_started(f"exit status {self._popen.returncode}") from error

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    @property
    def kept_bytes(self) -> int:
        """Resident memory beyond that of its start. 0 if it has ended."""
        return max(self._resident_bytes() - self._bytes_at_start, 0)

    def _resident_bytes(self) -> int:
        try:
            pages = Path(f"/proc/{self._popen.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * resource.getpagesize()

    def answer(self, body: bytes) -> tuple[bytes, str]:
        """(kind, text). After an OSError it is of no more use."""
        request_id = secrets.token_bytes(8)
        self._socket.settimeout(DEADLINE_S)
        deadline_s = time.monotonic() + DEADLINE_S
        self._socket.sendall((len(request_id) + len(body)).to_bytes(4) + request_id + body)
        answer = self._received(deadline_s)
        if answer[:8] != request_id:
            raise OSError("an answer to another request")
        return answer[8:9], answer[9:].decode()

    def _received(self, deadline_s: float) -> bytes:
        size = int.from_bytes(self._exactly(4, deadline_s))
        if size > _ANSWER_BYTES_MAX:
            raise OSError(f"an answer of {size} bytes")
        return self._exactly(size, deadline_s)

    def _exactly(self, count: int, deadline_s: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            piece = self._socket.recv(min(count - len(data), 2**20))
            if not piece:
                raise ConnectionError("the process has ended")
            data += piece
        return bytes(data)


def _started() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), str(MEMORY_BYTES), str(_ALARM_S)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
                start_new_session=True,  # Ctrl-C is not for it
            ), ours
        except OSError:
            ours.close()
            raise


def _not_started(reason: str) -> AdapterFailed:
    return AdapterFailed(
        f"the process for chat templates did not start ({reason})", retry_after_s=1.0
    )


def _end(popen: subprocess.Popen[bytes], connection: socket.socket) -> int:
    """Returns the exit status."""
    popen.kill()
    status = popen.wait()
    connection.close()
    return status

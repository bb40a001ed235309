"""A line of JSON for each request that is sent to be run or to change adapters. Never its text."""

import logging
import os
import time
from datetime import UTC, datetime

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ConfigError
from replica.api.access import Caller

log = logging.getLogger(__name__)

# Whoever reaches the port may send a longer one, without a key.
_PATH_MAX = 256


class RequestLog:
    """path: of a file that replicas of one machine may share. It may be moved away meanwhile, as it
    is opened for each line.

    Raises ConfigError if the file cannot be written. Later failures are told in the server's log.
    """

    def __init__(self, path: str, replica_id: str) -> None:
        self._path, self._replica_id = path, replica_id
        try:
            self._append(b"")
        except OSError as error:
            what = f"request_log: {path}: {error.strerror}"
            raise ConfigError(what, field="request_log") from error

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, whose POST requests are logged when they end.

        It may put into the scope what it knows: `caller`; `code`, of an error; `ran`, of a call.
        """

        async def logged(scope: Scope, receive: Receive, send: Send) -> None:
            status: int | None = None

            def noting(message: Message) -> object:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                return send(message)

            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            at, began_s = datetime.now(UTC), time.monotonic()
            try:
                await app(scope, receive, noting)  # type: ignore[arg-type]
            finally:
                self._write(scope, at, status, time.monotonic() - began_s)

        return logged

    def _write(self, scope: Scope, at: datetime, status: int | None, took_s: float) -> None:
        caller: Caller | None = scope.get("caller")
        entry = {
            "at": at.isoformat(timespec="milliseconds"),
            "replica": self._replica_id,
            "path": scope["path"][:_PATH_MAX],
            "key": caller.label if caller is not None else None,
            "status": status,
            "code": scope.get("code"),
            "took_s": round(took_s, 6),
            **scope.get("ran", {}),
        }
        try:
            self._append(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:  # no reason to fail the request
            log.warning("request_log: %s: %s", self._path, error.strerror)

    def _append(self, line: bytes) -> None:
        """In one write, so that lines of several processes stay whole."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with open(os.open(self._path, flags, 0o600), "wb", buffering=0) as file:
            file.write(line)

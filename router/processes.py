"""The processes and the directory of a local fleet, and what killed fleets have left of theirs."""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

# A fleet's processes inherit it, so that none that only names the directory, such as a `tail` of a
# log, is taken for one of them.
RUN = "LORAFLEET_RUN"
# Sockets lie in it, whose paths are limited to 107 bytes.
_PARENT = Path("/tmp")
_PREFIX = "lf-"
_KILL_S = 10.0


class Run:
    """A directory that only this user can enter, and the processes that this one starts from now
    on: its descendants, and those with `variables` in their environment whose parent has ended.
    """

    def __init__(self) -> None:
        self._others = frozenset(_descendants([os.getpid()]))
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
        new = self.directory / "new"
        # The kernel releases the lock when this process ends, even if it is killed.
        self._owner = new.open("w")
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        new.rename(_owner(self.directory))

    @property
    def variables(self) -> Mapping[str, str]:
        """For the environment of its processes."""
        return {RUN: str(self.directory)}

    def processes(self) -> set[int]:
        return _descendants([os.getpid(), *_marked(self.directory)]) - self._others

    def kill(self) -> None:
        """Ends its processes and removes its directory. Idempotent."""
        _end(self.processes, self.directory)
        self._owner.close()


def sweep() -> None:
    """Ends and removes what killed fleets of this user have left."""
    for directory in _PARENT.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _owner(directory).open("r+") as owner:
            if os.fstat(owner.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its owner lives
            _end(partial(_left_of, directory), directory)


def _owner(directory: Path) -> Path:
    return directory / "owner"


def _marked(directory: Path) -> list[int]:
    """Those with this run in the environment that they were started with. Some of Ray's overwrite
    theirs with a title: those that are where Ray was started.
    """
    mark = f"{RUN}={directory}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                marked = mark in (entry / "environ").read_bytes().split(b"\0")
                titled = (entry / "cmdline").read_bytes().startswith(b"ray::")
                if marked or (titled and os.readlink(entry / "cwd") == str(directory)):
                    found.append(int(entry.name))
    return found


def _left_of(directory: Path) -> set[int]:
    return _descendants(_marked(directory))


def _descendants(pids: Iterable[int]) -> set[int]:
    """These and their descendants that run; never this process itself."""
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid in found:
            continue
        found.add(pid)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return {pid for pid in found if pid != os.getpid() and _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def _end(processes: Callable[[], Iterable[int]], directory: Path) -> None:
    """Kills the processes until there are none, and removes the directory, which none fills now."""
    deadline_s = time.monotonic() + _KILL_S
    while (left := list(processes())) and time.monotonic() < deadline_s:
        for pid in left:
            with contextlib.suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(directory, ignore_errors=True)

"""Directories that only this user can enter."""

import os
import stat
from pathlib import Path

from cluster.errors import StartupError


def make_private(directory: Path) -> None:
    """Creates it, or closes it to others. Raises StartupError if it belongs to another user:
    anyone may create a directory below /tmp.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StartupError(f"{directory}: not a directory of this user")
    directory.chmod(0o700)

"""Copies of regular files that later changes of the source cannot reach. Never hard links."""

import errno
import fcntl
import os
import shutil
import stat
from typing import BinaryIO

from cluster.adapter_paths import HEAD_BYTES

# The ioctl that makes a file share its extents with another until either is written to
# (linux/fs.h). Btrfs and XFS have it; ext4 and overlayfs do not.
_FICLONE = 0x40049409
# What a file system or kernel answers that cannot copy in this way.
_CANNOT = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM)
)


def open_regular(path: str) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError for a pipe, device or directory, without
    blocking.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: not a regular file")
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def copy_file(source: str, target: str) -> None:
    """Copies a regular file to a new one, which nobody may write to: reflinked, else copied in the
    kernel, else read and written. Raises OSError.
    """
    with open_regular(source) as old, open(target, "xb", buffering=0, opener=_read_only) as new:
        if not _reflink(old, new) and not _copy_in_kernel(old, new):
            shutil.copyfileobj(old, new, 2**20)


def copy_head(source: str, target: str) -> None:
    """Copies the first HEAD_BYTES as `copy_file` does all."""
    with open_regular(source) as old, open(target, "xb", opener=_read_only) as new:
        new.write(old.read(HEAD_BYTES))


def _read_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o444)


def _reflink(old: BinaryIO, new: BinaryIO) -> bool:
    try:
        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def _copy_in_kernel(old: BinaryIO, new: BinaryIO) -> bool:
    """False, and nothing copied, if these files cannot be copied so."""
    left = os.fstat(old.fileno()).st_size
    started = False
    while left:
        try:
            count = os.copy_file_range(old.fileno(), new.fileno(), left)
        except OSError as error:
            if not started and error.errno in _CANNOT:
                return False
            raise
        if not count:
            break  # the file was truncated meanwhile
        left -= count
        started = True
    return True

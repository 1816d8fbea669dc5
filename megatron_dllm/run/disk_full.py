"""A disk without room, or that must not be written, told apart from other failures (standard library only)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

MAKE_ROOM = "make room, or choose another run.root; all but the newest step_* folder of this run may be deleted"
# No space, the quota is used up, no file may be larger.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Only the user can give the right to write.
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_PROBE_BYTES = 2**20


class DiskFull(OSError):
    """Only the user can make room, so the process must end with EXIT_REFUSED; starting it again would not help."""


def failed_write(path: Path, error: Exception) -> OSError | RuntimeError:
    """What to raise where a file could not be written, by what helps.

    For want of room it is `DiskFull`, for want of the right to write OSError: the user has to mend something. Anything
    else is RuntimeError: starting again may help. A library may hide what the operating system said; then it is asked
    again, with a megabyte.

    Args:
        path: of the file, or of the folder that was written.
        error: that came of it.
    """
    folder = path if path.is_dir() else path.parent
    cause = _system_error(error) or _refused_probe(folder)
    if cause is not None and cause.errno in _NO_RIGHT:
        return OSError(cause.errno, os.strerror(cause.errno), str(path))
    if cause is None or cause.errno not in _NO_ROOM:
        return RuntimeError(f"writing {path}: {cause or error}; if the disk is full, {MAKE_ROOM}")
    free = shutil.disk_usage(folder).free / 2**30
    return DiskFull(f"writing {path}: {cause} ({free:.1f} GiB free there); {MAKE_ROOM}")


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one that a library made of it, where there is one."""
    inner: BaseException | None = error
    while inner is not None and not (isinstance(inner, OSError) and inner.errno is not None):
        inner = inner.__cause__ or inner.__context__
    return inner


def _refused_probe(folder: Path) -> OSError | None:
    """What the operating system says to a file that is gone again at once; None where it takes it."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            left = _PROBE_BYTES
            while left:  # a disk that fills up takes a part
                left -= probe.write(bytes(left))
    except OSError as error:
        return error
    return None

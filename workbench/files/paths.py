"""Files from outside: where a name leads, and that what lies there ends."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def place(name: str | os.PathLike[str]) -> Path:
    """The path that `name` means, "~" and "~user" included.

    Raises OSError for what can be no path: a NUL inside, or the home of a user that is not here.
    """
    text = os.fspath(name)
    if "\0" in text:
        raise OSError(errno.EINVAL, "a path cannot hold a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no such user's home folder") from error


def regular(path: Path, most: int | None = None) -> Path:
    """`path` itself, where it is a plain file of at most `most` bytes; OSError otherwise.

    Pipes, sockets and devices look like files to whoever opens them, and may never end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file but a pipe, a socket or a device")
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than the {most:,} that such a file may have")
    return path

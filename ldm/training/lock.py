"""Folders that one process has to itself. The system takes a lock back when its process ends, however it ends."""

import fcntl
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from ldm.registry import ConfigError

log = logging.getLogger(__name__)
NAME: Final = ".lock"
_ours: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def _let_go() -> None:
    """In a process that was forked: a data worker that outlives its training must not keep the folder locked."""
    for file in list(_ours):
        file.close()


os.register_at_fork(after_in_child=_let_go)


def take(folder: Path, refusal: Callable[[str], str]) -> IO[str]:
    """Lock a folder, which must exist, until the file that comes back is closed.

    Args:
        folder: gets a file `.lock`, which stays and does not say whether the lock is taken.
        refusal: what to say where another process has it, given that one's number.

    Raises: ConfigError with the refusal; OSError if nothing can be written there.
    """
    while True:
        file = (folder / NAME).open("a+", encoding="ascii", errors="replace")
        _ours.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise ConfigError(refusal(file.read(20).strip() or "unknown")) from error
        except OSError as error:  # file systems without locks
            log.warning("%s cannot be locked (%s): see that no other run writes there too", folder, error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / NAME).stat()):
                break
        file.close()  # who had it removed it just now
    os.truncate(file.fileno(), 0)
    os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file

"""Asked to stop: a scheduler's SIGTERM or SIGUSR1, or Ctrl-C, ends a training behind its next step's checkpoint."""

import atexit
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeVar

from ldm.training.distributed import Rank

T = TypeVar("T")
EXIT_CODE: Final = 75  # "try again" of sysexits.h: the same command continues the run
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (no error)
    """A training ended early because it was asked to; it says what is kept."""


class _Asked:
    """Whether one of SIGNALS has come, and its name."""

    name: str = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Ctrl-C a second time is not waited for."""
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


_ASKED: Final = _Asked()  # one for the process, as its signal handlers are


def asked() -> str:
    """Name of the signal that has come since `listening` began; "" if none has."""
    return _ASKED.name


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGNALS instead of dying of them; in a thread that may not handle signals, nothing is noted.

    Within itself it changes nothing: what was asked between two runs counts for the next one.
    From the end of the process's program on they are ignored: its exit code is decided.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGNALS[0]) is _ASKED:
        yield
        return
    _ASKED.name = ""
    atexit.unregister(_ignore)
    atexit.register(_ignore)
    before = {number: signal.signal(number, _ASKED) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _ASKED.name = ""


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stopped(kept: str) -> Stopped:
    """What to raise where a rank was asked to stop: by what, where it stands and what is `kept`."""
    return Stopped(f"stopped by {asked() or 'another rank'} {kept}")


def heed(rank: Rank, kept: str) -> None:
    """Stop here if any rank was asked to; all ranks must call. Raises: Stopped, with what is `kept`."""
    if rank.any(bool(asked())):
        raise stopped(kept)


def heeding(things: Iterable[T], rank: Rank, kept: str) -> Iterator[T]:
    """These, none behind a request to stop; ranks may have different ones, and wait for each other at the end.

    Raises: as `heed`.
    """
    if not asked():
        for thing in things:
            yield thing
            if asked():
                break
    heed(rank, kept)

"""Asked to stop: a scheduler's SIGTERM or SIGUSR1, or Ctrl-C, ends a training behind its next step's checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

EXIT_CODE: Final = 75  # "try again" of sysexits.h: the same command continues the run
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (no error)
    """A training ended early because it was asked to; its checkpoint is written."""


class Asked:
    """Whether one of SIGNALS has come, and its name."""

    name: str = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Ctrl-C a second time is not waited for."""
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Asked]:
    """Note SIGNALS instead of dying of them; in a thread that may not handle signals, nothing is noted."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

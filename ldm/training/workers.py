"""Processes that read the data: a signal to all of the run leaves them at work, and they end with what they read for.

A scheduler and a terminal signal every process of a run. Workers that died of it would take the step with them; so the
main process alone hears of it.
"""

import signal
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from torch.utils.data import DataLoader, Dataset

from ldm.data.errors import DataError
from ldm.training.signals import SIGNALS

GRACE: Final = 5.0  # seconds that workers have to finish the batch they are at, when nobody wants it any more


@dataclass(frozen=True, slots=True)
class Workers:
    """How many read; 0: the process itself. How many seconds one may take for a batch; 0: any time."""

    count: int = 0
    timeout: float = 0.0


NONE: Final = Workers()


def read(
    data: Dataset[Any],
    order: Iterable[list[int]],
    join: Callable[[list[Any]], Any],
    workers: Workers,
    *,
    pin: bool = False,
) -> Generator[Any]:
    """Batches of a data set; close it, and no worker is left.

    Args:
        data: items by number.
        order: of each batch the numbers.
        join: items -> batch.
        workers: that read.
        pin: into page-locked memory.

    Raises: DataError if the workers hang or die; what reading raised.
    """
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=join,
        num_workers=workers.count,
        pin_memory=pin,
        persistent_workers=workers.count > 0,
        timeout=workers.timeout if workers.count else 0,
        worker_init_fn=_ignore_signals,
    )
    if not workers.count:
        yield from loader
        return
    with named(workers):
        stream = _started(loader)
        try:
            yield from stream
        finally:
            _end(stream)


@contextmanager
def named(workers: Workers) -> Generator[None]:
    """What torch says of lost workers in one line; it may say so anywhere in the main process, not only where it reads.

    Raises: DataError for it.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not said.startswith("DataLoader"):
            raise
        if "timed out" in said:
            reason = f"gave no batch for {workers.timeout:g} s (train.worker_timeout)"
        elif "is killed by signal" in said or "exited unexpectedly" in said:
            reason = f"died: killed, or out of memory ({said.splitlines()[0].rstrip('. ')})"
        else:
            raise
        raise DataError(
            f"data workers {reason}; train.workers is {workers.count}: try fewer, or 0 to see what a sample does; the "
            "same command continues"
        ) from error


def _started(loader: DataLoader[Any]) -> Any:
    """The loader's iterator. No signal reaches a worker before it ignores them, however processes are started here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(number: int) -> None:
    """In a worker, first of all. torch lets it die of a SIGTERM that its parent did not send."""
    del number
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end(stream: Any) -> None:
    """End the workers of a loader's iterator, which has no public way to; those that do not answer are killed."""
    processes = list(stream._workers)

    def kill() -> None:
        for process in processes:
            process.kill()

    late = threading.Timer(GRACE, kill)
    late.start()
    try:
        with named(NONE):
            stream._shutdown_workers()
    except DataError:
        pass  # one died meanwhile, or was killed above
    finally:
        late.cancel()
        for process in processes:
            process.kill()  # torch would have sent SIGTERM
            process.join()

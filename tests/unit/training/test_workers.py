"""Processes that read the data: what signals, hangs and deaths of theirs do to who reads from them."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ldm.data.errors import DataError
from ldm.training import workers
from ldm.training.signals import SIGNALS, asked, listening
from ldm.training.workers import Workers, named, read


class Numbers(Dataset[int]):
    """Item i is i; whoever reads `bad` sleeps for a minute, or is killed."""

    def __init__(self, bad: int | None = None, killed: bool = False) -> None:
        self.bad, self.killed = bad, killed

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return index


def reading(data: Numbers, count: int = 2, timeout: float = 30.0, items: int = 8) -> Generator[Any]:
    return read(data, [[i] for i in range(items)], list, Workers(count, timeout))


def send(number: signal.Signals, *processes: int) -> None:
    """From another process, as a scheduler does: a SIGTERM of their parent is something else to torch's workers."""
    subprocess.run(["kill", f"-{int(number)}", *map(str, processes)], check=True)


def children() -> list[int]:
    return [child.pid or 0 for child in multiprocessing.active_children()]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_signals_to_all_of_the_run_leave_the_workers_at_work(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DataLoader", partial(DataLoader, multiprocessing_context=method))
    numbers: Any = range(8)  # which a spawned process knows
    with listening(), closing(reading(numbers, timeout=200.0)) as stream:
        assert next(stream) == [0] and len(children()) == 2
        send(signal.SIGTERM, os.getpid(), *children())
        for number in SIGNALS:
            send(number, *children())
        assert list(stream) == [[i] for i in range(1, 8)]
        assert asked() == "SIGTERM"


def test_a_worker_that_only_begins_ignores_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment on that torch has it die of them, which is ahead of our first word to it."""
    real = signal_handling._set_worker_signal_handlers  # pyright: ignore[reportPrivateImportUsage]

    def handlers() -> None:
        real()
        send(signal.SIGTERM, os.getpid())

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", handlers)
    with closing(reading(Numbers())) as stream:
        assert list(stream) == [[i] for i in range(8)]


@pytest.mark.parametrize(("killed", "said"), [(False, r"gave no batch for 1 s \(train"), (True, "died")])
def test_workers_that_hang_or_die_are_one_line(killed: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.2)
    begun = time.monotonic()
    with pytest.raises(DataError, match=f"^data workers {said}.*train.workers is 1"):
        list(reading(Numbers(3, killed), count=1, timeout=1.0))
    assert time.monotonic() - begun < 4 and not children()


def test_closed_it_leaves_no_worker_not_even_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.2)
    stream = reading(Numbers(3))
    assert next(stream) == [0] and next(stream) == [1] and len(children()) == 2
    time.sleep(0.1)  # the second goes on with 3
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 4 and not children()


def test_a_death_is_named_wherever_it_is_heard_of() -> None:
    with closing(reading(Numbers())) as stream, pytest.raises(DataError) as caught, named(Workers(2)):
        next(stream)
        send(signal.SIGKILL, children()[0])
        time.sleep(30)  # a step; torch says it from its handler of SIGCHLD
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data workers died: killed, or out of memory (DataLoader worker (pid ")


def test_another_error_is_no_worker_lost() -> None:
    with pytest.raises(RuntimeError, match=r"^the operation timed out$"), named(Workers(2)):
        raise RuntimeError("the operation timed out")

"""Trainings that are stopped, or come back to damaged checkpoints: each ends in the documented outcome."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapters  # noqa: F401
from ldm import config
from ldm.registry import ConfigError
from ldm.training import checkpoint, loop, run, signals
from ldm.training.distributed import Rank
from ldm.training.metrics import Metrics
from ldm.training.stage import Stage
from scripts import train
from tests.ranks import start_ranks

pytestmark = pytest.mark.long

TINY = Path(__file__).resolve().parents[2] / "configs" / "train" / "tiny" / "vae.yaml"
SMALL = ["train.precision=fp32", "validation.data=null", "data.length=16", "data.size=16", "train.batch=2"]
SMALL += ["train.steps=4", "checkpoint.every=2", "log.every=1", "train.ema=0.9", "checkpoint.keep_last=2"]


def words(folder: Path, *more: str) -> list[str]:
    return ["--config", str(TINY), f"run.dir={folder}", *SMALL, *more]


def start(folder: Path, *more: str) -> Path:
    return run.train(config.load(TINY, words(folder, *more)[2:]))


def model(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}  # the file is mapped


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int, times: int = 1) -> None:
    real = loop._step

    def stepping(wrapped: Any, state: Any, *args: Any) -> Any:
        if state.step == step:
            for _ in range(times):
                signal.raise_signal(number)
        return real(wrapped, state, *args)

    monkeypatch.setattr(loop, "_step", stepping)


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda n: n.name)
def test_a_signal_ends_the_run_behind_a_checkpoint_and_it_goes_on_bit_for_bit(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = start(tmp_path / "whole")
    handlers = [signal.getsignal(n) for n in signals.SIGNALS]
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, step=2)
        with pytest.raises(SystemExit) as stopped:
            train.main(words(tmp_path / "run"))
    assert stopped.value.code == signals.EXIT_CODE == 75
    line = f"stopped by {number.name} at step 3 of 4; the checkpoint is written: the same command continues\n"
    assert capsys.readouterr().err.endswith(line)
    assert handlers == [signal.getsignal(n) for n in signals.SIGNALS]
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == ["step-00000002", "step-00000003"]
    assert same(model(start(tmp_path / "run")), model(whole))


def test_a_signal_to_all_processes_of_the_run_leaves_the_workers_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As scancel or a time limit sends it: from elsewhere, to the main process and its data workers."""
    real = loop._step

    def stepping(wrapped: Any, state: Any, *args: Any) -> Any:
        if state.step == 2:
            workers = [child.pid for child in multiprocessing.active_children()]
            assert len(workers) == 2
            subprocess.run(["kill", "-TERM", *map(str, [*workers, os.getpid()])], check=True)
            time.sleep(0.3)  # torch's handler would raise here
        return real(wrapped, state, *args)

    monkeypatch.setattr(loop, "_step", stepping)
    with pytest.raises(SystemExit) as stopped:
        train.main(words(tmp_path, "train.workers=2"))
    assert stopped.value.code == 75 and "stopped by SIGTERM at step 3 of 4" in capsys.readouterr().err
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_group_that_is_terminated_ends_behind_a_checkpoint_and_is_gone(tmp_path: Path) -> None:
    command = ["scripts/train.py", *words(tmp_path, "train.workers=2", "train.steps=100000", "checkpoint.every=100000")]
    (run,) = start_ranks(command, 1)
    metrics = tmp_path / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(0.2)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGTERM)  # a repeated one changes nothing
    said = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 75 and "Traceback" not in said and "the checkpoint is written" in said
    assert len(checkpoint.complete(tmp_path)) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def test_a_signal_again_while_the_run_is_closed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Metrics.close

    def closing(self: Metrics) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Metrics, "close", closing)
    signal_in_step(monkeypatch, signal.SIGTERM, step=0)
    with pytest.raises(SystemExit) as stopped:
        train.main(words(tmp_path))
    assert stopped.value.code == 75 and [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000001"]


def test_a_signal_before_the_first_step_ends_the_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = run.build.stage
    monkeypatch.setattr(run.build, "stage", lambda cfg: (signal.raise_signal(signal.SIGTERM), real(cfg))[1])
    with pytest.raises(SystemExit) as stopped:
        train.main(words(tmp_path / "run"))
    assert stopped.value.code == 75 and not (tmp_path / "run").exists()
    line = "stopped by SIGTERM before its first step; what was complete is kept: the same command continues\n"
    assert capsys.readouterr().err.endswith(line)


def test_once_a_run_is_over_a_signal_changes_no_exit_code() -> None:
    """While the interpreter ends, which takes a while; what is registered first is called last."""
    program = "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGTERM)\n"
    program += "from ldm.training.signals import listening\nwith listening(): pass\nraise SystemExit(75)"
    assert subprocess.run([sys.executable, "-c", program], cwd=TINY.parents[3]).returncode == 75


def test_a_second_interrupt_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_in_step(monkeypatch, signal.SIGINT, step=1, times=2)
    with pytest.raises(SystemExit) as stopped:
        train.main(words(tmp_path))
    assert stopped.value.code == 130 and checkpoint.complete(tmp_path) == []


def test_a_signal_in_the_last_step_is_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_in_step(monkeypatch, signal.SIGTERM, step=3)
    assert start(tmp_path).name == "step-00000004"


@pytest.mark.parametrize("name", ["training.pt", "model.safetensors"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    name: str, harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = model(start(tmp_path))
    file = tmp_path / "checkpoints" / "step-00000004" / name
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[:-10])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level("INFO"):
        assert same(model(start(tmp_path)), whole)
    assert "step-00000004 is damaged (" in caplog.text and "continuing" in caplog.text
    assert (tmp_path / "checkpoints" / "step-00000004.damaged").is_dir()
    assert not checkpoint.damage(tmp_path / "checkpoints" / "step-00000004")


def test_when_every_checkpoint_is_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    start(tmp_path)
    for folder in checkpoint.complete(tmp_path):
        (folder / "training.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"all 2 checkpoints of .* are damaged; restore one, or use another run\.dir"):
        start(tmp_path)


def test_a_second_training_in_the_folder_is_one_line_and_the_first_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loop._step

    def stepping(*args: Any) -> Any:
        if not (tmp_path / "checkpoints").exists():
            with pytest.raises(SystemExit) as refused:
                train.main(words(tmp_path))
            assert refused.value.code == 2
        return real(*args)

    monkeypatch.setattr(loop, "_step", stepping)
    assert start(tmp_path).name == "step-00000004"
    line = f"error: run.dir {tmp_path} is in use by another training (process {os.getpid()}); wait until that has ended"
    assert line in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled once for every set that is encoded from now on."""
    asked: list[bool] = []
    monkeypatch.setattr(Stage, "cached", lambda self, data, *_: (asked.append(True), data)[1])
    return asked


def test_a_run_that_is_done_encodes_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = encoded(monkeypatch)
    done = start(tmp_path)
    assert asked == [True]
    with caplog.at_level("INFO"):
        assert start(tmp_path) == done
    assert asked == [True] and "is at step 4 of 4: nothing is left to train" in caplog.text
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1


def test_a_disk_without_room_is_found_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = encoded(monkeypatch)
    monkeypatch.setattr("ldm.training.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"run has no room for a checkpoint \(needs .* free\); make room, or name"):
        start(tmp_path / "run")
    assert not asked and not (tmp_path / "run").exists()


def test_checkpoints_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    start(tmp_path, "train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2")
    names = [int(p.name[-1]) for p in checkpoint.complete(tmp_path)]
    assert names == [2, 4, 6]


def test_deterministic_algorithms_are_switched_on_for_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = loop._step
    monkeypatch.setattr(
        loop, "_step", lambda *args: (seen.append(torch.are_deterministic_algorithms_enabled()), real(*args))[1]
    )
    start(tmp_path / "a", "train.steps=1", "deterministic=true")
    start(tmp_path / "b", "train.steps=1")
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()


def test_ranks_agree_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank's flag is to the others, without a second process."""
    asked: list[int] = []

    def all_reduce(x: torch.Tensor, op: Any) -> None:
        asked.append(int(x.item()))
        x.fill_(1)

    monkeypatch.setattr("ldm.training.distributed.dist.all_reduce", all_reduce)
    assert Rank(1, 2, torch.device("cpu")).any(False) and asked == [0]
    assert not Rank(0, 1, torch.device("cpu")).any(False)

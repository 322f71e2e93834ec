import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.config import LogConfig, RunConfig
from ldm.registry import ConfigError
from ldm.training import lock
from ldm.training.distributed import ALONE
from ldm.training.metrics import Metrics, describe_run, held, refuse_foreign


def fake_wandb(monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> list[dict[str, Any]]:
    """Put a recorder in place of the wandb package; what its `init` got is appended to the result."""
    calls: list[dict[str, Any]] = []

    class Error(Exception):
        pass

    def init(**settings: Any) -> SimpleNamespace:
        if error:
            raise Error(error)
        calls.append(settings)
        return SimpleNamespace(finish=lambda: None, log=lambda values, step: calls.append(values | {"step": step}))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error, Image=lambda file: file))
    return calls


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig())
    metrics.scalars(10, {"loss": 0.5})
    metrics.scalars(20, {"val_loss": 0.25})
    metrics.close()
    assert lines(tmp_path) == [{"step": 10, "loss": 0.5}, {"step": 20, "val_loss": 0.25}]


def test_steps_that_will_come_again_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig())
    for step in (10, 20, 30):
        metrics.scalars(step, {"loss": float(step)})
    with metrics.file.open("a") as file:
        file.write('{"step": 4')  # a crash in the middle of a line
    Metrics(tmp_path, LogConfig(), step=20).scalars(30, {"loss": 0.0})
    assert lines(tmp_path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": 0.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("garbled", [b"\0" * 30 + b'{"step": 5}\n', b"\xff}\n", b"[5]\n", b"5}\n"])
def test_lines_that_a_power_cut_garbled_are_dropped(garbled: bytes, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig())
    metrics.scalars(10, {"loss": 0.5})
    with metrics.file.open("ab") as file:
        file.write(garbled)
    metrics.scalars(15, {"loss": 0.25})
    Metrics(tmp_path, LogConfig(), step=20)
    assert lines(tmp_path) == [{"step": 10, "loss": 0.5}, {"step": 15, "loss": 0.25}]


def test_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.wandb is 'on'; allowed: disabled, offline, online"):
        Metrics(tmp_path, LogConfig(wandb="on"))


def test_runs_in_folders_of_one_name_have_their_own_wandb_id_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch)
    folders = [tmp_path / "tiny" / "ldm", tmp_path / "emoji" / "ldm"]
    for folder in folders:
        folder.mkdir(parents=True)
    for folder in (*folders, folders[0]):
        Metrics(folder, LogConfig(wandb="offline")).close()
    tiny, emoji, again = (call["id"] for call in calls)
    assert tiny == again != emoji


def test_wandb_gets_figures_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_wandb(monkeypatch)
    metrics = Metrics(tmp_path, LogConfig(wandb="offline"))
    metrics.scalars(5, {"loss": 1.0})
    metrics.picture(5, tmp_path / "a.png")
    assert calls[1:] == [{"loss": 1.0, "step": 5}, {"validation": str(tmp_path / "a.png"), "step": 5}]
    Metrics(tmp_path, LogConfig()).picture(5, tmp_path / "a.png")  # nothing to show it in
    assert len(calls) == 3


def test_wandb_that_does_not_start_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, error="No API key configured.\nUse wandb login")
    with pytest.raises(ConfigError, match=r"No API key configured\. Use wandb login.*log in, or set log\.wandb"):
        Metrics(tmp_path, LogConfig(wandb="online"))


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "new")
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"has files but no starts\.jsonl, so it is no run; name a new folder"):
        refuse_foreign(tmp_path)
    describe_run(RunConfig(), tmp_path / "run")
    refuse_foreign(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config\.yaml, which is a file; name a folder"):
        refuse_foreign(tmp_path / "config.yaml")


def test_a_run_folder_is_one_trainings_at_a_time_and_what_killed_saves_left_goes(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / "step-00000005.tmp"
    left.mkdir(parents=True)
    describe_run(RunConfig(), tmp_path)
    for _ in range(2):  # one after the other
        with held(tmp_path, ALONE):
            assert not left.exists()
            left.mkdir()
            with (
                pytest.raises(ConfigError, match=rf"in use by another training \(process {os.getpid()}\); wait"),
                held(tmp_path, ALONE),
            ):
                pass
            assert left.exists()  # of the live one


HOLDER = """
import sys, time
from multiprocessing import get_context
from pathlib import Path
from ldm.training import lock
def work():
    print("held", flush=True)
    time.sleep(60)
file = lock.take(Path(sys.argv[1]), str)
get_context("fork").Process(target=work).start()
time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock_though_a_worker_of_it_lives_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"^{holder.pid}$"):
            lock.take(tmp_path, str)
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        try:
            lock.take(tmp_path, str).close()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_refused_training_leaves_no_trace(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ConfigError, match="later"), held(folder, ALONE):
            raise ConfigError("later")
    assert not [*tmp_path.iterdir()]


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run\.dir .*run could not be written \(Not a directory\): make room, or"),
        held(tmp_path / "file" / "run", ALONE),
    ):
        pass

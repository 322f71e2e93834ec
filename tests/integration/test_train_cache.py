"""Training from an encoded data set on disk: made by two ranks together, it trains like memory on one or two."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import config
from ldm.data.errors import DataError
from ldm.data.synthetic import SyntheticData
from ldm.registry import ConfigError
from ldm.training import run
from ldm.training.cache import _Build
from ldm.training.cache_folder import Part
from scripts import train
from tests.ranks import finish, start_ranks

ROOT = Path(__file__).resolve().parents[2]
LDM = ROOT / "configs" / "train" / "tiny" / "ldm.yaml"
SMALL = ["device=cpu", "train.threads=1", "train.precision=fp32", "train.steps=4", "train.batch=4", "train.ema=null"]
SMALL += ["train.warmup=0", "train.decay=constant", "log.every=1", "validation.data=null", "checkpoint.every=4"]
SMALL += ["data.size=16", "data.length=300", "model.vae.weights=null", "model.text.weights=null"]  # two parts
SMALL += ["model.unet.channels=[16,32]", "model.unet.blocks=1", "model.vae.channels=[16,16]", "model.vae.blocks=1"]


def start(folder: Path, *more: str) -> list[dict[str, float]]:
    run.train(config.load(LDM, [f"run.dir={folder}", *SMALL, *more]))
    return lines(folder)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ranks
def test_two_ranks_make_one_cache_and_train_like_one_from_memory(tmp_path: Path) -> None:
    cached = f"stage.cache_dir={tmp_path / 'cache'}"
    memory = start(tmp_path / "memory")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["--config", str(LDM), f"run.dir={tmp_path / 'two'}", *SMALL, cached]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(ROOT / "scripts" / "train.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").glob("images-*"))) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    one = start(tmp_path / "one", cached, "train.workers=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before  # opened, not made
    assert [line["loss"] for line in one] == [line["loss"] for line in memory]
    assert [line["loss"] for line in lines(tmp_path / "two")] == pytest.approx([x["loss"] for x in memory], abs=1e-6)
    assert all(0 <= line["data_wait"] <= 1 for line in one)
    with pytest.raises(ConfigError, match=r"cache was made with other data.seed \(was 0, is 1\)"):
        start(tmp_path / "other", cached, "data.seed=1")


STOPPING = """
import os, signal, sys
sys.path.insert(0, ROOT)
from ldm.training import cache, cache_folder
from scripts import train

cache.PART = cache_folder.PART = 8
real = cache._Build._encoded
def encoded(self, batches):
    made = real(self, batches)
    with open(f"{sys.argv[1]}-{self.rank.index}", "a") as file:
        file.write("part\\n")
    if self.rank.index == 1 and sys.argv[2] == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
    return made
cache._Build._encoded = encoded
train.main(sys.argv[3:])
"""


@pytest.mark.ranks
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_to_one_of_two_ranks_that_encode_ends_both_and_the_run_goes_on(kept: bool, tmp_path: Path) -> None:
    program, run_dir = tmp_path / "stopping.py", tmp_path / "run"
    program.write_text(STOPPING.replace("ROOT", repr(str(ROOT))))
    words = ["--config", str(LDM), f"run.dir={run_dir}", *SMALL, "data.length=32", "train.steps=1"]  # two parts a rank
    words += [f"stage.cache_dir={tmp_path / 'cache'}"] if kept else []

    def made(how: str) -> int:
        return sum(path.read_text().count("part") for path in tmp_path.glob(f"{how}-[01]"))

    ranks = start_ranks([str(program), str(tmp_path / "stopped"), "stopped", *words], 2)
    where = f"stage.cache_dir {tmp_path / 'cache'} keeps what is done" if kept else "nothing is kept without"
    for process, by in zip(ranks, ("another rank", "SIGTERM"), strict=True):
        said = process.communicate(timeout=300)[1].decode().splitlines()[-1]
        assert process.returncode == 75 and said.startswith(f"stopped by {by} while encoding") and where in said
    assert (tmp_path / "stopped-1").read_text() == "part\n" and not run_dir.exists()
    before = sorted(path.name for path in (tmp_path / "cache").glob("images-*"))
    assert len(before) == (made("stopped") if kept else 0)
    finish(start_ranks([str(program), str(tmp_path / "again"), "again", *words], 2))
    assert len(lines(run_dir)) == 1 and made("again") == (4 - len(before) if kept else 8)


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_while_encoding_ends_the_run_behind_the_part(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm.training.cache_folder.PART", 8)
    monkeypatch.setattr("ldm.training.cache.PART", 8)
    more = ["data.length=16", "train.steps=1", "train.workers=1"]
    more += [f"stage.cache_dir={tmp_path / 'cache'}"] if kept else []
    real, parts = _Build._encoded, []

    def encoded(self: _Build, batches: Iterable[Any]) -> Part:
        parts.append(real(self, batches))
        if len(parts) == 1:
            signal.raise_signal(signal.SIGTERM)
        return parts[-1]

    monkeypatch.setattr(_Build, "_encoded", encoded)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(LDM), f"run.dir={tmp_path / 'run'}", *SMALL, *more])
    where = f"; stage.cache_dir {tmp_path / 'cache'} keeps what is done" if kept else ", of which nothing is kept"
    assert stopped.value.code == 75 and f"stopped by SIGTERM while encoding{where}" in capsys.readouterr().err
    assert len(parts) == 1 and not multiprocessing.active_children() and not (tmp_path / "run").exists()
    start(tmp_path / "run", *more)
    assert len(parts) == (2 if kept else 3)


def test_a_worker_that_is_lost_while_encoding_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, reader = SyntheticData.__getitem__, os.getpid()

    def killed(self: SyntheticData, index: int) -> Any:
        return item(self, index) if os.getpid() == reader else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(SyntheticData, "__getitem__", killed)
    with pytest.raises(DataError, match=r"^data workers died: .*train\.workers is 1"):
        start(tmp_path, "data.length=16", "train.workers=1")


def test_a_worker_that_hangs_while_encoding_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, reader = SyntheticData.__getitem__, os.getpid()

    def hanging(self: SyntheticData, index: int) -> Any:
        if os.getpid() != reader:
            time.sleep(60)
        return item(self, index)

    monkeypatch.setattr(SyntheticData, "__getitem__", hanging)
    monkeypatch.setattr("ldm.training.workers.GRACE", 0.1)
    with pytest.raises(DataError, match=r"^data workers gave no batch for 1 s \(train\.worker_timeout\)"):
        start(tmp_path, "data.length=16", "train.workers=1", "train.worker_timeout=1")


def test_a_flipped_bit_that_a_worker_reads_ends_the_run_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["data.length=16", f"stage.cache_dir={tmp_path / 'cache'}"]
    start(tmp_path / "first", *more, "train.steps=1")
    part = tmp_path / "cache" / "images-00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-5] + bytes([content[-5] ^ 16]) + content[-4:])
    with pytest.raises(SystemExit) as ended:  # in the four steps of an epoch, which read every row
        train.main(["--config", str(LDM), f"run.dir={tmp_path / 'run'}", *SMALL, *more, "train.workers=1"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and said.startswith(f"error: {part} of stage.cache_dir is damaged (row 15 is not what")


@pytest.mark.long
def test_a_run_goes_on_with_its_data_in_another_place(tmp_path: Path) -> None:
    small = ["data.length=16", "train.steps=2"]
    whole = start(tmp_path / "whole", *small)
    start(tmp_path / "parts", *small, "train.steps=1")
    assert start(tmp_path / "parts", *small, f"stage.cache_dir={tmp_path / 'cache'}")[1]["loss"] == whole[1]["loss"]

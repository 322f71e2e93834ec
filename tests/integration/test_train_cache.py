"""Training from an encoded data set on disk: made by two ranks together, it trains like memory on one or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import config
from ldm.registry import ConfigError
from ldm.training import run

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


def test_a_run_goes_on_with_its_data_in_another_place(tmp_path: Path) -> None:
    small = ["data.length=16", "train.steps=2"]
    whole = start(tmp_path / "whole", *small)
    start(tmp_path / "parts", *small, "train.steps=1")
    assert start(tmp_path / "parts", *small, f"stage.cache_dir={tmp_path / 'cache'}")[1]["loss"] == whole[1]["loss"]

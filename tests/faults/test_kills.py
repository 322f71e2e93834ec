"""Processes killed at random moments of starting, training and saving: nothing is lost, and the weights do not change.

`make test-faults` kills FAULT_KILLS times (50), half of them both ranks of two.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.training import checkpoint
from tests.ranks import finish, start_ranks

KILLS = int(os.environ.get("FAULT_KILLS", "50"))
EVERY = 5  # steps between checkpoints
STEPS = 150
CONFIG = ["--config", "configs/train/tiny/vae.yaml", "train.precision=fp32", "validation.data=null", "data.length=16"]
CONFIG += ["data.size=16", "train.batch=2", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "log.every=1"]
CONFIG += ["train.ema=0.9", "checkpoint.keep_last=2", "device=cpu"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def command(run: Path) -> list[str]:
    return ["scripts/train.py", *CONFIG, f"run.dir={run}"]


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 before the first."""
    found = checkpoint.latest(run)
    return 0 if found is None else int(found.name.partition("-")[2])


def logged(run: Path) -> int:
    """The last step that the run has written down, 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return len(whole)


def life(run: Path, world: int, chance: random.Random) -> bool:
    """Train until a random moment, then kill every rank. Returns whether all had ended well before."""
    ranks = start_ranks(command(run), world)
    limit = time.monotonic() + 120
    if chance.random() < 0.8:  # else in the midst of starting
        before = logged(run)
        while ranks[0].poll() is None and logged(run) <= before and time.monotonic() < limit:
            time.sleep(0.01)
    time.sleep(chance.uniform(0, 1.5))
    if all(process.poll() is not None for process in ranks):
        finish(ranks)
        return True
    os.killpg(ranks[0].pid, signal.SIGKILL)
    for process in ranks:
        process.communicate()
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """World size -> the weights of a run that nobody killed."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for world in (1, 2):
        run = tmp_path_factory.mktemp("whole") / str(world)
        finish(start_ranks(command(run), world))
        found[world] = weights(run)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.latest(run)
    assert folder is not None and newest(run) == STEPS
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("world", [1, 2])
def test_killed_runs_lose_no_more_than_an_interval_and_end_bit_equal(
    world: int, tmp_path: Path, undisturbed: dict[int, dict[str, torch.Tensor]]
) -> None:
    chance, kills, runs = random.Random(world), 0, 0
    while kills < KILLS / 2:
        run, done = tmp_path / f"run{runs}", False
        runs += 1
        while not done:
            before = newest(run)
            done = life(run, world, chance)
            kills += not done
            kept = newest(run)
            assert kept >= before, f"checkpoint {before} was lost: {kept} is the newest"
            assert logged(run) - kept <= EVERY, f"step {logged(run)} was done, the newest checkpoint is {kept}"
            assert kept == 0 or not checkpoint.damage(run / "checkpoints" / f"step-{kept:08d}")
        final = weights(run)
        expected = undisturbed[world]
        assert final.keys() == expected.keys()
        assert all(torch.equal(final[name], expected[name]) for name in expected)

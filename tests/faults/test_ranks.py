"""What happens to one of two ranks, the other hears: both end soon, in one line each, and nothing is lost."""

import signal
import time
from pathlib import Path

import pytest

from ldm.training import checkpoint
from tests.faults.test_kills import CONFIG, logged
from tests.ranks import ROOT, finish, start_ranks

SHORT = [*CONFIG, "train.steps=6", "checkpoint.every=2", "train.threads=1"]
FULL = """
import errno, sys
sys.path.insert(0, ROOT)
from ldm.training import checkpoint
from scripts import train

real = checkpoint.check_room
def full(folder, needed):
    if folder.name == "step-00000004.tmp":
        raise OSError(errno.ENOSPC, "needs 9.9 GB, the disk has 0.1 GB free")
    real(folder, needed)
checkpoint.check_room = full
train.main(sys.argv[1:])
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def last_line(said: bytes) -> str:
    return said.decode().splitlines()[-1]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_rank_that_dies_in_a_step_ends_the_other_in_one_line_and_the_run_goes_on(shard: str, tmp_path: Path) -> None:
    words = ["scripts/train.py", *CONFIG, "train.decay=constant", f"run.dir={tmp_path}", f"train.shard={shard}"]
    ranks = start_ranks([*words, "train.steps=100000", "checkpoint.every=2"], 2)
    while logged(tmp_path) < 5 and ranks[0].poll() is None:
        time.sleep(0.02)
    begun = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    said = ranks[0].communicate(timeout=120)[1]
    assert time.monotonic() - begun < 60
    assert ranks[0].returncode == 2 and "Traceback" not in said.decode()
    assert last_line(said).startswith("error: rank 0 of 2 has lost another rank (")
    assert last_line(said).endswith("the same command continues at the newest checkpoint")
    ranks[1].communicate()
    goes_on(words, tmp_path)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_rank_that_hangs_in_a_step_is_not_waited_for_beyond_the_limit(shard: str, tmp_path: Path) -> None:
    words = ["scripts/train.py", *CONFIG, "train.decay=constant", f"run.dir={tmp_path}", f"train.shard={shard}"]
    ranks = start_ranks([*words, "train.steps=100000", "checkpoint.every=2", "train.rank_timeout=15"], 2)
    while logged(tmp_path) < 5 and ranks[0].poll() is None:
        time.sleep(0.02)
    begun = time.monotonic()
    ranks[1].send_signal(signal.SIGSTOP)
    said = ranks[0].communicate(timeout=120)[1]
    assert 10 < time.monotonic() - begun < 60
    assert ranks[0].returncode == 2 and "Traceback" not in said.decode()
    assert last_line(said).startswith("error: rank 0 of 2 has waited 15 s for another rank (train.rank_timeout), which")
    assert ranks[1].poll() is None  # it hangs
    ranks[1].send_signal(signal.SIGCONT)
    said = ranks[1].communicate(timeout=120)[1]
    assert ranks[1].returncode == 2 and last_line(said).startswith("error: rank 1 of 2 has lost another rank (")
    goes_on(words, tmp_path)


def goes_on(words: list[str], run: Path) -> None:
    """The same command, of two more steps, continues at the newest checkpoint, which is an interval old at most."""
    kept = checkpoint.latest_sound(run)
    assert kept is not None and logged(run) - int(kept.name[5:]) <= 2
    steps = logged(run) + 2
    finish(start_ranks([*words, f"train.steps={steps}"], 2))
    newest = checkpoint.latest_sound(run)
    assert newest is not None and newest.name == f"step-{steps:08d}"


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_disk_that_is_full_for_rank_0_is_told_by_both(shard: str, tmp_path: Path) -> None:
    program, run = tmp_path / "full.py", tmp_path / "run"
    program.write_text(FULL.replace("ROOT", repr(str(ROOT))))
    ranks = start_ranks([str(program), *SHORT, f"run.dir={run}", f"train.shard={shard}"], 2)
    for process in ranks:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and "Traceback" not in said.decode()
        assert "step-00000004 could not be written (disk is full: needs 9.9 GB" in last_line(said)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert not checkpoint.damage(run / "checkpoints" / "step-00000002")
    finish(start_ranks(["scripts/train.py", *SHORT, f"run.dir={run}", f"train.shard={shard}"], 2))
    assert (run / "checkpoints" / "step-00000006" / checkpoint.MARKER).is_file()

"""Trainings in processes of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
sys.path.insert(0, ROOT)
import torch.distributed as dist
from scripts import train
PROLOGUE
dist.init_process_group("gloo")
for args in RUNS:
    train.main(args)
dist.destroy_process_group()
"""
Ranks = list[subprocess.Popen[bytes]]


def launch_two_ranks(runs: list[list[str]], folder: Path, prologue: str = "") -> None:
    """Run trainings, which must end well, one after another in the same two processes: starting those takes longest.

    Args:
        runs: arguments of scripts/train.py, for each training.
        folder: receives the program.
        prologue: Python that each process runs first.
    """
    program = folder / "trainings.py"
    text = PROGRAM.replace("PROLOGUE", prologue)
    program.write_text(text.replace("ROOT", repr(str(ROOT))).replace("RUNS", repr(runs)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def start_ranks(command: Sequence[str], world: int) -> Ranks:
    """All ranks of a Python program from the root of the repository, in one process group of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks: Ranks = []
    for rank in range(world):
        environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        leader = ranks[0].pid if ranks else 0
        words = [sys.executable, *command]
        ranks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, process_group=leader))
    return ranks


def finish(ranks: Ranks) -> None:
    """Wait for all, which must end well."""
    errors = [process.communicate(timeout=600)[1].decode()[-2000:] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * len(ranks), errors

"""Trainings in processes of their own, several one after another in the same two: starting those takes longest."""

import os
import subprocess
import sys
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


def launch_two_ranks(runs: list[list[str]], folder: Path, prologue: str = "") -> None:
    """Run the trainings with these command lines, which must end well.

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

"""What a script says and returns where its user can mend something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import console

ROOT = Path(__file__).resolve().parents[2]


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, console.user_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith("interrupted; ")


def test_a_reader_that_left_is_no_error() -> None:
    command = [sys.executable, "scripts/train.py", "--config", "configs/train/tiny/vae.yaml", "--print-config"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, console.user_errors():
        raise BrokenPipeError("a worker has gone")
    assert stopped.value.code == 2 and capfd.readouterr().err == "error: a worker has gone\n"

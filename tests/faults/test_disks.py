"""Trainings on a disk of 3 MB that fills up, and on one that becomes read-only. Only root may make such disks."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.training import checkpoint
from tests.faults.test_kills import CONFIG
from tests.integration.test_train_data_faults import before_step, refused, steps
from scripts import train

EACH = ["model.vae.channels=[8,16]", "checkpoint.every=1", "checkpoint.keep_last=0", "train.steps=60"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a disk is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)

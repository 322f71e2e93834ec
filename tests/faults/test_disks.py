"""Trainings on a disk of 8 MB that fills up, and on one that becomes read-only. Only root may make such disks."""

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.training import checkpoint
from tests.integration.test_train_data_faults import SCENES, before_step, refused, start, steps

MANY = [*SCENES, "train.steps=16", "checkpoint.every=1"]
pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a disk is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_the_run_keeps_what_is_there_and_with_room_it_goes_on(
    disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(capfd, disk / "run", *MANY, "checkpoint.keep_last=0")
    done = steps(disk / "run")
    assert said.startswith("error: checkpoint ") and "could not be written (disk is full" in said
    assert 0 < len(done) < 16 and not [*(disk / "run" / "checkpoints").glob("*.tmp")]
    assert not any(checkpoint.damage(folder) for folder in checkpoint.complete(disk / "run"))
    for old in checkpoint.complete(disk / "run")[:-1]:
        for file in old.iterdir():
            file.unlink()
    start(disk / "run", *MANY, "checkpoint.keep_last=1")
    assert steps(disk / "run") == [16]


def test_a_disk_that_becomes_read_only_ends_the_run_and_mended_it_goes_on(
    disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    with monkeypatch.context() as patch:
        patch.setattr("ldm.training.lock.take", lambda *_: io.StringIO())  # a file held open forbids `mount` to do it
        before_step(patch, 3, lambda _: remount("ro"))
        said = refused(capfd, disk / "run", *SCENES)
    assert said.startswith("error: ") and "Read-only file system" in said and steps(disk / "run") == [2]
    remount("rw")
    start(disk / "run", *SCENES)
    assert steps(disk / "run") == [2, 4]


def test_a_run_folder_on_a_read_only_disk_is_refused(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = refused(capfd, disk / "run", *SCENES)
    assert said.startswith("error: ") and "Read-only file system" in said

"""Data, values and folders that go bad while a training runs: each ends in what docs/faults.md says."""

import io
import json
import multiprocessing
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.synthetic import SyntheticData
from ldm.training import checkpoint, loop
from scripts import train

pytestmark = pytest.mark.long

TINY = Path(__file__).resolve().parents[2] / "configs" / "train" / "tiny" / "vae.yaml"
SMALL = ["train.precision=fp32", "validation.data=null", "train.batch=2", "train.steps=4", "checkpoint.every=2"]
SMALL += ["log.every=1", "device=cpu", "model.vae.channels=[8,16]", "checkpoint.keep_last=2"]
SCENES = ["data.length=16", "data.size=16"]
PICTURES = 8


def start(folder: Path, *data: str) -> None:
    train.main(["--config", str(TINY), f"run.dir={folder}", *SMALL, *data])


def refused(capfd: pytest.CaptureFixture[str], folder: Path, *data: str) -> str:
    """The last line of a training that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        start(folder, *data)
    assert ended.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def steps(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in checkpoint.complete(folder)]


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[list[Any]], object]) -> None:
    """Let something happen to the world, or to the step's micro-batches, ahead of one step."""
    real = loop._step

    def stepping(wrapped: Any, state: Any, micro_batches: Any, *rest: Any) -> Any:
        if state.step == step:
            happens(micro_batches)
        return real(wrapped, state, micro_batches, *rest)

    monkeypatch.setattr(loop, "_step", stepping)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 30 + number).convert("RGB").save(file, "PNG")
    return file.getvalue()


def pictures(root: Path, *damaged: int) -> str:
    """A folder of pictures with captions, some of them cut off behind their headers; the config's data node."""
    root.mkdir()
    for number in range(PICTURES):
        content = picture(number)
        (root / f"{number}.png").write_bytes(content[: len(content) // 2] if number in damaged else content)
        (root / f"{number}.txt").write_text("a colour")
    return f"data={{name: sidecar, root: {root}, size: 16, max_bad: 0.2}}"


def test_a_corrupt_image_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path / "run", pictures(tmp_path / "data", 3))
    assert steps(tmp_path / "run") == [2, 4]
    assert "skipped (1 of 8)" in caplog.text and "3.png" in caplog.text


def test_too_many_corrupt_images_end_the_run_with_their_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(capfd, tmp_path / "run", pictures(tmp_path / "data", 3, 5))
    assert said.startswith("error: 2 of 8 images cannot be read, data.max_bad is 0.2: ")


def test_a_shard_that_is_deleted_ends_the_run_with_its_name_and_back_again_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    shard = tmp_path / "data" / "00000.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(PICTURES):
            for suffix, content in (("png", picture(number)), ("txt", b"a colour")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    node = f"data={{name: webdataset, root: {tmp_path / 'data'}, size: 16}}"
    start(tmp_path / "whole", node)
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda _: shard.rename(tmp_path / "away.tar"))
        said = refused(capfd, tmp_path / "run", node)
    assert "1 of 8 images cannot be read" in said and "00000.tar" in said
    assert steps(tmp_path / "run") == [2]
    (tmp_path / "away.tar").rename(shard)
    start(tmp_path / "run", node)
    whole, parts = (
        load_file(checkpoint.complete(tmp_path / run)[-1] / "model.safetensors") for run in ("whole", "run")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_data_worker_that_hangs_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SyntheticData.load

    def hanging(self: SyntheticData, index: int, generator: torch.Generator | None = None) -> Any:
        if generator is not None:  # not the sample that is looked at ahead of training
            time.sleep(60)
        return load(self, index, generator)

    monkeypatch.setattr(SyntheticData, "load", hanging)
    begun = time.monotonic()
    said = refused(capfd, tmp_path, *SCENES, "train.workers=1", "train.worker_timeout=1")
    assert said.startswith("error: data workers gave no batch for 1 s (train.worker_timeout)")
    assert time.monotonic() - begun < 50


def test_a_data_worker_that_is_killed_during_a_step_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: list[Any]) -> None:
        multiprocessing.active_children()[0].kill()
        time.sleep(30)  # until torch says so

    before_step(monkeypatch, 2, killed)
    said = refused(capfd, tmp_path, *SCENES, "train.workers=1")
    assert said.startswith("error: data workers died: killed, or out of memory (") and "train.workers is 1" in said
    assert steps(tmp_path) == [2]


def test_a_batch_that_is_not_a_number_is_skipped_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 1, lambda micro_batches: micro_batches[0][1].image.fill_(torch.nan))
    start(tmp_path, *SCENES)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1] and "loss" not in lines[1]
    (dump,) = (tmp_path / "nonfinite").iterdir()
    assert dump.name == "step-00000001-rank0.json" and len(json.loads(dump.read_text())["samples"]) == 2
    weights = load_file(checkpoint.complete(tmp_path)[-1] / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_run_folder_that_cannot_be_written_ends_the_run_before_it_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder should: a read-only one would not stop root, who may run the tests."""
    (tmp_path / "taken").write_text("mine")
    said = refused(capfd, tmp_path / "taken" / "run", *SCENES)
    assert said.startswith("error: ") and "taken" in said and (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_can_no_longer_be_written_ends_the_run_and_keeps_what_was_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: (run / "checkpoints" / "step-00000004.tmp").write_text("in the way"))
        said = refused(capfd, run, *SCENES)
    assert "step-00000004 could not be written (" in said and "older ones are intact" in said
    assert steps(run) == [2] and not checkpoint.damage(checkpoint.complete(run)[0])
    (run / "checkpoints" / "step-00000004.tmp").unlink()
    start(run, *SCENES)
    assert steps(run) == [2, 4]

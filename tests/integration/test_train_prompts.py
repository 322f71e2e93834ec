"""Training an IP-Adapter from cached features, and starting a finished run again."""

import json
from pathlib import Path

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import config
from ldm.training import run

IP_ADAPTER = Path(__file__).resolve().parents[2] / "configs" / "train" / "tiny" / "ip_adapter.yaml"
SHORT = ["device=cpu", "train.steps=2", "train.batch=4", "data.length=8", "validation.items=4", "validation.images=2"]


def start(folder: Path, *more: str) -> Path:
    return run.train(config.load(IP_ADAPTER, [f"run.dir={folder}", *SHORT, *more]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_prompts_train_from_the_cache_in_every_precision(precision: str, tmp_path: Path) -> None:
    start(tmp_path, f"train.precision={precision}")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines) and (tmp_path / "images" / "step-00000002.png").exists()


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        start(tmp_path, "checkpoint.every=7")
    assert "nothing is left to train" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

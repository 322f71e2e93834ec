"""Training on pictures of many shapes: exact resume, any split of the batch, sizes that do not fit, failed starts."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import adapters  # noqa: F401
from ldm import config
from ldm.registry import ConfigError
from ldm.training import checkpoint, run
from tests.small import figures

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "train" / "tiny" / "controlnet.yaml"
SIZES = "{sizes: [[16, 24], [16, 16], [24, 16]]}"
SMALL = ["device=cpu", "train.precision=fp32", "train.batch=2", "train.warmup=0", "train.threads=1", "log.every=1"]
SMALL += ["stage.cache=false", "model.vae.weights=null", "model.text.weights=null", "model.unet.weights=null"]
SMALL += ["model.unet.channels=[8,16]", "model.unet.groups=4", "model.unet.head_dim=8", "train.trainable=['*']"]


def pictures(root: Path) -> Path:
    """Nine pictures of noise in three shapes, each its own hint."""
    root.mkdir()
    rows = []
    for i, size in enumerate([(30, 20), (16, 16), (20, 30)] * 3):
        Image.effect_noise(size, 100).save(root / f"{i}.png")
        rows.append({"file": f"{i}.png", "text": f"picture {i}", "h": f"{i}.png"})
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def start(data: Path, folder: Path, *more: str, sizes: str = SIZES) -> Path:
    node = f"{{name: folder, root: {data}, size: 16, flip: true, hints: {{edge: h}}, buckets: {sizes}}}"
    return run.train(config.load(CONFIG, [f"run.dir={folder}", f"data={node}", "validation.data=null", *SMALL, *more]))


def test_stop_and_resume_and_any_split_of_the_batch_are_the_same_run(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    whole = start(data, tmp_path / "whole", "train.steps=5")
    start(data, tmp_path / "parts", "train.steps=2")
    parts = start(data, tmp_path / "parts", "train.steps=5")
    for name in ("adapter.safetensors", "unet.safetensors"):
        one, other = (load_file(folder / name) for folder in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)
    start(data, tmp_path / "split", "train.steps=5", "train.micro_batch=1")
    said, again = (figures(tmp_path / name) for name in ("whole", "split"))
    losses = {name: value for name, value in said.items() if name.endswith(" loss")}
    assert len(losses) == 5
    assert {name: again[name] for name in losses} == pytest.approx(losses, abs=1e-6)
    assert checkpoint.read_state(whole)["samples"] == {"16x24": 3, "16x16": 3, "24x16": 3}


@pytest.mark.parametrize(
    ("more", "sizes", "message"),
    [
        ((), "{sizes: [[16, 24], [20, 16]]}", "images are 20x16 .* need multiples of 8; change data.size or data.bu"),
        (("adapters.edge.hint_widths=[8,16,32,32,32]",), SIZES, "adapter 'edge', images of 16x24 .*multiple of 16"),
        (("stage.cache=true", "validation.every=1"), SIZES, "stage.cache is on, but data.*"),
        (("stage.cache=true",), "null", "stage.cache is on, but data.flip"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_folder_is_made(
    more: tuple[str, ...], sizes: str, message: str, tmp_path: Path
) -> None:
    data = pictures(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        start(data, tmp_path / "run", "train.steps=1", *more, sizes=sizes)
    assert not (tmp_path / "run").exists()


def test_a_set_that_grew_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    done = start(data, tmp_path / "run", "train.steps=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with (data / "metadata.jsonl").open("a") as file:
        file.write('{"file": "0.png", "text": "again", "h": "0.png"}\n')
    with pytest.raises(ConfigError, match=r"data with samples of 24x16=3, not 4; another content of the data"):
        start(data, tmp_path / "run", "train.steps=2")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert start(data, tmp_path / "run", "train.steps=2", "train.allow_changes=true") != done

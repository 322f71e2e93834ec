"""scripts/train.py with a T2I-Adapter alone, and with an IP-Adapter beside it in one run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm import build, config
from ldm.training import checkpoint
from scripts import train

ROOT = Path(__file__).resolve().parents[2]
SKETCH = ROOT / "configs" / "train" / "tiny" / "t2i_adapter_sketch.yaml"
SHORT = ["device=cpu", "data.length=8", "train.batch=4", "train.ema=null", "train.precision=fp32"]
SHORT += ["train.steps=2", "checkpoint.every=1", "checkpoint.keep_last=2", "validation.data=null"]
LOOK = (
    "adapters.look={name: ip_adapter, encoder: {name: vit, image_size: 32, patch: 16, width: 8, layers: 1, heads: 1}}"
)


def run(folder: Path, *more: str) -> tuple[Path, Path]:
    """Train two steps; the checkpoints of both."""
    train.main(["--config", str(SKETCH), f"run.dir={folder}", *SHORT, *more])
    one, two = checkpoint.complete(folder)
    return one, two


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def moved(one: Path, two: Path, stem: str) -> bool:
    a, b = (load_file(folder / f"{stem}.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and not all(torch.equal(a[k], b[k]) for k in a)


def test_a_sketch_adapter_trains_and_its_file_is_its_own(tmp_path: Path) -> None:
    one, two = run(tmp_path)
    assert [path.name for path in two.glob("*.safetensors")] == ["adapter.safetensors"]
    assert moved(one, two, "adapter")
    cfg = config.load(SKETCH, [f"adapters.sketch.weights={tmp_path}"])
    loaded = build.denoiser(cfg).adapter("sketch").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in load_file(two / "adapter.safetensors").items())


def test_a_sketch_adapter_and_an_image_prompt_train_in_one_run(tmp_path: Path) -> None:
    one, two = run(tmp_path, LOOK, "data.reference=true")
    stems = {path.stem for path in two.glob("*.safetensors")}
    assert stems == {"adapter.sketch", "adapter.look"} and all(moved(one, two, stem) for stem in stems)
    files = [f"adapters.{stem.partition('.')[2]}.weights={two / stem}.safetensors" for stem in stems]
    loaded = build.denoiser(config.load(SKETCH, [LOOK, *files]))
    for stem in stems:
        state = loaded.adapter(stem.partition(".")[2]).state_dict()
        assert all(torch.equal(state[k], v) for k, v in load_file(two / f"{stem}.safetensors").items())

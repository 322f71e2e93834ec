"""Configs that documents give for data of one's own: as written they fit the data, and what evaluation wants."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import adapters  # noqa: F401  (registers them)
import ldm.training.run  # noqa: F401  (registers the stages)
from ldm import build, config
from ldm.data.images import collate
from ldm.data.records import split_by_hash
from ldm.evaluation.adherence import judges
from ldm.training.diffusion import DiffusionStage

ROOT = Path(__file__).resolve().parents[2]


def own_pairs(root: Path) -> None:
    """Two pairs in the form of docs/guide.md."""
    rows = [
        {"file": f"{split}.png", "text": "a caption", "edges": f"edges/{split}.png", "split": split}
        for split in ("train", "heldout")
    ]
    (root / "edges").mkdir(parents=True)
    for row in rows:
        for name in (row["file"], row["edges"]):
            Image.new("RGB", (40, 40)).save(root / name)
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def fill50k_pairs(root: Path) -> None:
    """A pair that the hash of its name gives to the training, and one that it holds out."""
    names = {split_by_hash(f"target/{i}.png"): f"{i}.png" for i in range(200)}
    for name in names.values():
        for folder in ("source", "target"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(root / folder / name)
    rows = [{"source": f"source/{n}", "target": f"target/{n}", "prompt": "a caption"} for n in names.values()]
    (root / "prompt.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize(
    ("document", "pairs", "root"),
    [
        ("guide.md", own_pairs, "/path/to/folder"),
        ("train-your-own-controlnet.md", fill50k_pairs, "data/fill50k"),
    ],
)
def test_config_for_own_data_trains_and_has_a_measure(
    document: str, pairs: Callable[[Path], None], root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs(tmp_path / "data")
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(include: .*?)```", text, re.DOTALL)
    block = re.sub(r"\[(/path/to/checkout/)?configs/", f"[{ROOT}/configs/", block).replace(root, str(tmp_path / "data"))
    (tmp_path / "mine.yaml").write_text(block)
    cfg = config.load(tmp_path / "mine.yaml")
    with torch.device("meta"):
        stage = build.stage(cfg)
    assert isinstance(stage, DiffusionStage)
    train, held_out = build.data(cfg.data), build.data(cfg.validation.data, "validation.data")
    keys = [{data[i].key for i in range(len(data))} for data in (train, held_out)]
    assert keys[0].isdisjoint(keys[1])
    assert list(stage.hints(collate([held_out[0]]))) == ["edge"]
    assert {name: list(named) for name, named in judges(cfg, stage.denoiser).items()} == {"edge": ["edge_f1"]}
    assert not caplog.messages

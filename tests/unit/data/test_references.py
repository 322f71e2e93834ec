"""Image prompts: which picture a sample gets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm.data  # noqa: F401  registers the readers
from ldm.control import Control
from ldm.data import DataError
from ldm.data.subset import Part
from ldm.models.vae import Posterior
from ldm.registry import ConfigError, build
from ldm.training.cache import Encoders, LatentData
from ldm.training.distributed import ALONE

from .conftest import write_rows

STYLES = ("flat", "noto", "twemoji")


def made(root: Path) -> Path:
    """Three styles of three concepts, each of its own grey; concept 2 is held out, and so is noto-0."""
    rows: list[dict[str, Any]] = []
    for c in range(3):
        for s, style in enumerate(STYLES):
            Image.new("RGB", (16, 16), (20 * (3 * c + s),) * 3).save(root / f"{style}{c}.png")
            split = "heldout_concept" if c == 2 else "heldout_pair" if (style, c) == ("noto", 0) else "train"
            rows.append({"file": f"{style}{c}.png", "text": style, "style": style, "concept": str(c), "split": split})
    write_rows(root, rows)
    return root


def folder(root: Path, **options: Any) -> Any:
    return build("data", {"name": "folder", "root": str(root), "size": 16, **options})


def names(data: Any) -> dict[str, set[str]]:
    """Image -> its possible references."""
    keys = [data[i].key for i in range(len(data))]
    return {key: {Path(name).name for name in data.references(key)} for key in keys}


def test_reference_is_another_style_of_the_same_concept_and_split(tmp_path: Path) -> None:
    found = names(folder(made(tmp_path), where={"split": "train"}, reference={"same": "concept"}))
    assert found == {
        "flat0.png": {"twemoji0.png"},  # not the held-out noto0
        "twemoji0.png": {"flat0.png"},
        "flat1.png": {"noto1.png", "twemoji1.png"},
        "noto1.png": {"flat1.png", "twemoji1.png"},
        "twemoji1.png": {"flat1.png", "noto1.png"},
    }


def test_reference_may_be_itself_or_of_one_style_or_of_more_splits(tmp_path: Path) -> None:
    root = made(tmp_path)
    itself = folder(root, where={"split": "train"}, reference={"same": "concept", "itself": True})
    assert names(itself)["noto1.png"] == {"flat1.png", "noto1.png", "twemoji1.png"}
    noto = {"same": "concept", "where": {"style": "noto"}}
    assert names(folder(root, where={"split": "train", "style": "flat"}, reference=noto)) == {
        "flat1.png": {"noto1.png"}
    }
    wide = {"same": "concept", "where": {"split": ["train", "heldout_pair"]}}
    assert names(folder(root, where={"split": "heldout_pair"}, reference=wide)) == {
        "noto0.png": {"flat0.png", "twemoji0.png"}
    }


@pytest.mark.parametrize("size", [8, 24])
def test_references_may_have_a_size_of_their_own(tmp_path: Path, size: int) -> None:
    data = folder(made(tmp_path), reference={"same": "file", "itself": True, "size": size})
    sample = data[0]
    assert sample.image.shape == (3, 16, 16) and sample.reference.shape == (3, size, size)
    assert data.reference(data.references(sample.key)[0]).shape == (3, size, size)
    with pytest.raises(DataError, match=r"data.reference.size is -1, must be at least 1, or 0"):
        folder(tmp_path, reference={"same": "file", "itself": True, "size": -1})


def test_references_alone_are_mirrored_and_cropped_in_training(tmp_path: Path) -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((16, 16))  # dark on the left or on the right
    ramp.convert("RGB").save(tmp_path / "a.png")
    write_rows(tmp_path, [{"file": "a.png", "text": "a"}])

    def drawn(seed: int | None = None, **keys: Any) -> Any:
        data = folder(tmp_path, reference={"same": "file", "itself": True, **keys})
        return data.load(0, None if seed is None else torch.Generator().manual_seed(seed))

    whole = drawn().reference
    flipped = [drawn(seed, flip=True) for seed in range(8)]
    assert all(torch.equal(s.image, whole) for s in flipped)
    assert {torch.equal(s.reference, whole) for s in flipped} == {True, False}
    assert all(torch.equal(s.reference, whole) or torch.equal(s.reference, whole.flip(-1)) for s in flipped)
    cropped = [drawn(seed, crop=0.5).reference for seed in range(8)]
    spans = [float(x.max() - x.min()) for x in (whole, *cropped)]
    assert len({x.mean().item() for x in cropped}) > 4 and min(spans[1:]) < 0.8 * spans[0]
    assert all(x.shape == whole.shape and x.abs().max() <= 1 for x in cropped)
    assert torch.equal(drawn(3, crop=0.5).reference, cropped[3])
    assert torch.equal(drawn(None, flip=True, crop=0.5).reference, whole)
    with pytest.raises(DataError, match=r"data.reference.crop is 1.5, must be in \(0, 1\]"):
        drawn(crop=1.5)


@pytest.mark.parametrize("memory", [True, False])
def test_reference_is_drawn_with_the_samples_own_generator(tmp_path: Path, memory: bool) -> None:
    data = folder(
        made(tmp_path), where={"split": "train"}, reference={"same": "concept", "itself": True}, memory=memory
    )

    def grey(index: int, seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return float(data.load(index, generator).reference.mean())

    drawn = [grey(3, seed) for seed in range(12)]
    assert len(set(drawn)) == 3 and drawn == [grey(3, seed) for seed in range(12)]
    assert len({grey(3, None) for _ in range(3)}) == 1  # without one it is always the same
    assert set(drawn) == {float(data.reference(name).mean()) for name in data.references(data[3].key)}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"same": "concpet"}, r"data\.reference has column 'concpet'; .* did you mean 'concept'"),
        ({"same": "style", "where": {"style": "line"}}, r"data\.reference\.where .*matches none of the 9 images"),
        ({"same": "style", "where": {"x": "line"}}, r"data\.reference\.where has column 'x'; .*drop it from"),
        ({"same": "file"}, "none of the 5 images .* has another of its 'file'"),
    ],
)
def test_reference_that_leads_nowhere_is_refused(tmp_path: Path, reference: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        folder(made(tmp_path), where={"split": "train"}, reference=reference)


def test_unknown_key_of_a_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.reference: unknown keys \['smae'\], missing keys \['same'\]"):
        folder(made(tmp_path), reference={"smae": "concept"})


def test_a_damaged_reference_costs_its_draw_and_nothing_else(tmp_path: Path) -> None:
    root = made(tmp_path)
    damage(root / "noto1.png")
    data = folder(root, where={"split": "train"}, reference={"same": "concept"}, max_bad=0.5)

    def drawn(seed: int) -> tuple[str, float]:
        sample = data.load(2, torch.Generator().manual_seed(seed))  # flat1: references noto1 and twemoji1
        return sample.key, sample.reference.mean().item()

    seen = [drawn(seed) for seed in range(12)]
    assert {key for key, _ in seen} >= {"flat1.png", "twemoji1.png"} and [drawn(seed) for seed in range(12)] == seen
    assert list(data.bad) == [root / "noto1.png"]  # it is a sample as well, and that one is unreadable


def test_too_many_damaged_references_stop_with_the_share(tmp_path: Path) -> None:
    root = made(tmp_path)
    only = {"same": "concept", "where": {"style": "noto"}}
    data = folder(root, where={"split": ["train", "heldout_pair"], "style": "flat"}, reference=only)
    damage(root / "noto1.png")
    with pytest.raises(DataError, match=r"1 of 2 references cannot be read, data.max_bad is 0.01"):
        data.load(1)


def test_the_cache_pairs_by_sample_and_leaves_damaged_references_out(tmp_path: Path) -> None:
    root = made(tmp_path)
    data = folder(root, where={"split": "train"}, reference={"same": "concept"}, max_bad=0.5)
    damage(root / "flat0.png")  # sample 0: sample 1 takes its place, and lacks its only reference
    cached = LatentData(data, greys(), ALONE)
    keys = [cached.key(i) for i in range(len(cached))]
    grey = {name: data.reference(str(root / name)).mean().item() for name in ("flat1.png", "noto1.png", "twemoji1.png")}
    assert set(keys) == set(grey)
    for i, key in enumerate(keys):
        drawn = {cached.load(i, torch.Generator().manual_seed(seed)) for seed in range(8)}
        found = cached.collate(list(drawn)).prompts["prompt"].flatten().tolist()
        assert sorted(found) == pytest.approx(sorted(v for name, v in grey.items() if name != key), abs=1e-3)


def test_pictures_are_kept_until_the_set_is_encoded(tmp_path: Path) -> None:
    root = made(tmp_path)
    data = folder(root, where={"split": "train"}, reference={"same": "concept", "itself": True})

    def found() -> list[float]:
        return [v for x in (*data, data[0]) for v in (x.image.mean().item(), x.reference.mean().item())]

    before = found()
    for file in root.glob("*.png"):
        Image.new("RGB", (16, 16), "white").save(file)
    assert found() == before
    LatentData(Part(data, 3), greys(), ALONE)
    assert set(found()) == {1.0}  # read anew


def greys() -> Encoders:
    """Of everything the mean."""
    return Encoders(
        lambda x: Posterior(x[:, :, :1, :1], x[:, :, :1, :1]),
        lambda captions, size: Control(context=torch.zeros(len(captions), 1, 1)),
        lambda x: {"prompt": x.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)},
    )


def damage(file: Path) -> None:
    """Cut a picture off behind its header."""
    file.write_bytes(file.read_bytes()[:50])

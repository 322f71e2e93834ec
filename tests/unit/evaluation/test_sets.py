"""Set metrics: reading them, their references on disk, and intervals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import registry
from ldm.data.synthetic import SyntheticData, SyntheticOptions
from ldm.data.transforms import to_pixels
from ldm.evaluation import references, sets
from ldm.evaluation.features import Inception, in_8_bits
from ldm.evaluation.sets import SetMeasure, SetOptions, set_measure
from ldm.registry import ConfigError
from ldm.training.distributed import ALONE

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}
DATA = SyntheticData(SyntheticOptions(size=16, length=6))


def encoder(folder: Path, name: str = "vit", seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    save_file(registry.build("image", VIT).state_dict(), folder / f"{name}.safetensors")
    return {**VIT, "weights": str(folder / f"{name}.safetensors")}


def judge(folder: Path, resize: str = "bicubic", **options: Any) -> SetMeasure:
    features = {"name": "tower", "encoder": encoder(folder), "resize": resize}
    return set_measure("judge", {"features": features, "kid_subset": 3, "kid_subsets": 2, **options})


def reference(measure: SetMeasure, folder: Path, items: int = 6) -> references.Reference:
    return sets.reference(measure, DATA, items, 4, folder / "cache", ALONE)


def test_features_of_the_held_out_items_are_made_once_and_found_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = judge(tmp_path)
    made = reference(measure, tmp_path)
    assert made.features.shape == (6, 8)
    assert sorted(made.told) == ["data", "extractor", "resize", "size"] and made.told["size"] == "16x16"
    fewer = reference(measure, tmp_path, items=4)
    assert fewer.file != made.file and len(fewer.features) == 4
    monkeypatch.setattr(references, "vectors", None)  # calling it would be another error
    again = reference(judge(tmp_path), tmp_path)
    assert again.file == made.file and torch.equal(again.features, made.features)


def test_a_reference_is_of_its_extractor_filter_and_size(tmp_path: Path) -> None:
    file = str(reference(judge(tmp_path), tmp_path).file)
    assert len(reference(judge(tmp_path, reference=file), tmp_path).features) == 6
    with pytest.raises(ConfigError, match=r"judge.reference .* is of another resize: bicubic, here it is bilinear"):
        reference(judge(tmp_path, resize="bilinear", reference=file), tmp_path)
    with pytest.raises(ConfigError, match="is of another size: 16x16, here it is 32x32"):
        references.stored(Path(file), judge(tmp_path).features, (32, 32), "here")
    other = encoder(tmp_path, seed=1)  # other weights under the same name
    with pytest.raises(ConfigError, match="is of another extractor"):
        features = registry.build("features", {"name": "tower", "encoder": other})
        references.stored(Path(file), features, (16, 16), "here")


def test_a_damaged_or_mistaken_file_is_one_line(tmp_path: Path) -> None:
    made = reference(judge(tmp_path), tmp_path)
    made.file.write_bytes(b"half")
    with pytest.raises(ConfigError, match="has no reference features"):
        reference(judge(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match=r"judge.reference is nowhere, must be a folder of images"):
        reference(judge(tmp_path, reference="nowhere"), tmp_path)


def test_a_folder_is_a_reference_at_the_size_of_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for i in range(4):
        pixels = to_pixels(DATA[i].image).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((16, 16 + 8 * i)).save(tmp_path / "real" / f"{i}.png")
    found = reference(judge(tmp_path, reference=str(tmp_path / "real")), tmp_path)
    same = judge(tmp_path).features(to_pixels(DATA[0].image)[None])
    torch.testing.assert_close(found.features[:1], same)
    assert found.features.shape == (4, 8) and found.told["size"] == "16x16"
    data = {"name": "synthetic", "size": 16, "length": 6}
    assert torch.equal(
        reference(judge(tmp_path, reference=data), tmp_path).features.sort(dim=0).values,
        reference(judge(tmp_path), tmp_path).features.sort(dim=0).values,
    )


@pytest.mark.parametrize(
    ("options", "items", "message"),
    [
        ({"kid_subset": 1000}, 6, r"kid needs 1000 pictures, drawn has 6; take more, or set .*kid_subset to at most 6"),
        ({"neighbours": 6}, 6, r"precision needs 7 pictures, drawn has 6; take more, or drop precision from"),
        ({"metrics": ["frechet"]}, 1, r"frechet needs 2 pictures, drawn has 1"),
        ({"metrics": ["frechet", "fid"]}, 6, r"metrics has 'fid'; allowed: frechet, kid, precision, recall"),
        ({"metrics": []}, 6, r"metrics is empty"),
        ({"halves": -1}, 6, r"halves is -1, must be at least 0"),
        ({"subset": 1}, 6, r"unknown keys \['subset'\]"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options: dict[str, Any], items: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        judge(tmp_path, **options).check(items, "drawn")


def test_few_pictures_for_wide_features_are_marked(tmp_path: Path) -> None:
    measure = judge(tmp_path)
    assert measure.marks(9, 100) == [] and measure.marks(100, 8)
    assert "frechet of 8 pictures in 8 dimensions" in measure.marks(8, 100)[0]
    assert judge(tmp_path, metrics=["kid"]).marks(4, 4) == []


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "tower", "encoder": VIT}, "tower.encoder has no weights"),
        ({"name": "tower", "encoder": {**VIT, "weights": "no.safetensors"}}, "weights no.safetensors do not exist"),
        ({"name": "inception", "weights": "no.pth"}, "weights no.pth do not exist"),
        ({"name": "inception", "weights": "no.pth", "resize": "area"}, "inception.resize is 'area'; allowed: tf_b"),
        ({"name": "inceptoin"}, "did you mean 'inception'"),
    ],
)
def test_missing_weights_of_an_extractor_are_one_line(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_measure("judge", {"features": node})


def test_scores_of_every_arm_with_intervals_that_shrink_with_the_items() -> None:
    g = torch.Generator().manual_seed(0)
    real, near, far = (torch.randn(400, 4, generator=g) + shift for shift in (0.0, 0.0, 1.0))
    options = SetOptions({}, kid_subset=50, kid_subsets=20)
    found = sets.scores(options, {"near": near, "far": far, "few": near[:100]}, real)
    assert list(found) == ["frechet", "kid", "precision", "recall"]
    for metric, more in sets.METRICS.items():
        rows = found[metric]
        better, worse = (rows["near"], rows["far"]) if more else (rows["far"], rows["near"])
        assert better.low > worse.high
        assert all(row.low < row.mean < row.high for row in rows.values())
    widths = {arm: found["kid"][arm].high - found["kid"][arm].low for arm in ("near", "few")}
    assert widths["few"] / widths["near"] == pytest.approx(2, rel=0.5)  # a quarter of the items
    assert found["frechet"]["far"].mean == pytest.approx(4, rel=0.2)  # a shift by 1 in each of 4


def test_the_interval_is_that_of_the_statistic(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    real = torch.randn(300, 3, generator=g)
    options = SetOptions({}, metrics=("frechet",), halves=200)
    draws = [torch.randn(100, 3, generator=g) + 0.5 for _ in range(60)]
    alone = SetOptions({}, metrics=("frechet",), halves=0)
    values = torch.tensor([sets.scores(alone, {"a": x}, real)["frechet"]["a"].mean for x in draws])
    one = sets.scores(options, {"a": draws[0]}, real)["frechet"]["a"]
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * values.std().item(), rel=0.4)


def test_without_halves_there_is_no_interval() -> None:
    x = torch.rand(20, 3)
    row = sets.scores(SetOptions({}, metrics=("frechet",), halves=0), {"a": x}, x)["frechet"]["a"]
    assert row.mean == pytest.approx(0, abs=1e-9) and math.isnan(row.low) and math.isnan(row.high)


def test_pictures_in_8_bits_are_those_of_a_file() -> None:
    assert in_8_bits(torch.tensor([-0.1, 0.0, 0.5, 0.9999, 2.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.long
def test_inception_is_torch_fidelitys_network_with_given_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # a network with random weights: its constructor only knows files
        patch.setattr(network, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        net = network("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    measure = Inception(str(tmp_path / "w.pth"))
    pixels = torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8)
    assert torch.equal(measure(pixels), net(pixels)[0])
    clean = Inception(str(tmp_path / "w.pth"), resize="bicubic")
    assert clean(pixels).shape == (1, 2048) and not torch.equal(clean(pixels), measure(pixels))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="are not those of the FID Inception"):
        Inception(str(tmp_path / "other.safetensors"))

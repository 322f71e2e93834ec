"""evaluate.py on folders: finished pictures, and a run by its own config."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

import adapters  # noqa: F401
import ldm.training.run  # noqa: F401
from ldm import registry
from ldm.data.synthetic import SyntheticData, SyntheticOptions
from ldm.data.transforms import to_pixels
from scripts import evaluate, train
from tests.integration.test_evaluate import HELD_OUT, SIZE, TINY, record
from tests.integration.test_evaluate_sets import VIT, judged


def pictures(folder: Path, *, seed: int = 0, count: int = 5, size: int = 16, captions: str = "") -> Path:
    """A folder of scenes, as files 0.png, 1.png, ..."""
    data = SyntheticData(SyntheticOptions(size=size, length=count, seed=seed))
    folder.mkdir()
    rows: list[dict[str, str]] = []
    for i in range(count):
        Image.fromarray(to_pixels(data[i].image).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.png", "prompt" if captions == "samples.jsonl" else "text": data[i].text})
    if captions:
        (folder / captions).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(tmp_path: Path, *overrides: str) -> list[str]:
    config = tmp_path / "judge.yaml"
    config.write_text("seed: 0\n")
    wanted = [] if "evaluation={}" in overrides else judged(tmp_path)
    return ["--config", str(config), "--images", str(tmp_path / "drawn"), *wanted, *overrides]


def test_a_folder_is_measured_beside_the_real_pictures_of_the_same_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "drawn", seed=1)
    real = pictures(tmp_path / "real")
    args = [*arguments(tmp_path, "sample.batch=2"), "--reference", str(real)]
    evaluate.main(args)
    found = record(tmp_path / "drawn")
    assert list(found["pictures"]["psnr"]) == ["pictures", "ground_truth", "chance"]
    assert found["pictures"]["psnr"]["ground_truth"]["mean"] == pytest.approx(100)
    assert found["pictures"]["psnr"]["pictures"]["mean"] < 30
    assert list(found["sets"]["judge"]["frechet"]) == ["pictures"]
    assert found["items"] == 5 and found["images"] == str(tmp_path / "drawn") and "seeds" not in found
    assert list(found["weights"]) == [str(tmp_path / "vit.safetensors")]
    assert f"5 items, pictures of {tmp_path / 'drawn'}; mean" in capsys.readouterr().out
    assert (tmp_path / "drawn" / "eval" / "grid.png").is_file()
    evaluate.main(["--config", args[1], "--images", str(real), *args[4:]])  # itself
    same = record(real)
    assert same["sets"]["judge"]["frechet"]["pictures"]["mean"] == pytest.approx(0, abs=1e-9)
    assert same["pictures"]["ssim"]["pictures"] == same["pictures"]["ssim"]["ground_truth"]


def test_sets_need_no_pairs_and_captions_come_with_the_samples(tmp_path: Path) -> None:
    pictures(tmp_path / "drawn", captions="samples.jsonl")
    Image.new("RGB", (90, 30)).save(tmp_path / "drawn" / "grid.png")  # as sample.py leaves one
    reference = pictures(tmp_path / "real", seed=1, count=7, size=24)
    args = arguments(tmp_path, "evaluation.pictures=null")
    evaluate.main([*args, "--reference", str(reference)])
    found = record(tmp_path / "drawn")
    assert found["items"] == 5 and found["references"]["judge"]["items"] == 7
    assert found["references"]["judge"]["size"] == "16x16" and found["pictures"] == {}


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        (
            {},
            [],
            "images is",
        ),
        ({"drawn": 2}, [], "psnr compares with real pictures: give --reference"),
        ({"drawn": 2}, ["evaluation.pictures=null"], "sets.judge.reference is null: set it, or give --reference"),
        ({"drawn": 3, "real": 2}, [], "has none named like 2.png"),
        ({"drawn": 1, "real": 2}, [], "frechet needs 2 pictures, "),
        (
            {"drawn": 2, "real": 2},
            ["evaluation={}"],
            "neither evaluation.pictures nor",
        ),
        ({"drawn": 2, "real": 2}, ["evaluation.measures.a=psnr"], "there are no adapters"),
        ({"drawn": 2, "wide": 2}, [], "not square or not of one size"),
    ],
)
def test_what_a_folder_lacks_is_one_line(
    files: dict[str, int], overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files.keys() & {"drawn", "real"}:
        pictures(tmp_path / name, count=files[name])
    if "wide" in files:
        Image.new("RGB", (20, 10)).save(tmp_path / "drawn" / "wide.png")
    reference = ["--reference", str(tmp_path / "real")] if "real" in files or "wide" in files else []
    if "wide" in files:
        pictures(tmp_path / "real", count=3)
        (tmp_path / "real" / "2.png").rename(tmp_path / "real" / "wide.png")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*arguments(tmp_path, *overrides), *reference])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "drawn" / "eval").exists()


def test_captions_are_those_beside_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = {"name": "clip", "text": {"width": 8, "layers": 1, "heads": 1, "merges": 0}, "image": VIT, "embed_dim": 4}
    save_file(registry.build("clip", clip).state_dict(), tmp_path / "clip.safetensors")
    measure = {"name": "clip_t", "clip": {**clip, "weights": str(tmp_path / "clip.safetensors")}}
    args = arguments(tmp_path, "evaluation={}", f"evaluation.pictures={json.dumps(measure)}")
    drawn = pictures(tmp_path / "drawn", captions="metadata.jsonl")
    evaluate.main(args)
    listed = record(drawn)["pictures"]["clip_t"]
    assert list(listed) == ["pictures"]
    rows = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text().splitlines()]
    (drawn / "metadata.jsonl").unlink()
    for row in rows[1:]:
        (drawn / row["file"]).with_suffix(".txt").write_text(row["text"])
    with pytest.raises(SystemExit):
        evaluate.main(args)
    assert "clip_t reads captions, but 0.png of" in capsys.readouterr().err
    (drawn / "0.txt").write_text(rows[0]["text"] + "\n")
    evaluate.main(args)
    assert record(drawn)["pictures"]["clip_t"] == listed


def test_a_run_is_evaluated_by_its_own_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["train.steps=1", "train.batch=2", "data.size=16", "data.length=4"]
    run = tmp_path / "run"
    train.main(["--config", str(TINY / "vae.yaml"), *SIZE, *small, HELD_OUT, f"run.dir={run}"])
    evaluate.main(["--run", str(run)])
    figures = record(run)["figures"]
    assert {"psnr", "scale_factor"} <= figures.keys()
    run.rename(tmp_path / "moved")
    evaluate.main(["--run", str(tmp_path / "moved"), "validation.items=2"])
    assert record(tmp_path / "moved")["figures"] != figures
    for wrong in (["--run", "nowhere"], ["--run", "a", "--config", "b"], ["--reference", "a", "--config", "b"]):
        with pytest.raises(SystemExit):
            evaluate.main(wrong)
    said = capsys.readouterr().err
    assert "config.yaml does not exist" in said and "which stands alone" in said and "--reference goes with" in said

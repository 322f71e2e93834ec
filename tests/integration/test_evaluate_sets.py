"""evaluate.py on pictures themselves and sets of them: of a VAE, of a base model, over ranks."""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import adapters  # noqa: F401
import ldm.training.run  # noqa: F401
from ldm import config, registry
from ldm.evaluation import run
from ldm.registry import ConfigError
from scripts import evaluate
from tests.integration.test_evaluate import HELD_OUT, SIZE, TINY, record, saved, with_weights

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}


def judged(folder: Path, reference: Any = None) -> list[str]:
    """Overrides that measure pictures and sets with a random judge."""
    save_file(registry.build("image", VIT).state_dict(), folder / "vit.safetensors")
    features = {"name": "tower", "encoder": {**VIT, "weights": str(folder / "vit.safetensors")}}
    judge = {"features": features, "kid_subset": 2, "kid_subsets": 2, "neighbours": 1, "reference": reference}
    return [
        f"evaluation.sets={json.dumps({'judge': judge})}",
        f"evaluation.pictures={json.dumps(['psnr', 'ssim', 'edge_f1'])}",
        f"evaluation.cache={folder / 'cache'}",
    ]


def test_a_vae_is_measured_by_its_reconstructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = f"model.vae.weights={saved('vae', tmp_path)}"
    args = ["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, weights, f"run.dir={tmp_path}", *judged(tmp_path)]
    evaluate.main(args)
    found = record(tmp_path)
    rows = found["pictures"]["psnr"]
    assert list(rows) == ["reconstruction", "ground_truth", "chance"]
    assert rows["reconstruction"]["mean"] == pytest.approx(found["figures"]["psnr"], rel=1e-4)
    assert rows["ground_truth"]["mean"] == pytest.approx(100)
    assert list(found["sets"]["judge"]) == ["frechet", "kid", "precision", "recall"]
    assert found["sets"]["judge"]["frechet"]["reconstruction"]["mean"] > 0
    assert found["references"]["judge"] == {
        **{k: found["references"]["judge"][k] for k in ("data", "extractor", "file")},
        **{"resize": "bicubic", "size": "16x16", "items": 4},
    }
    assert "evaluation.sets.judge: frechet of 4 pictures in 8 dimensions" in found["marks"][0]
    assert {"torch", "torchvision", "open_clip_torch"} <= found["versions"].keys()
    assert str(tmp_path / "vit.safetensors") in found["weights"]
    table = capsys.readouterr().out
    assert "pictures: psnr (more) | pictures: ssim (more)" in table and "judge: frechet (less)" in table
    assert found["marks"][0] in table


def test_another_reference_shows_the_real_pictures_as_a_row(tmp_path: Path) -> None:
    other = {"name": "synthetic", "size": 16, "length": 5, "seed": 3}
    evaluate.main([*with_weights("ldm", tmp_path, HELD_OUT), *judged(tmp_path, other)])
    found = record(tmp_path)
    assert list(found["sets"]["judge"]["kid"]) == ["base", "ground_truth"]
    assert list(found["pictures"]["ssim"]) == ["base", "ground_truth", "chance"]
    assert found["measures"] == {} and found["arms"] == {"base": {}}
    assert found["references"]["judge"]["items"] == 5
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the reference, and the held-out items


def rank_main(index: int, port: int, arguments: list[str]) -> None:
    """One process as torchrun starts it."""
    where = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()})
    evaluate.main(arguments)


def test_two_ranks_make_the_table_of_one(tmp_path: Path) -> None:
    held_out = HELD_OUT.replace("length: 4", "length: 5")  # batches of 2, 2 and 1: one for the first rank
    args = [*with_weights("controlnet", tmp_path, held_out), *judged(tmp_path)]
    evaluate.main([*args, f"run.dir={tmp_path / 'one'}"])
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = multiprocessing.get_context("fork")  # spawned ones would import torch again, twice
    two = [*args, f"run.dir={tmp_path / 'two'}"]
    ranks = [context.Process(target=rank_main, args=(i, port, two)) for i in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    a, b = record(tmp_path / "one"), record(tmp_path / "two")
    assert a.pop("config") != b.pop("config")
    assert a == b and a["items"] == 5
    assert (tmp_path / "one/eval/grid.png").read_bytes() == (tmp_path / "two/eval/grid.png").read_bytes()


def test_a_check_before_training_needs_no_weights_of_the_run(tmp_path: Path) -> None:
    overrides = [*SIZE, HELD_OUT, "model.unet.weights=none.safetensors", *judged(tmp_path)]
    run.check(config.load(TINY / "controlnet.yaml", overrides))
    few = [*overrides, "evaluation.sets.judge.kid_subset=5"]
    with pytest.raises(ConfigError, match=r"kid needs 5 pictures, validation.data .* has 4"):
        run.check(config.load(TINY / "controlnet.yaml", few))
    (tmp_path / "vit.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"vit.safetensors do not exist"):
        run.check(config.load(TINY / "controlnet.yaml", overrides))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("vae", "evaluation.measures.edge=edge_f1", "evaluation.measures is set, but there are no adapters"),
        ("clip", "evaluation.pictures=psnr", "stage clip makes no pictures"),
        (
            "controlnet",
            "evaluation.measures.edge=psnr",
            "edge is psnr, which reads the picture: set evaluation.pictures",
        ),
        ("controlnet", "evaluation.pictures=[psnr,psnr]", "evaluation.pictures has psnr twice"),
        ("controlnet", "sample.batch=3 evaluation.captions=next", "of 4 items in batches of sample.batch=3 one"),
        ("controlnet", "evaluation.sets.judge=frechet", "evaluation.sets.judge is 'frechet', must be a mapping"),
    ],
)
def test_what_does_not_fit_a_stage_is_one_line(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.check(config.load(TINY / f"{name}.yaml", [*SIZE, HELD_OUT, *override.split()]))

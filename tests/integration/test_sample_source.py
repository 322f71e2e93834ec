"""scripts/sample.py with images and masks, from a config to files, with small random models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import adapters  # noqa: F401  registers them
from ldm import config as configs
from ldm import registry
from ldm.registry import ConfigError
from ldm.sampling import output, plan
from scripts import sample

UNET = {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "context_dim": 16, "num_heads": 2}
MODELS = {
    "unet": UNET | {"groups": 4},
    "vae": {"name": "kl", "channels": [8, 8], "blocks": 1, "groups": 4, "scale_factor": 1.0},
    "text": {"name": "clip", "width": 16, "layers": 1, "heads": 2, "merges": 100, "context_length": 16},
}


def save(kind: str, node: dict[str, object], path: Path) -> dict[str, object]:
    module: nn.Module = registry.build(kind, node)
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():  # what training starts at zero would hide everything else
            nn.init.normal_(weight, std=0.1)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    return node | {"weights": str(path)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, two images, masks, and a config of image-to-image and of 9-channel inpainting."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for folder, colour in (("images", None), ("masks", "L")):
        (root / folder).mkdir()
        for name in ("a", "b"):
            picture = Image.effect_noise((32, 32), 90) if colour is None else Image.new("L", (32, 32))
            if colour is not None:
                picture.paste(255, (0, 0, 16, 32))
            picture.save(root / folder / f"{name}.png")
    Image.new("L", (32, 32)).save(root / "black.png")
    Image.new("L", (16, 16), 255).save(root / "small.png")
    Image.new("L", (32, 16), 255).save(root / "wide.png")
    nodes = {kind: save(kind, node, root / f"{kind}.safetensors") for kind, node in MODELS.items()}
    settings = {
        "prompts": ["a red apple", "an owl"],
        "image": str(root / "images"),
        "seeds": "3",
        "height": 16,
        "width": 16,
        "sampler": {"name": "ddim", "steps": 4},
        "precision": "fp32",
    }
    (root / "img2img.yaml").write_text(yaml.safe_dump({"model": nodes, "sample": settings}))
    wide = save("unet", MODELS["unet"] | {"in_channels": 9}, root / "nine.safetensors")
    settings = settings | {"mask": str(root / "masks")}
    (root / "inpainting.yaml").write_text(yaml.safe_dump({"model": nodes | {"unet": wide}, "sample": settings}))
    return root


@pytest.fixture
def draw(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script into a folder of this test; returns it."""

    def call(config: str, out: str, *overrides: str) -> Path:
        sample.main(["--config", str(models / f"{config}.yaml"), f"out.dir={tmp_path / out}", *overrides])
        return tmp_path / out

    return call


def pixels(file: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8).int()


def test_image_to_image_from_a_folder(draw: Callable[..., Path], models: Path) -> None:
    out = draw("img2img", "out")
    made = output.read_parameters(out / "00001_s3.png")
    assert made["source"] == {"image": str(models / "images" / "b.png"), "mask": None, "strength": 0.8}
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [Path(r["image"]).name for r in records] == ["a.png", "b.png"]
    width, height = Image.open(out / "grid.png").size
    assert width > 170 + 2 * 128 and height > 2 * 128  # image and one seed, enlarged, beside the labels
    full = draw("img2img", "full", "sample.strength=1")
    assert (pixels(out / "00000_s3.png") - pixels(full / "00000_s3.png")).abs().max() > 2


def test_inpainting_says_how_it_was_made_and_draws_itself_again(
    draw: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    out = draw("inpainting", "out", "sample.batch=1")
    made = output.read_parameters(out / "00001_s3.png")
    files = {"image": str(models / "images" / "b.png"), "mask": str(models / "masks" / "b.png")}
    assert made["source"] == files | {"strength": 1.0}
    (tmp_path / "again.yaml").write_text(json.dumps(made["config"]))
    sample.main(["--config", str(tmp_path / "again.yaml"), f"out.dir={tmp_path / 'again'}"])
    assert (pixels(tmp_path / "again" / "00000_s3.png") - pixels(out / "00001_s3.png")).abs().max() <= 1
    assert Image.open(out / "grid.png").width > 170 + 3 * 128  # image, mask and one seed


def test_the_content_of_image_and_mask_decides_the_pictures(
    draw: Callable[..., Path], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("images", "masks"):
        file = models / name / "b.png"
        before = file.read_bytes()
        draw("inpainting", name)
        Image.new("L", (32, 32), 200).save(file)
        with pytest.raises(SystemExit):
            draw("inpainting", name)
        said = capsys.readouterr().err
        assert "holds images of other settings" in said and f"e.g. out.dir={tmp_path / name}-2, or delete" in said
        file.write_bytes(before)


def test_a_record_wins_over_the_shared_files(models: Path) -> None:
    node = yaml.safe_load((models / "inpainting.yaml").read_text())
    node["sample"]["prompts"] = ["a", {"prompt": "b", "image": "x.png", "mask": "y.png"}]
    first, second = plan.plan(configs.from_mapping(node)).prompts
    assert first.image == models / "images" / "a.png" and first.mask == models / "masks" / "a.png"
    assert (second.image, second.mask) == (Path("x.png"), Path("y.png"))


@pytest.mark.parametrize("key", ["image", "mask"])
def test_a_file_for_some_prompts_only_is_refused(models: Path, key: str) -> None:
    node = yaml.safe_load((models / "img2img.yaml").read_text())
    node["sample"] |= {"prompts": [{"prompt": "a", "image": "x.png", key: "x.png"}, "b"]}
    if key == "image":
        del node["sample"]["image"]
    with pytest.raises(ConfigError, match=f"prompt 0 has {key}, prompt 1 none; give one to all prompts or to none"):
        plan.plan(configs.from_mapping(node))


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ("img2img", ["sample.image=null", "sample.strength=0.5"], "sample.strength is 0.5 without an image"),
        ("img2img", ["sample.strength=0"], "strength is 0.0; allowed: above 0, up to 1"),
        ("img2img", ["sample.strength=1.5"], "strength is 1.5; allowed: above 0, up to 1"),
        ("img2img", ["sample.strength=.nan"], "strength is nan; allowed: above 0, up to 1"),
        ("img2img", ["sample.strength=0.2"], "leaves none of 4 steps; allowed: 0.25..1"),
        ("img2img", ["sample.image=nowhere.png"], "sample.image is nowhere.png, which does not exist"),
        ("img2img", ["sample.image=wide.png"], "16x32 (h w), the picture 16x16: not the same shape; crop the image"),
        ("img2img", ["sample.prompts=[a,b,c]"], "sample.image: folder"),
        ("img2img", ["sample.height=18", "sample.width=18"], "must be multiples of 4"),
        ("img2img", ["sample.sampler.name=dpm"], "sampler.name is 'dpm'"),
        ("img2img", ["sample.sampler.steps=0"], "sampler.steps is 0; allowed 1..1000"),
        ("img2img", ["sample.sampler.steps=10000"], "sampler.steps is 10000; allowed 1..1000"),
        ("inpainting", ["sample.image=null"], "and no image; set sample.image, or drop the mask"),
        ("inpainting", ["sample.mask=null"], "an inpainting UNet without a mask; it always needs image and mask"),
        ("inpainting", ["sample.image=null", "sample.mask=null"], "an inpainting UNet without a mask"),
        ("inpainting", ["sample.mask=small.png"], "small.png is 16x16 (h w), its image"),
        ("inpainting", ["sample.mask=black.png"], "black.png has no white pixel"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--config", str(models / f"{config}.yaml"), f"out.dir={tmp_path / 'out'}", *overrides])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_dry_run_checks_the_unet_and_names_absent_images(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(["--config", str(models / "img2img.yaml"), "--dry-run", "sample.image=nowhere.png"])
    assert "not there yet: nowhere.png" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sample.main(["--config", str(models / "inpainting.yaml"), "--dry-run", "sample.mask=null"])
    assert "an inpainting UNet without a mask" in capsys.readouterr().err

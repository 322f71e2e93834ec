"""scripts/sample.py --from: a picture from its own text chunk, and chunks that somebody tampered with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from ldm import config as configs
from ldm.sampling import output, plan
from scripts import sample
from tests.integration.test_sample import refusal, small_models

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
Draw = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def draw(models: Path, tmp_path: Path) -> Draw:
    def call(name: str, *overrides: str) -> Path:
        sample.main(["--config", str(models / "config.yaml"), f"out.dir={tmp_path / name}", *overrides])
        return tmp_path / name

    return call


def again(picture: Path, out: Path, *more: str) -> Path:
    sample.main(["--from", str(picture), f"out.dir={out}", *more])
    return out / picture.name


@pytest.mark.parametrize("prepack", ["true", "false"])
def test_every_picture_comes_back_bit_for_bit(draw: Draw, tmp_path: Path, prepack: str) -> None:
    """With a ControlNet, two prompts of different length, and batches of three and one."""
    out = draw("out", f"sample.prepack={prepack}", "sample.precision=bf16")
    for name in ("00000_s5.png", "00001_s5.png"):
        assert again(out / name, tmp_path / "again").read_bytes() == (out / name).read_bytes()
    assert not (tmp_path / "again" / "config.yaml").exists()


def test_pictures_of_image_to_image_and_of_a_sweep_come_back(draw: Draw, tmp_path: Path, models: Path) -> None:
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "source.png")
    sweep = "grid={adapters.net.scale: [0, 0.5], sample.guidance.scale: [1, 3]}"
    out = draw("swept", sweep, f"sample.image={tmp_path / 'source.png'}", "sample.strength=0.7", "sample.seeds=3")
    names = sorted(path.name for path in out.glob("*_s*.png"))
    assert len(names) == 8
    for name in (names[0], names[3]):
        assert again(out / name, tmp_path / "again").read_bytes() == (out / name).read_bytes()
    Image.new("RGB", (32, 32)).save(tmp_path / "source.png")
    with pytest.raises(SystemExit):
        again(out / names[0], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_picture_that_was_edited_is_told_so(
    draw: Draw,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = draw("out") / "00000_s3.png"
    text, picture = output.read_png(file)
    picture.putpixel((0, 0), tuple(255 - v for v in picture.getpixel((0, 0))))  # pyright: ignore
    edited = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1) / 255
    (tmp_path / "edited.png").write_bytes(output.encode(edited, text))
    with caplog.at_level("INFO"):
        again(file, tmp_path / "again")
        again(tmp_path / "edited.png", tmp_path / "again")
    said = [r.getMessage() for r in caplog.records if "again" in r.getMessage()]
    assert "bit for bit" in said[0] and "in 3 of 768 values" in said[1]


def test_changed_weights_are_refused_by_name(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    (moved / "config.yaml").write_text((moved / "config.yaml").read_text().replace(str(models), str(moved)))
    sample.main(["--config", str(moved / "config.yaml"), f"out.dir={tmp_path / 'out'}", "sample.seeds=3"])
    picture, base = tmp_path / "out" / "00000_s3.png", ["--from", str(tmp_path / "out" / "00000_s3.png")]
    base.append(f"out.dir={tmp_path / 'again'}")
    with (moved / "net.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    line = refusal(capsys, base)
    assert f"adapters.net.weights {moved / 'net.safetensors'} is not the file" in line
    sample.main([*base, f"adapters.net.weights={models / 'net.safetensors'}"])
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    whole = [*base, f"adapters.net.weights={models / 'net.safetensors'}"]
    assert "cannot count; allowed: out.dir" in refusal(capsys, [*base, "sample.seeds=4"])
    assert "written over" in refusal(capsys, [*whole, f"out.dir={picture.parent}"])
    shutil.copy(tmp_path / "out" / "00001_s3.png", tmp_path / "again" / picture.name)
    assert "is another picture" in refusal(capsys, whole)
    (moved / "vae.safetensors").unlink()
    assert "vae.safetensors" in refusal(capsys, whole)


def test_a_file_beside_the_weights_counts_as_one(models: Path, tmp_path: Path) -> None:
    node = yaml.safe_load((models / "config.yaml").read_text())
    some = str(models / "net.safetensors")
    see = {"name": "seecoder", "weights": some, "unconditional": some, "encoder": {"name": "swin", "weights": some}}
    _, weights = plan.pin_weights(configs.from_mapping(node | {"adapters": {"see": see}}))
    assert weights["adapters.see.unconditional"] == Path(some)


def test_its_config_can_be_printed(
    draw: Draw,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = draw("out") / "00000_s5.png"
    capsys.readouterr()
    sample.main(["--from", str(file), "--print-config", "sample.guidance.scale=2"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["sample"]["seeds"], config["sample"]["guidance"]["scale"]) == ("5", 2.0)
    sample.main(["--from", str(file), "--dry-run"])
    assert "1 prompts x 1 seeds = 1 images of 16x16" in capsys.readouterr().out
    assert "a picture has none" in refusal(capsys, ["--from", str(file), "--explain"])
    assert "exclude each other" in refusal(capsys, ["--from", str(file), "--run", "x"])


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


def set_at(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            made = made[part]
        made[last] = value

    return change


HOSTILE = {
    "secret": (set_at("batch", [{"prompt": "a", "hints": {"net": "SECRET"}, "seed": 1}]), "does not say the sha256"),
    "file of prompts": (set_at("batch", "SECRET.txt"), "batch and row must be"),
    "device file": (set_at("config.model.vae.weights", "/dev/zero"), "is no file"),
    "weights elsewhere": (set_at("config.model.vae.weights", "SECRET"), "is not the file"),
    "import": (set_at("config.adapters.net.name", "os.system"), "adapter.name is 'os.system'"),
    "environment": (set_at("config.model.vae.weights", "${oc.env:HOME}"), "carries the reference"),
    "growth": (set_at("config.model.unet.grown", ["${.1}${.1}", "AAAA"]), "carries the reference"),
    "unknown key": (set_at("config.sample.exec", "x"), "unknown key"),
    "huge": (set_at("config.sample.height", 1_000_000), "allowed: up to 100,000"),
    "wide": (set_at("config.model.unet.channels", [10**9, 10**9]), "allowed: up to 100,000"),
    "another size": (set_at("config.sample.height", 4096), "it was changed"),
    "deep": (set_at("config.sample.sampler", nested(100)), "nested mappings"),
    "many": (set_at("batch", [{"prompt": "a", "seed": 1}] * 1000), "1 to 256 records"),
    "seed": (set_at("batch", [{"prompt": "a", "seed": -1}]), "batch and row must be"),
    "row": (set_at("row", 99), "batch and row must be"),
    "old": (set_at("files", None), "an older version drew it"),
    "no config": (set_at("config", []), "carries no config"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chunk_is_one_line_and_writes_nothing(
    name: str,
    draw: Draw,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (source := tmp_path.parent / "hostile-source" / "00000_s3.png").exists():
        shutil.copytree(draw("out", "sample.seeds=3"), source.parent)
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "SECRET"
    Image.new("RGB", (16, 16)).save(secret, "PNG")
    made = output.read_parameters(source)
    made["config"]["out"] = {"dir": str(tmp_path / "escaped")}
    change, said = HOSTILE[name]
    change(made)
    (tmp_path / "bad.png").write_bytes(output.encode(torch.zeros(3, 16, 16), json.dumps(made)))
    before = sorted(tmp_path.rglob("*"))
    assert said in refusal(capsys, ["--from", "bad.png"])
    assert sorted(tmp_path.rglob("*")) == before


def chunked(path: Path, text: str | None, size: tuple[int, int] = (16, 16)) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("parameters", text, zip=True)
    Image.new("1", size).save(path, "PNG", pnginfo=info)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: p.write_text("no picture"), "is not a PNG"),
        (lambda p: Image.new("RGB", (4, 4)).save(p, "JPEG"), "is not a PNG"),
        (lambda p: chunked(p, None), "is not a PNG with a 'parameters' text chunk; name"),
        (lambda p: chunked(p, "steps: 20"), "is not JSON"),
        (lambda p: chunked(p, "[" * 500_000), "is not JSON"),
        (lambda p: chunked(p, "[]"), "is no mapping"),
        (lambda p: chunked(p, " " * 80_000_000), "is not a PNG"),
        (lambda p: chunked(p, "{}", (20_000, 20_000)), "more than 67108864 pixels"),
        (lambda p: None, "is missing"),
    ],
    ids=["text", "jpeg", "bare", "not json", "deep json", "no mapping", "text bomb", "picture bomb", "absent"],
)
def test_files_that_carry_nothing_are_refused(
    write: Callable[[Path], Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "picture.png")
    assert said in refusal(capsys, ["--from", str(tmp_path / "picture.png")])


def test_a_sheet_names_the_pictures_beside_it(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = draw("sheet")
    said = refusal(capsys, ["--from", str(out / "grid.png")])
    assert said == f"error: {out / 'grid.png'} is a sheet; name one of the pictures beside it, e.g. 00000_s3.png"


def test_shipped_models_come_back_through_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    few = ["sample.prompts=a noto emoji of a house", "sample.seeds=1", "sample.sampler.steps=2"]
    sample.main([f"out.dir={tmp_path / 'out'}", *few])
    picture = tmp_path / "out" / "00000_s1.png"
    assert again(picture, tmp_path / "again").read_bytes() == picture.read_bytes()

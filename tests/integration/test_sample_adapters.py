"""scripts/sample.py: the keys that every adapter has besides its own, from a config to files."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ldm import config as configs
from ldm import registry
from ldm.data import transforms
from ldm.sampling import output, plan
from scripts import sample
from tests.integration.test_sample import pixels, refusal, small_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `small_models`, with `plain.yaml`, which names no hint, and a mask without white."""
    root = small_models(tmp_path_factory.mktemp("models"))
    node = yaml.safe_load((root / "config.yaml").read_text())
    node["sample"]["hints"] = {}
    (root / "plain.yaml").write_text(yaml.safe_dump(node))
    Image.new("L", (16, 16)).save(root / "black.png")
    return root


@pytest.fixture
def draw(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script into a folder of this test, one picture; returns the folder."""

    def call(name: str, *overrides: str) -> Path:
        settings = [f"out.dir={tmp_path / name}", "sample.seeds=3", "sample.prompts=an owl", *overrides]
        sample.main(["--config", str(models / "config.yaml"), *settings])
        return tmp_path / name

    return call


def same(a: Path, b: Path) -> bool:
    one, other = pixels(a), pixels(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_extractor_makes_the_hint_of_an_ordinary_picture(
    draw: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    picture = transforms.resize(Image.open(models / "hint.png").convert("RGB"), 16, crop="center", hint=False)
    lines = transforms.extracted(registry.build("hint", {"name": "sketch"}), picture)
    Image.fromarray(lines.mul(255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "lines.png")
    made = draw("made", "adapters.net.extractor=sketch")
    assert same(made, draw("given", f"sample.hints.net={tmp_path / 'lines.png'}"))
    assert not same(made, draw("plain"))


def test_an_adapters_own_image_is_heard_recorded_and_checked(
    draw: Callable[..., Path], models: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes((models / "hint.png").read_bytes())
    own = ["--config", str(models / "plain.yaml"), f"adapters.net.image={mine}"]
    out = draw("own", *own)
    assert same(out, draw("shared"))
    made = output.read_parameters(out / "00000_s3.png")
    assert made["adapters"]["net"]["image"] == made["config"]["adapters"]["net"]["image"] == str(mine)
    assert configs.load(out / "config.yaml").adapters["net"]["image"] == str(mine)
    (tmp_path / "again.yaml").write_text(json.dumps(made["config"]))
    sample.main(["--config", str(tmp_path / "again.yaml"), f"out.dir={tmp_path / 'again'}"])
    assert same(out, tmp_path / "again")
    Image.new("RGB", (16, 16), "white").save(mine)
    with pytest.raises(SystemExit):  # the folder holds pictures of another content
        draw("own", *own)
    assert not same(out, draw("white", *own))


def test_hints_win_over_an_adapters_own_image(models: Path) -> None:
    for name, rest in (("plain", "mine.png"), ("config", "hint.png")):
        prompts = "sample.prompts=[{prompt: a, hints: {net: its.png}}, b]"
        config = configs.load(models / f"{name}.yaml", ["adapters.net.image=mine.png", prompts])
        assert [prompt.hints["net"].name for prompt in plan.plan(config).prompts] == ["its.png", rest]


def test_an_adapter_without_a_hint_is_said_to_be_silent(
    draw: Callable[..., Path], models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        draw("silent", "--config", str(models / "plain.yaml"))
    said = [record.getMessage() for record in caplog.records if "stays silent" in record.getMessage()]
    assert said == ["adapter 'net' has no hint and stays silent; set adapters.net.image or sample.hints.net"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapters.net.scale=.nan"], "adapters.net: scale is nan"),
        (["adapters.net.start=0.9", "adapters.net.end=0.1"], "0 <= start <= end <= 1"),
        (["adapters.net.hint_channels=1"], "mis-shaped: hint.convs.0.weight"),
        (["adapters.net=controlnet"], "adapters.net is 'controlnet', must be a mapping"),
        (["adapters.net.guess=nope"], "adapters.net: guess is 'nope', must be bool"),
        (["adapters.net.weights=null"], "adapters.net.weights is not set"),
        (["adapters.net.scal=1"], "adapters.net has the unknown key 'scal'; "),
        (["adapters.net.extractor=sketsh"], "hint.name is 'sketsh'; registered: canny"),
        (["adapters.net.extractor=5"], "adapters.net: extractor is 5, must be str | a mapping | null"),
        (["adapters.net.extractor=[sketch]"], "adapters.net: extractor is ('sketch',), must be str | a mapping"),
        (["adapters.net.extractor={name: color, cell: 99}"], "cell is 99 pixels, the picture 16x16"),
        (["adapters.net.blocks=[1,2]"], "adapters.net: blocks is (1, 2), must be a mapping of names to float | null"),
        (["adapters.net.blocks=abc"], "adapters.net: blocks is 'abc', must be a mapping"),
        (["adapters.net.blocks=3"], "adapters.net: blocks is 3, must be a mapping"),
        (["adapters.net.blocks={1: 2}"], "adapters.net: blocks is {1: 2}, must be a mapping"),
        (["adapters.net.image=5"], "adapters.net: image is 5, must be str"),
        (["--config", "plain.yaml", "adapters.net.image=nowhere.png"], "adapters.net.image is nowhere.png, which does"),
        (["--config", "plain.yaml", "adapters.net.image=."], "hint . is a folder; only image prompts take several"),
        (["adapters.net.mask=black.png"], "black.png has no white pixel, so adapters.net would count nowhere; make"),
        (
            ["adapters.p={name: ip_adapter, encoder: 5, weights: x}"],
            "error: adapters.p.encoder is 5, must be a mapping",
        ),
        (["grid={adapters.net.image: [a.png]}"], "'adapters.net.image', which no sweep can change"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(models)
    line = refusal(capsys, ["--config", "config.yaml", f"out.dir={tmp_path / 'out'}", *overrides])
    assert said in line, line
    assert not (tmp_path / "out").exists()


def test_a_suggested_folder_is_one_that_is_free(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("not of sampling")
    said = refusal(capsys, ["--config", str(models / "plain.yaml"), f"out.dir={tmp_path / 'mine'}"])
    assert said.endswith(f"did not write; choose another, e.g. out.dir={tmp_path / 'mine-3'}")


def test_resized_hints_are_said_once(
    draw: Callable[..., Path], models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    draw("shared")
    assert [m for m in caplog.messages if "resized to" in m] == [
        f"hint {models / 'hint.png'} of 'net' is 32x32 (w x h): resized to 16x16, that of the drawing; lines that fade "
        "are better drawn at that size"
    ]
    caplog.clear()
    Image.new("RGB", (16, 16)).save(tmp_path / "fits.png")
    draw("fits", f"sample.hints.net={tmp_path / 'fits.png'}")
    assert not [m for m in caplog.messages if "resized to" in m]

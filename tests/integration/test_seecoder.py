"""SeeCoder without a text encoder: trained, drawn with, evaluated, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters  # noqa: F401  (registers them)
from ldm import config, registry
from ldm.models.swin import Swin
from ldm.training import checkpoint, run
from scripts import evaluate, sample, train

ROOT = Path(__file__).resolve().parents[2]
TRAIN, SAMPLE = (ROOT / "configs" / kind / "tiny" / "seecoder.yaml" for kind in ("train", "sample"))
PICTURE = ROOT / "configs" / "sample" / "tiny" / "reference" / "2.png"
HINT = f"sample.hints.see={PICTURE}"
SHORT = ["device=cpu", "train.batch=4", "train.ema=null", "train.precision=fp32", "data.length=8"]
SHORT += ["validation.items=2", "validation.images=1", "stage.preview_steps=1", "sample.sampler.steps=1"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting that names a backbone with random weights, as a training of a CLIP leaves it."""
    encoder = config.load(TRAIN).adapters["see"]["encoder"]
    node = {k: v for k, v in encoder.items() if not k.startswith("weights")}
    file = tmp_path_factory.mktemp("swin") / "clip.safetensors"
    save_file({f"image.{k}": v for k, v in registry.build("image", node).state_dict().items()}, file)
    return f"adapters.see.encoder.weights={file}"


def start(folder: Path, swin: str, *more: str) -> Path:
    return run.train(config.load(TRAIN, [f"run.dir={folder}", *SHORT, swin, *more]))


@pytest.fixture(scope="module")
def trained(swin: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("seecoder")
        start(folder, swin, "train.steps=2")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    newest = checkpoint.latest(folder)
    assert newest is not None
    return load_file(newest / "adapter.safetensors")


def test_a_run_has_pictures_and_files_without_backbone_or_text(trained: Path) -> None:
    assert (trained / "images" / "step-00000002.png").is_file()
    found = weights(trained)
    assert {key.partition(".")[0] for key in found} == {"image_decoder", "query_transformer"}
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("cache", [True, False])
def test_cached_features_are_made_once_and_no_step_runs_the_backbone(
    cache: bool, swin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[int] = []
    stages = Swin.stages

    def counted(self: Swin, x: Tensor) -> tuple[Tensor, ...]:
        images.append(len(x))
        return stages(self, x)

    monkeypatch.setattr(Swin, "stages", counted)
    start(tmp_path, swin, "train.steps=3", f"stage.cache={str(cache).lower()}", "validation.data=null")
    assert images == ([8] if cache else [4, 4, 4])


def test_training_may_begin_without_the_position_of_pa(trained: Path, swin: str, tmp_path: Path) -> None:
    newest = checkpoint.latest(trained)
    begin = [f"train.init_from={newest}/adapter.safetensors", "adapters.see.position=true", "validation.data=null"]
    start(tmp_path, swin, "train.steps=1", "train.lr=0", *begin)
    before, after = weights(trained), weights(tmp_path)
    assert all(torch.equal(after.pop(name), value) for name, value in before.items())
    assert len(after) == 6 and all(name.startswith("query_transformer.position.mlp.") for name in after)
    assert not after["query_transformer.position.mlp.4.weight"].any()
    assert after["query_transformer.position.mlp.0.weight"].any()


def drawing(trained: Path, swin: str, folder: Path, *more: str) -> list[str]:
    own = [f"adapters.see.weights={trained}", "sample.seeds=0", "sample.precision=fp32", "device=cpu"]
    own += ["sample.prompts=['']", "sample.sampler.steps=1"]
    return ["--config", str(SAMPLE), swin, *own, f"out.dir={folder}", *more]


def test_pictures_follow_the_reference_and_only_it(trained: Path, swin: str, tmp_path: Path) -> None:
    for name, picture in (("a", PICTURE), ("b", PICTURE.with_name("0.png"))):
        sample.main(drawing(trained, swin, tmp_path / name, f"sample.hints.see={picture}"))
    files = [tmp_path / name / "00000_s0.png" for name in "ab"]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert json.loads((tmp_path / "a" / "samples.jsonl").read_text())["prompt"] == ""


def picture(folder: Path, name: str, width: int, height: int) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (width, height), "red").save(folder / name)
    return folder / name


def test_references_of_different_sizes_are_drawn_in_one_run(trained: Path, swin: str, tmp_path: Path) -> None:
    files = [picture(tmp_path / "in", f"{w}.png", w, h) for w, h in ((40, 24), (33, 50), (33, 50))]
    prompts = ", ".join(f"{{prompt: '', hints: {{see: {file}}}}}" for file in files[:2])
    sample.main(drawing(trained, swin, tmp_path / "both", f"sample.prompts=[{prompts}]"))
    sample.main(drawing(trained, swin, tmp_path / "alone", f"sample.hints.see={files[1]}", "sample.prompts=''"))
    together, alone = (Image.open(tmp_path / name) for name in ("both/00001_s0.png", "alone/00000_s0.png"))
    assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            [(40, 24), (33, 50)],
            "references of 'see' for one picture are 0.png 40x24, 1.png 33x50 pixels; give them one",
        ),
        ([(2, 2)], "0.png is 2x2 pixels as 'see' reads it (the longer side up to 1536); must be at least 4x4"),
        ([(3000, 5)], "0.png is "),
    ],
)
def test_references_that_cannot_be_read_are_named_before_anything_is_drawn(
    sizes: list[tuple[int, int]],
    said: str,
    trained: Path,
    swin: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i, (w, h) in enumerate(sizes):
        picture(tmp_path / "in", f"{i}.png", w, h)
    good = f"{{prompt: '', hints: {{see: {PICTURE}}}}}"
    bad = f"{{prompt: '', hints: {{see: {tmp_path / 'in' if len(sizes) > 1 else tmp_path / 'in' / '0.png'}}}}}"
    first = "" if len(sizes) > 1 else f"{good}, "
    with pytest.raises(SystemExit) as stop:
        sample.main(drawing(trained, swin, tmp_path / "x", f"sample.prompts=[{first}{bad}]"))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0], lines
    assert not list(tmp_path.glob("x/*.png"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([HINT, "adapters.see.guess=true"], "guess and skip_scales cannot act on it"),
        (
            [HINT, "sample.prompts=a red apple"],
            "a prompt is 'a red apple', but model.text is null, so nothing reads it",
        ),
        ([HINT, "sample.negative=ugly"], "a prompt is 'ugly', but model.text is null"),
        ([], "adapter 'see', which stands for the text, has no picture or scale 0"),
        ([HINT, "adapters.see.scale=0"], "adapter 'see', which stands for the text, has no picture or scale 0"),
        ([HINT, "adapters.see.scale=0.5"], "adapters.see speaks through the text's own attention: its scale is 0.5"),
        ([HINT, "adapters.see.end=0.5"], "adapters.see stands for the text, but start is 0 and end 0.5"),
        ([HINT, "sample.clip_skip=2"], "has no text encoder to use it; drop these keys"),
    ],
)
def test_what_nothing_would_hear_is_one_line(
    more: list[str], said: str, trained: Path, swin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sample.main(drawing(trained, swin, tmp_path / "x", *more))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0], lines


def test_evaluation_has_no_arm_without_a_context(trained: Path, swin: str) -> None:
    vit = "{name: vit, image_size: 32, patch: 8, width: 64, layers: 2, heads: 2, weights_prefix: image., "
    vit += "weights: checkpoints/tiny/clip.safetensors}"
    measure = f"evaluation.measures.see={{name: clip_i, encoder: {vit}}}"
    evaluate.main(["--config", str(TRAIN), f"run.dir={trained}", *SHORT, swin, measure])
    found = json.loads((trained / "eval" / "eval.json").read_text())
    assert list(found["arms"]) == ["see"] and {name.partition("_")[0] for name in found["figures"]} == {"loss"}
    assert set(found["measures"]["see"]["clip_i"]) == {"see", "ground_truth", "chance"}
    assert (trained / "eval" / "grid.png").is_file()


def test_a_text_encoder_is_wanted_where_nothing_stands_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--config", str(TRAIN.with_name("controlnet.yaml")), "model.text=null", "--dry-run"])
    assert "model.text is not set" in capsys.readouterr().err

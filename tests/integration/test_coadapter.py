"""A T2I-Adapter, a style adapter and their fuser: trained, stored apart, drawn with and evaluated."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapters  # noqa: F401  (registers them)
from ldm import build, config
from ldm.config import RunConfig
from ldm.evaluation.run import evaluate
from ldm.registry import ConfigError
from ldm.training import checkpoint, run
from scripts import sample

ROOT = Path(__file__).resolve().parents[2]
HINT = ROOT / "configs" / "sample" / "tiny" / "edge" / "circle.png"
VIT = "{name: vit, image_size: 32, patch: 8, width: 64, layers: 2, heads: 2, weights: checkpoints/tiny/clip.safetensors"
SETTINGS = [
    f"adapters.style={{name: t2i_style, tokens: 4, depth: 1, encoder: {VIT}, weights_prefix: image.}}}}",
    "fuser={name: coadapter, depth: 1, tasks: {sketch: canny}}",
    "stage.all_or_none=[0.1, 0.1]",
    "stage.drop_hint=0.5",
    "data.reference=true",
    "data.length=8",
    "validation.data.reference=true",
    "validation.items=2",
    "validation.images=1",
    'train.trainable=["adapters.*", "fuser.*"]',
    "train.batch=4",
    "train.ema=null",
    "train.precision=fp32",
    "evaluation.measures={style: []}",
    "sample.sampler.steps=1",
    "device=cpu",
]


def settings(folder: Path, *more: str) -> RunConfig:
    return config.load(
        ROOT / "configs" / "train" / "tiny" / "t2i_adapter_sketch.yaml", [f"run.dir={folder}", *SETTINGS, *more]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("coadapter")
        run.train(settings(folder, "train.steps=3"))
    return folder


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_each_part_has_a_file_and_the_fuser_learns(trained: Path) -> None:
    folder = checkpoint.latest(trained)
    assert folder is not None
    files = {path.stem for path in folder.glob("*.safetensors")}
    assert files == {"adapter.sketch", "adapter.style", "fuser"}
    fuser: dict[str, Tensor] = load_file(folder / "fuser.safetensors")
    assert all(fuser[name].any() for name in ("write.0.weight", "write.1.bias", "write_tokens"))  # all zero when fresh
    loaded = build.denoiser(settings(trained, f"fuser.weights={folder / 'fuser.safetensors'}"))
    assert loaded.fuser is not None
    assert all(torch.equal(v, fuser[k]) for k, v in loaded.fuser.state_dict().items())


def test_a_run_draws_with_its_fuser_and_without_a_hint(trained: Path, tmp_path: Path) -> None:
    for name, hints in (("both", f"{{sketch: {HINT}, style: {HINT}}}"), ("one", f"{{sketch: {HINT}}}")):
        more = [f"sample.hints={hints}", "sample.prompts=a red circle", "sample.seeds=0", "sample.sampler.steps=1"]
        sample.main(["--run", str(trained), *more, "sample.precision=fp32", f"out.dir={tmp_path / name}"])
    drawn = {(tmp_path / name / "00000_s0.png").read_bytes() for name in ("both", "one")}
    assert len(drawn) == 2


def test_evaluation_reads_the_runs_fuser_and_names_it(trained: Path, tmp_path: Path) -> None:
    result = evaluate(settings(trained))
    assert [path.name for path in result.trained] == [
        "adapter.sketch.safetensors",
        "adapter.style.safetensors",
        "fuser.safetensors",
    ]
    shutil.rmtree(trained / "eval")
    given = settings(tmp_path, *(f"adapters.{name}.weights={trained}" for name in ("sketch", "style")))
    with pytest.raises(
        ConfigError, match=r"^run\.dir .* has no complete checkpoint; train it first, or set fuser\.weights=FILE$"
    ):
        evaluate(given)


def test_another_fuser_is_another_run(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"of a run with fuser\.depth=1, not 2"):
        run.train(settings(trained, "train.steps=4", "fuser.depth=2"))

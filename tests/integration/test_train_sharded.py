"""Training in shards (FSDP2) on two ranks: the same run as one rank, really in shards, exactly resumed, one file out.

The two-rank runs share two processes, since starting those takes longest; single-rank ones run here.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters  # noqa: F401
from ldm import config
from ldm.registry import ConfigError
from ldm.training import checkpoint, run
from tests.ranks import launch_two_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "train" / "tiny"
SMALL = ["device=cpu", "train.threads=1", "train.precision=fp32", "train.steps=20", "train.batch=4", "train.ema=0.9"]
SMALL += ["train.warmup=0", "train.decay=constant", "data.length=64", "data.size=16", "log.every=1"]
SMALL += ["checkpoint.every=10", "checkpoint.keep_last=9", "validation.data=null", "stage.cache=false"]
SMALL += ["model.vae.weights=null", "model.text.weights=null", "model.unet.weights=null"]
SMALL += ["model.unet.channels=[16,32]", "model.unet.blocks=1"]
HELD_OUT = ["validation.data={name: synthetic, size: 16, length: 4, seed: 1, hints: [edge]}", "validation.every=10"]
HELD_OUT += ["validation.images=1", "stage.preview_steps=2"]
MIXED = ["train.precision=bf16", "train.steps=3", "train.micro_batch=1", "train.checkpoint_activations=true"]
VIT = "{name: vit, image_size: 32, patch: 16, width: 8, layers: 1, heads: 1}"
PARTIAL = [f"adapters.style={{name: t2i_style, tokens: 3, depth: 1, encoder: {VIT}}}"]  # queries 1 n d: a rank has none
PARTIAL += ["fuser={name: coadapter, depth: 1, tasks: {sketch: canny}}", 'train.trainable=["adapters.*", "fuser.*"]']
PARTIAL += ["stage.all_or_none=[0.1, 0.1]", "stage.drop_hint=0.5", "data.reference=true", "checkpoint.every=1"]
HALVED = ["train.shard=full", "train.moments=bf16", "checkpoint.every=2"]
KINDS = ("optimizer", "full")

PROLOGUE = """
import json
from pathlib import Path
from ldm.training import distributed, run, shards

begin, real = run.train, shards.shard
def named(config):
    global folder
    folder = Path(config.run.dir).parent
    folder.mkdir(exist_ok=True)
    return begin(config)
def noted(stage, how, rank):
    real(stage, how, rank)
    held = {True: [0, 0], False: [0, 0]}
    for p in stage.trained.parameters():
        held[p.requires_grad][0] += distributed.local(p).numel()
        held[p.requires_grad][1] += p.numel()
    (folder / f"held-{rank.index}.json").write_text(json.dumps(held))
run.train, shards.shard = named, noted
"""


def overrides(folder: Path, *more: str) -> list[str]:
    return [f"run.dir={folder / 'run'}", *SMALL, *more]


def start(what: str, folder: Path, *more: str) -> Path:
    return run.train(config.load(TINY / f"{what}.yaml", overrides(folder, *more)))


def scalars(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (folder / "run" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


@dataclass(frozen=True)
class Runs:
    """Folders: one rank's runs under `one`, two ranks' under `two`, by name."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    start("ldm", one / "ldm")
    base = f"model.unet.weights={one / 'ldm' / 'run'}"  # trained a little: a fresh UNet's output layer is zero
    start("controlnet", one / "controlnet", base, *HELD_OUT)
    start("controlnet", one / "mixed", base, *MIXED)
    start("t2i_adapter_sketch", one / "partial", base, *PARTIAL, "train.steps=3")
    copy_first_half(one / "ldm", two / "ldm joined")
    planned = [("controlnet", two / f"controlnet {kind}", [f"train.shard={kind}", base, *HELD_OUT]) for kind in KINDS]
    planned += [("controlnet", two / f"mixed {kind}", [f"train.shard={kind}", base, *MIXED]) for kind in KINDS]
    planned += [("ldm", two / "ldm optimizer", ["train.shard=optimizer"])]
    planned += [("ldm", two / "ldm full", ["train.shard=full", f"train.steps={n}"]) for n in (10, 20)]
    planned += [("ldm", two / "ldm joined", ["train.shard=full", "train.steps=12"])]
    ends = [f"train.steps={n}" for n in (2, 3)]
    planned += [("t2i_adapter_sketch", two / "partial", ["train.shard=full", base, *PARTIAL, end]) for end in ends]
    planned += [
        ("ldm", two / name, [*HALVED, f"train.steps={n}"]) for name, n in (("parts", 2), ("parts", 4), ("all", 4))
    ]
    runs = [["--config", str(TINY / f"{what}.yaml"), *overrides(f, *more)] for what, f, more in planned]
    launch_two_ranks(runs, two, PROLOGUE)
    return Runs(one, two)


def copy_first_half(done: Path, new: Path) -> None:
    """A run as it was when its first 10 steps were done."""
    shutil.copytree(done, new)
    shutil.rmtree(new / "run" / "checkpoints" / "step-00000020")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["controlnet", "ldm"])
def test_two_ranks_in_shards_are_the_run_of_one_rank(what: str, kind: str, runs: Runs) -> None:
    one, two = runs.one / what, runs.two / f"{what} {kind}"
    assert len(scalars(two, "loss")) == 20
    assert scalars(two, "loss") == pytest.approx(scalars(one, "loss"), abs=1e-6)
    assert scalars(two, "grad_norm") == pytest.approx(scalars(one, "grad_norm"), rel=1e-4)
    a, b = weights(one, 20), weights(two, 20)
    assert a.keys() == b.keys()
    for name in a:  # Adam divides small gradients by their own size: a rounding error becomes part of a step
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_validation_reads_whole_averaged_weights_and_training_goes_on_with_its_own(kind: str, runs: Runs) -> None:
    one, two = runs.one / "controlnet", runs.two / f"controlnet {kind}"
    assert len(scalars(two, "val_loss")) == 2
    assert scalars(two, "val_loss") == pytest.approx(scalars(one, "val_loss"), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_accumulation_and_recomputed_blocks_work_in_shards(kind: str, runs: Runs) -> None:
    one, two = runs.one / "mixed", runs.two / f"mixed {kind}"
    assert scalars(two, "loss") == pytest.approx(scalars(one, "loss"), abs=1e-3)


def test_moments_of_half_the_size_train_and_resume_in_shards_bit_for_bit(runs: Runs) -> None:
    whole, parts = weights(runs.two / "all", 4), weights(runs.two / "parts", 4)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert scalars(runs.two / "all", "loss") == pytest.approx(scalars(runs.one / "ldm", "loss")[:4], abs=1e-3)
    for file in (runs.two / "all").rglob("step-00000004/shards/*.safetensors"):
        kept = {tensor.dtype for name, tensor in load_file(file).items() if "exp_avg" in name}
        assert kept == {torch.bfloat16}


def test_weights_without_a_gradient_or_a_row_for_each_rank_train_and_resume_in_shards(runs: Runs) -> None:
    one, two = runs.one / "partial", runs.two / "partial"
    assert scalars(two, "loss") == pytest.approx(scalars(one, "loss"), abs=1e-6)
    files = [load_file(file) for file in sorted((two / "run").rglob("step-00000003/shards/*.safetensors"))]
    rows = [sum(len(tensor) for name, tensor in file.items() if name.endswith("style.queries")) for file in files]
    assert sum(rows) == 1 and len(rows) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_half(kind: str, runs: Runs) -> None:
    for name in ("controlnet", "ldm"):
        for rank in (0, 1):
            held = json.loads((runs.two / f"{name} {kind}" / f"held-{rank}.json").read_text())
            assert held["true"][0] / held["true"][1] == pytest.approx(0.5, abs=0.02)
            if name == "controlnet":  # the frozen UNet: whole under `optimizer`
                assert held["false"][0] / held["false"][1] == pytest.approx(1 if kind == "optimizer" else 0.5, abs=0.02)
        files = sorted((runs.two / f"{name} {kind}").rglob("step-00000020/shards/*.safetensors"))
        sizes = [sum(t.numel() for t in load_file(file).values()) for file in files]
        assert len(sizes) == 2 and sizes[0] / sum(sizes) == pytest.approx(0.5, abs=0.02)


def test_both_kinds_are_one_run_bit_for_bit_though_one_was_stopped_and_resumed(runs: Runs) -> None:
    whole, parts = weights(runs.two / "ldm optimizer", 20), weights(runs.two / "ldm full", 20)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert scalars(runs.two / "ldm full", "loss") == scalars(runs.two / "ldm optimizer", "loss")


def test_what_one_rank_began_two_go_on_with_in_shards(runs: Runs) -> None:
    assert scalars(runs.two / "ldm joined", "loss") == pytest.approx(scalars(runs.one / "ldm", "loss")[:12], abs=1e-6)


def test_what_two_ranks_began_in_shards_one_goes_on_with(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy_first_half(runs.two / "ldm full", tmp_path / "left")
    caplog.set_level("INFO")
    start("ldm", tmp_path / "left", "train.steps=12")
    assert "train.shard='full', not 'none'" in caplog.text
    assert scalars(tmp_path / "left", "loss") == pytest.approx(scalars(runs.one / "ldm", "loss")[:12], abs=1e-6)


def test_a_damaged_shard_is_named(runs: Runs) -> None:
    (folder,) = (runs.two / "mixed full").rglob("step-00000003")
    assert checkpoint.damage(folder) == ""
    file = sorted((folder / "shards").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoint.damage(folder) == f"shards/{file.name} is not what was written"


def test_one_rank_has_nothing_to_share(tmp_path: Path) -> None:
    start("ldm", tmp_path, "train.steps=1", "train.shard=full")
    (folder,) = checkpoint.complete(tmp_path / "run")
    assert not (folder / "shards").exists()


@pytest.mark.parametrize(
    ("what", "argument", "message"),
    [
        ("ldm", "train.shard=zero3", "train.shard is 'zero3'; allowed: none, optimizer, full"),
        ("vae", "stage.disc_weight=0.5", "this stage trains model, discriminator in turn; set train.shard=none"),
        ("clip", "model.clip.image.image_size=16", "logit_scale is one number, which cannot be split"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(what: str, argument: str, message: str, tmp_path: Path) -> None:
    more = [f"run.dir={tmp_path}", "train.shard=full", "device=cpu", "data.length=8", "data.size=16", argument]
    with pytest.raises(ConfigError, match=message):
        run.train(config.load(TINY / f"{what}.yaml", [*more, "validation.data=null", "train.batch=4"]))
    assert not list(tmp_path.iterdir())

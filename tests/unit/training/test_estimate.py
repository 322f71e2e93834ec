"""Estimates against what torch's allocator reports of a real run on the CPU; docs/memory.md."""

import dataclasses
import functools
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import adapters  # noqa: F401  (registers them)
from ldm import build, config
from ldm.config import RunConfig
from ldm.data.errors import DataError
from ldm.data.images import Sample
from ldm.registry import ConfigError
from ldm.training import estimate, loop, optim, run, shards
from ldm.training.distributed import Rank
from ldm.training.estimate import Memory
from ldm.training.stage import networks
from scripts import train

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TINY = CONFIGS / "train" / "tiny"
WEIGHTS = ["model.vae.weights=null", "model.text.weights=null", "model.unet.weights=null"]
SMALL = ["train.batch=2", "data.length=8", "train.steps=2", "validation.data=null"]
FLOAT = 4  # bytes
MIB = 2**20
CLOSE = 0.15
ADVERSARIAL = ("stage.disc_weight=0.5", "stage.disc_start=0", "stage.disc_width=8", "data.size=64")
FP32, RECOMPUTED, BATCH = "train.precision=fp32", "train.checkpoint_activations=true", "train.batch=16"
NO_TOWER = "adapters.see.encoder.weights=null"


def tiny(name: str, *overrides: str) -> RunConfig:
    small = SMALL if name in ("vae", "clip") else [*SMALL, *WEIGHTS]
    return config.load(TINY / f"{name}.yaml", [*small, *overrides])


@functools.cache
def estimated(name: str, *overrides: str) -> Mapping[str, Memory]:
    cfg = tiny(name, *overrides)
    return estimate.estimate(cfg, estimate.meta_stage(cfg))


def measured(trains: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        trains()
    alive = most = 0
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  (the stub lacks it)
        most = max(most, alive)
    return most


def agree(parts: Mapping[str, Memory], most: int) -> bool:
    """Say both, for docs/memory.md; whether they agree."""
    largest = max(m.total for m in parts.values())
    print(f"estimated {largest / MIB:.1f} MiB, measured {most / MIB:.1f} MiB, ratio {largest / most:.3f}")
    return largest == pytest.approx(most, rel=CLOSE)


@pytest.mark.long
@pytest.mark.parametrize(("name", "overrides"), [("controlnet", (BATCH,)), ("vae", ADVERSARIAL)])
def test_estimate_is_within_15_percent_of_a_real_run(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    cfg = tiny(name, *overrides, f"run.dir={tmp_path / 'run'}")
    assert agree(estimated(name, *overrides), measured(lambda: run.train(cfg)))


@pytest.mark.slow
@pytest.mark.parametrize("switch", [(), (FP32,), (RECOMPUTED,)], ids=["bf16", "fp32", "recomputed"])
@pytest.mark.parametrize(
    "name",
    [
        *("tiny/controlnet", "tiny/ldm", "tiny/ip_adapter", "tiny/seecoder", "tiny/vae", "tiny/clip"),
        *("emoji/controlnet", "emoji/ip_adapter", "emoji/vae", "emoji/clip"),
    ],
)
def test_shipped_configs_are_estimated_within_15_percent(name: str, switch: tuple[str, ...], tmp_path: Path) -> None:
    if RECOMPUTED in switch and name.endswith(("vae", "clip")):
        pytest.skip("has no UNet to recompute")
    small = [*SMALL[2:], NO_TOWER] if name == "tiny/seecoder" else SMALL[2:]
    shorter = ["data.length=100"] if name.startswith("tiny") else []
    cfg = config.load(CONFIGS / "train" / f"{name}.yaml", [*small, *shorter, *switch, f"run.dir={tmp_path / 'run'}"])
    if name.startswith("emoji") and not Path("data/emoji").is_dir():
        pytest.skip("needs data/emoji")
    assert agree(estimate.estimate(cfg, estimate.meta_stage(cfg)), measured(lambda: run.train(cfg)))


def test_the_largest_of_several_sizes_is_counted() -> None:
    node = "data={name: folder, root: none, size: 16, hints: {edge: h}, buckets: {sizes: [[16, 8], [16, 24]]}}"
    sample = estimate.Blanks(tiny("controlnet", node, "stage.cache=false"), 1).load(0)
    assert sample.image.shape == sample.hints["edge"].shape == (3, 24, 16)


class Ending(estimate.Blanks):
    """Data that ends a run before its checkpoint, which would write 6 GB."""

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > 2:
            raise DataError("two steps are enough")
        return super().load(0)


@pytest.mark.slow
def test_a_full_size_controlnet_step_is_estimated_within_15_percent(tmp_path: Path) -> None:
    small = ["train.batch=1", "data.size=256", "train.workers=0", "model.weights=null", "device=cpu"]
    where = [f"run.dir={tmp_path / 'run'}", "validation.data=null"]
    cfg = config.load(CONFIGS / "train" / "sd15" / "controlnet_canny.yaml", [*small, *where])
    parts = estimate.estimate(cfg, estimate.meta_stage(cfg))

    def two_steps() -> None:
        stage = build.stage(cfg).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        with pytest.raises(DataError, match="two steps"):
            loop.train(cfg, stage, Ending(cfg, 4), None, Rank(0, 1, torch.device("cpu")))

    assert agree({"step": parts["step"]}, measured(two_steps))


@pytest.mark.long
def test_recomputing_activations_lowers_them() -> None:
    plain, recomputed = estimated("controlnet", BATCH, FP32)["step"], estimated("controlnet", BATCH, FP32, RECOMPUTED)
    assert recomputed["step"].activations < 0.5 * plain.activations


@pytest.mark.long
def test_estimate_grows_with_the_micro_batch_not_with_the_batch() -> None:
    some, twice = estimated("ldm", FP32, BATCH)["step"], estimated("ldm", FP32, "train.batch=32")["step"]
    assert twice.activations == pytest.approx(2 * some.activations, rel=0.2)
    split = estimated("ldm", FP32, "train.batch=32", "train.micro_batch=16")["step"]
    assert split.activations == pytest.approx(some.activations, rel=0.1)
    assert split.gradients > some.gradients  # the second part finds those of the first


def test_world_size_divides_the_batch() -> None:
    cfg = tiny("ldm", FP32, "train.batch=32")
    shared = estimate.estimate(cfg, estimate.meta_stage(cfg), world=2)["step"]
    assert shared == estimated("ldm", FP32, BATCH)["step"]


def test_autocast_halves_what_is_kept_for_backward() -> None:
    wide, narrow = (estimated("controlnet", BATCH, *more)["step"].activations for more in ((FP32,), ()))
    assert 0.45 * wide < narrow < 0.8 * wide


@pytest.mark.long
def test_frozen_encoders_keep_nothing() -> None:
    wider = ["model.vae.channels=[64, 64, 64]", "model.vae.blocks=3", "model.text.layers=5"]
    assert estimated("controlnet", *wider)["step"].activations == estimated("controlnet")["step"].activations


@pytest.mark.long
def test_frozen_unet_keeps_less_than_a_trained_one() -> None:
    """Its decoder still keeps what the gradient needs on its way to the adapter; its encoder keeps nothing."""
    all_of_it = estimated("controlnet", BATCH, "train.trainable=['*']")["step"]
    assert estimated("controlnet", BATCH)["step"].activations < all_of_it.activations


@pytest.mark.long
def test_encoded_data_is_held_during_steps_unless_it_is_on_disk(tmp_path: Path) -> None:
    few, many = estimated("ldm"), estimated("ldm", "data.length=4000")
    latents = 4000 * 2 * 4 * 8 * 8 * FLOAT  # mean and std
    assert latents < many["step"].data - few["step"].data < 12 * latents  # and text, hints
    half = estimated("ldm", "data.length=2000")
    assert many["encoding"].total - half["encoding"].total == many["step"].data - half["step"].data
    disk = estimated("ldm", "data.length=4000", f"stage.cache_dir={tmp_path / 'cache'}")
    assert disk["step"] == dataclasses.replace(many["step"], data=disk["step"].data)
    assert disk["step"].data < few["step"].data  # the batch alone
    assert disk["encoding"].total < many["encoding"].total and not (tmp_path / "cache").exists()
    assert estimated("ldm", "stage.cache=false")["encoding"].total == 0


def test_memory_is_the_sum_of_its_parts() -> None:
    cfg = tiny("controlnet", "train.ema=0.99")
    stage = estimate.meta_stage(cfg)
    parts = estimate.estimate(cfg, stage)
    assert all(p.is_meta for p in stage.parameters())  # the caller's stage is left as it was
    trained = FLOAT * sum(p.numel() for p in stage.denoiser.adapters.parameters())  # pyright: ignore
    saved = parts["checkpoint"]
    assert saved.weights == sum(t.numel() * t.element_size() for t in [*stage.parameters(), *stage.buffers()])
    assert (saved.gradients, saved.ema) == (trained, trained)
    assert saved.activations == pytest.approx(2 * trained, rel=0.02)  # own weights, the copy; the empty caption
    assert 2 * trained <= saved.optimizer < 2 * trained + 8 * len(list(stage.parameters()))  # and step counters
    assert parts["loading"].total == FLOAT * sum(t.numel() for t in [*stage.parameters(), *stage.buffers()])
    step = parts["step"]
    assert step.total == sum(getattr(step, name) for name in Memory.__slots__)


def test_frozen_weights_are_stored_in_the_runs_precision_but_not_the_vae() -> None:
    nets = networks(estimate.meta_stage(tiny("controlnet", "train.precision=bf16")))
    types = {name: {p.dtype for p in net.parameters()} for name, net in nets.items()}
    full, half = torch.float32, torch.bfloat16  # norms and embeddings stay as they are
    assert types == {"unet": {full, half}, "adapters": {full}, "vae": {full}, "text": {full, half}}


def test_an_image_prompts_tower_is_counted_and_named() -> None:
    cfg = tiny("ip_adapter", FP32)
    stage = estimate.meta_stage(cfg)
    tower = sum(p.numel() for p in stage.denoiser.adapter("prompt").heard[0].parameters())  # pyright: ignore
    own = sum(t.numel() for t in [*stage.parameters(), *stage.buffers()])
    assert tower > 0 and estimate.estimate(cfg, stage)["step"].weights == FLOAT * (own + tower)
    rows = dict(line.split(maxsplit=1) for line in optim.table(nn.ModuleDict(networks(stage))).splitlines())
    assert rows["encoder_prompt"].split() == ["0", f"{tower:,}"]


def test_averaged_weights_take_no_memory_when_they_are_off() -> None:
    assert estimated("ldm", "train.ema=null")["step"].ema == 0


@pytest.mark.long
def test_moments_in_bf16_take_half_the_optimizers_memory() -> None:
    whole, half = (estimated("ldm", f"train.moments={kept}")["step"].optimizer for kept in ("fp32", "bf16"))
    assert 0.5 <= half / whole < 0.501  # the rest: step counters


def test_sd15_controlnet_counts_are_the_published_ones() -> None:
    stage = estimate.meta_stage(config.load(CONFIGS / "train" / "sd15" / "controlnet_canny.yaml"))
    assert all(p.is_meta for p in stage.parameters())
    rows = dict(line.split(maxsplit=1) for line in optim.table(nn.ModuleDict(networks(stage))).splitlines())
    assert rows["unet"].split() == ["0", "859,520,964"]
    assert rows["vae"].split() == ["0", "83,653,863"]
    assert rows["text"].split() == ["0", "123,060,480"]
    assert rows["adapters.canny"].split() == ["361,279,120", "0"]
    assert rows["total"].split() == ["361,279,120", "1,066,235,307"]


@pytest.mark.slow
def test_sd15_dry_run_allocates_nothing() -> None:
    cfg = config.load(CONFIGS / "train" / "sd15" / "controlnet_canny.yaml")
    estimate.dry_run(tiny("controlnet"))  # imports and caches
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = estimate.dry_run(cfg)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "361,279,120" in text
    assert grown_kib < 300 * 1024  # the weights alone would be 5.3 GiB


def test_an_image_prompt_that_the_data_lacks_is_refused() -> None:
    cfg = tiny("ip_adapter", "data.reference=false")
    with pytest.raises(ConfigError, match=r"adapter 'prompt' wants an image prompt; set data\.reference"):
        estimate.estimate(cfg, estimate.meta_stage(cfg))


def test_dry_run_prints_counts_and_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train.main(["--config", str(TINY / "controlnet.yaml"), f"run.dir={tmp_path / 'run'}", "--dry-run", "train.batch=2"])
    out = capsys.readouterr().out
    assert "adapters.edge" in out
    assert "memory of one device, bf16, 2 images per forward, accumulation 1" in out
    assert "MiB at the peak of           loading    encoding        step  checkpoint" in out
    for row in ("weights", "gradients", "optimizer", "ema", "data", "activations", "total"):
        assert f"\n{row} " in out
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_dry_run_says_what_ranks_share(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--config", str(TINY / "controlnet.yaml"), "--dry-run", "train.shard=full"])
    said = capsys.readouterr().out
    stage = estimate.meta_stage(config.load(TINY / "controlnet.yaml"))
    trained = sum(p.nbytes for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in stage.trained.parameters() if not p.requires_grad)
    assert f"each of N ranks has 1/N of {(trained + frozen) / 2**20:,.0f} MiB of weights" in said
    assert shards.sizes(stage, "optimizer")[0] == trained
    total, unit, rest = shards.sizes(stage, "full")
    assert total == trained + frozen and 0 < unit < total and 0 < rest < total


@pytest.mark.long
def test_encoded_data_that_is_not_there_is_said_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    gone = "data={name: folder, root: nowhere, size: 32, hints: {edge: edge}}"
    for data, said in ((gone, True), ("data.size=32", False)):
        train.main(["--config", str(TINY / "controlnet.yaml"), *WEIGHTS, *SMALL, data, "--dry-run"])
        assert ("the data is not there" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data={name: folder, root: x}", r"data 'folder': missing keys \['size'\]; options"),
        ("data.sise=32", r"unknown keys \['sise'\].*did you mean 'size'"),
        ("data=null", "data is not set"),
        ("data.size=54", "images are 54x54 .* need multiples of 8"),
        ("data.hints=[]", "adapter 'edge' wants hint 'edge'"),
        ("adapters.edge.hint_widths=[8, 16]", "hint"),
        ("train.trainable=['adaptors.*']", "matches no parameter; groups: adapters, unet"),
        ("adapters.edge.name=controlnett", "did you mean 'controlnet'"),
        ("stage.name=diffuse", "did you mean 'diffusion'"),
        ("model.unet=null", "model.unet is not set"),
    ],
)
def test_config_that_does_not_fit_gets_one_line_and_exit_code_2(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        train.main(["--config", str(TINY / "controlnet.yaml"), override, "--dry-run"])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(shown)

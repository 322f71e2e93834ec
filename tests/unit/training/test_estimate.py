"""Estimates are compared with what a real forward pass on the CPU keeps, counted by the same hook."""

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters  # noqa: F401  (registers them)
from ldm import build, config
from ldm.config import RunConfig
from ldm.data.images import Batch
from ldm.precision import DTYPES
from ldm.registry import ConfigError
from ldm.training import estimate, optim
from ldm.training.draws import Draws
from ldm.training.stage import Loss, Report, Stage, choose_trainable, networks, store_frozen
from scripts import train

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TINY = CONFIGS / "train" / "tiny"
SMALL = ["train.batch=2", "model.vae.weights=null", "model.text.weights=null", "model.unet.weights=null"]
FLOAT = 4  # bytes
CLOSE = 0.02


def tiny(name: str, *overrides: str) -> RunConfig:
    small = SMALL if name in ("ldm", "controlnet") else SMALL[:1]
    return config.load(TINY / f"{name}.yaml", [*small, *overrides])


def real_stage(cfg: RunConfig) -> Stage:
    stage = build.stage(cfg)
    choose_trainable(stage, cfg.train.trainable)
    store_frozen(stage, DTYPES[cfg.train.precision])
    return stage.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]


def really_kept(cfg: RunConfig) -> int:
    stage, batch = real_stage(cfg), estimate.blank_batch(cfg)
    return max(estimate.kept_for_backward(cfg, stage, batch, player) for player in stage.players)


def estimated(cfg: RunConfig) -> int:
    return estimate.fake_activations(cfg, estimate.meta_stage(cfg))


class Twice(Stage):
    """Two uses of one input: autograd keeps x for the weight's gradient (once) and y for the square's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 5)

    @property
    def trained(self) -> nn.Module:
        return self.layer

    def forward(self, batch: Batch, draws: Draws, player: str, step: int) -> Loss:
        x = batch.image.flatten(1)
        y: Tensor = self.layer(x) + self.layer(x)
        return Loss(y.square().mean())

    def validate(self, batches: object, images: int, seed: int) -> Report:
        return Report()


def test_storages_kept_for_backward_are_counted_once_and_parameters_not_at_all() -> None:
    cfg = RunConfig(
        data={"name": "folder", "root": "nowhere", "size": 8}, train=config.TrainConfig(batch=4, precision="fp32")
    )
    assert estimate.kept_for_backward(cfg, Twice(), estimate.blank_batch(cfg)) == FLOAT * 4 * (3 * 8 * 8 + 5)
    with torch.device("meta"):
        stage = Twice()
    assert estimate.fake_activations(cfg, stage) == FLOAT * 4 * (3 * 8 * 8 + 5)


@pytest.mark.parametrize("name", ["clip", "ldm", "controlnet"])
def test_estimate_equals_what_a_real_run_keeps(name: str) -> None:
    cfg = tiny(name, "train.precision=fp32")
    assert estimated(cfg) == really_kept(cfg) > 0


@pytest.mark.parametrize("name", ["vae", "clip", "ldm", "controlnet"])
def test_estimate_is_close_where_fake_kernels_differ_from_real_ones(name: str) -> None:
    """Fake group norms keep their statistics in bf16 and forget the memory format, which costs a copy in attention."""
    cfg = tiny(name, "train.precision=bf16")
    assert estimated(cfg) == pytest.approx(really_kept(cfg), rel=CLOSE)


def test_largest_player_counts() -> None:
    cfg = tiny("vae", "stage.disc_weight=0.5", "stage.disc_start=0", "stage.disc_width=8", "data.size=64")
    assert estimated(cfg) == pytest.approx(really_kept(cfg), rel=CLOSE)
    assert estimated(cfg) > estimated(tiny("vae", "data.size=64"))


def test_recomputing_activations_lowers_the_estimate_as_it_lowers_the_real_run() -> None:
    plain, recomputed = tiny("controlnet"), tiny("controlnet", "train.checkpoint_activations=true")
    assert estimated(recomputed) == pytest.approx(really_kept(recomputed), rel=CLOSE)
    assert estimated(recomputed) < 0.6 * estimated(plain)


def test_estimate_grows_with_the_micro_batch_not_with_the_batch() -> None:
    fp32 = "train.precision=fp32"
    two, four = estimated(tiny("ldm", fp32)), estimated(tiny("ldm", fp32, "train.batch=4"))
    assert four == pytest.approx(2 * two, rel=0.1)
    assert estimated(tiny("ldm", fp32, "train.batch=4", "train.micro_batch=2")) == two


def test_autocast_keeps_half_of_the_activations_and_casts_of_the_weights() -> None:
    wide, narrow = (estimated(tiny("vae", "train.batch=16", f"train.precision={p}")) for p in ("fp32", "bf16"))
    assert 0.5 * wide < narrow < 0.8 * wide


def test_frozen_encoders_keep_nothing() -> None:
    wider = ["model.vae.channels=[64, 64, 64]", "model.vae.blocks=3", "model.text.layers=5"]
    assert estimated(tiny("controlnet", *wider)) == estimated(tiny("controlnet"))


def test_stage_with_nothing_to_train_keeps_nothing() -> None:
    cfg = tiny("controlnet")
    assert estimate.fake_activations(cfg, estimate.meta_stage(cfg).requires_grad_(False)) == 0


def test_frozen_unet_keeps_less_than_a_trained_one() -> None:
    """Its decoder still keeps what the gradient needs on its way to the adapter; its encoder keeps nothing."""
    all_of_it = tiny("controlnet", "train.trainable=['*']")
    assert estimated(tiny("controlnet")) < estimated(all_of_it)


def test_memory_is_the_sum_of_its_parts() -> None:
    cfg = tiny("controlnet", "train.ema=0.99")
    stage = estimate.meta_stage(cfg)
    memory = estimate.estimate(cfg, stage)
    assert all(p.is_meta for p in stage.parameters())  # the caller's stage is left as it was
    trained = FLOAT * sum(p.numel() for p in stage.denoiser.adapters.parameters())  # pyright: ignore
    held = sum(t.numel() * t.element_size() for t in [*stage.parameters(), *stage.buffers()])
    assert memory.weights == held
    assert (memory.gradients, memory.adamw_state, memory.ema) == (trained, 2 * trained, trained)
    assert memory.total == memory.weights + 4 * trained + memory.activations


def test_frozen_weights_are_stored_in_the_runs_precision_but_not_the_vae() -> None:
    nets = networks(estimate.meta_stage(tiny("controlnet", "train.precision=bf16")))
    types = {name: {p.dtype for p in net.parameters()} for name, net in nets.items()}
    full, half = torch.float32, torch.bfloat16  # norms and embeddings stay as they are
    assert types == {"unet": {full, half}, "adapters": {full}, "vae": {full}, "text": {full, half}}


def test_an_image_prompts_tower_is_counted_and_named() -> None:
    path = "train.precision=fp32", "model.vae.weights=null", "model.text.weights=null", "model.unet.weights=null"
    cfg = config.load(TINY / "ip_adapter.yaml", [*path, "train.batch=2"])
    stage = estimate.meta_stage(cfg)
    tower = sum(p.numel() for p in stage.denoiser.adapter("prompt").heard[0].parameters())  # pyright: ignore
    own = sum(t.numel() for t in [*stage.parameters(), *stage.buffers()])
    assert tower > 0 and estimate.estimate(cfg, stage).weights == FLOAT * (own + tower)
    rows = dict(line.split(maxsplit=1) for line in optim.table(nn.ModuleDict(networks(stage))).splitlines())
    assert rows["encoder_prompt"].split() == ["0", f"{tower:,}"]


def test_averaged_weights_take_no_memory_when_they_are_off() -> None:
    cfg = tiny("ldm", "train.ema=null")
    assert estimate.estimate(cfg, estimate.meta_stage(cfg)).ema == 0


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


def test_dry_run_prints_counts_and_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train.main(["--config", str(TINY / "controlnet.yaml"), f"run.dir={tmp_path / 'run'}", "--dry-run", "train.batch=2"])
    out = capsys.readouterr().out
    assert "adapters.edge" in out
    assert "memory of one device, bf16, 2 images per forward, accumulation 1" in out
    for row in ("weights", "gradients", "adamw state", "ema", "activations", "total"):
        assert f"\n{row} " in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data={name: folder, root: x}", r"data 'folder': unknown keys \[.*missing keys \['size'\]"),
        ("data.sise=32", r"unknown keys \['sise'\].*did you mean 'size'"),
        ("data=null", "data is not set"),
        ("data.size=54", "do not fit: vae: image is"),
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

"""Every YAML under configs/ loads, and builds on the meta device without data or weights being present."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import adapters  # noqa: F401  (registers them)
from ldm import build, config, registry
from ldm.config import Node, RunConfig
from ldm.guidance import GuidanceConfig
from ldm.registry import ConfigError
from ldm.samplers import Sampler
from ldm.training import estimate, stream

ROOT = Path(__file__).resolve().parents[2] / "configs"
ABLATION = ROOT / "ablation"  # its tables are no run configs (tests/unit/test_ablation.py), but what they vary is
EVERY = sorted(p for p in ROOT.rglob("*.yaml") if ABLATION not in p.parents or p.parent.name == "base")
MODEL, DATA, TRAIN, SAMPLE = (sorted((ROOT / kind).rglob("*.yaml")) for kind in ("model", "data", "train", "sample"))
TRAIN_WHAT = {"vae", "clip", "ldm", "controlnet", "t2i", "ip", "coadapter", "seecoder"}


load = functools.cache(config.load)  # a frozen dataclass: safe to share


def short(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


every = pytest.mark.parametrize("path", EVERY, ids=short)
train = pytest.mark.parametrize("path", TRAIN, ids=short)
sample = pytest.mark.parametrize("path", SAMPLE, ids=short)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder: neither checkpoints/ nor data/ nor runs/ exists there."""
    monkeypatch.chdir(tmp_path)


def nodes(cfg: RunConfig) -> Iterator[tuple[str, Node]]:
    """Every node of a config that names a class, with its kind."""
    for kind in ("unet", "vae", "text", "clip"):
        if (node := getattr(cfg.model, kind)) is not None:
            yield kind, {k: v for k, v in node.items() if k not in ("weights", "weights_prefix")}
    yield from (("data", node) for node in (cfg.data, cfg.validation.data) if node is not None)
    yield from (("adapter", build.split_use(name, node)[1]) for name, node in cfg.adapters.items())
    if cfg.fuser is not None:
        yield "fuser", {k: v for k, v in cfg.fuser.items() if k != "weights"}
    if cfg.stage is not None:
        yield "stage", cfg.stage
    yield "sampler", cfg.sample.sampler


def count(node: Node | None, kind: str) -> int:
    with torch.device("meta"):
        module: nn.Module = build.component(kind, node)
    return sum(p.numel() for p in module.parameters())


def test_there_are_configs_of_every_sort() -> None:
    assert MODEL
    assert DATA
    assert {path.parent.name for path in TRAIN} >= {"tiny", "emoji", "sd15"}
    assert {path.parent.name for path in SAMPLE} >= {"tiny", "emoji", "sd15"}


@every
def test_loads_and_its_dump_reads_back_equal(path: Path, tmp_path: Path) -> None:
    cfg = load(path)
    (tmp_path / "again.yaml").write_text(config.dump(cfg))
    assert config.load(tmp_path / "again.yaml") == cfg


@every
def test_says_in_its_first_line_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@every
def test_names_registered_classes_and_reads_nothing_from_the_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"_target_|!!|\$\{[^}]*:", text)
    known = registry.registered()
    for kind, node in nodes(load(path)):
        assert "name" not in node or (kind, node["name"]) in known, f"{kind} {node.get('name')!r} is not registered"


@every
def test_unknown_key_is_refused_wherever_it_stands(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model.zzz'"):
        config.load(path, ["model.zzz=1"])
    for kind, node in nodes(load(path)):
        if "name" in node:
            with pytest.raises(ConfigError, match=r"unknown keys \['zzz'\]"):
                registry.build(kind, {**node, "zzz": 1})


@every
def test_data_options_are_valid(path: Path) -> None:
    cfg = load(path)
    for node in (cfg.data, cfg.validation.data):
        if node is not None and "name" in node:  # parts to be included have some keys only
            registry.options("data", node)


@pytest.mark.parametrize("path", MODEL, ids=short)
def test_model_config_builds_on_the_meta_device(path: Path) -> None:
    cfg = load(path)
    for kind in ("unet", "vae", "text", "clip"):
        if (node := getattr(cfg.model, kind)) is not None:
            assert count(node, kind) > 0
    build.schedule(cfg)


@train
def test_train_config_builds_on_the_meta_device(path: Path) -> None:
    cfg = load(path)
    stage = estimate.meta_stage(cfg)
    assert all(p.is_meta for p in stage.parameters())
    assert any(p.requires_grad for p in stage.trained.parameters())
    stream.split_batch(cfg.train, 1)


@train
def test_data_gives_the_hints_that_the_adapters_want(path: Path) -> None:
    cfg = load(path)
    prompted = {name for name, node in cfg.adapters.items() if "encoder" in node}
    wanted = {use.hint or name for name, use in build.uses(cfg).items() if name not in prompted}
    assert cfg.data is not None
    for node in (cfg.data, cfg.validation.data):
        if node is not None:
            assert wanted <= set(registry.options("data", node).hints)
            assert not prompted or registry.options("data", node).reference
            assert registry.options("data", node).size == registry.options("data", cfg.data).size


@train
def test_training_and_validation_data_are_not_the_same(path: Path) -> None:
    cfg = load(path)
    assert cfg.validation.data is not None
    assert cfg.validation.data != cfg.data


@train
def test_train_config_is_named_for_what_it_trains_and_where(path: Path) -> None:
    assert path.stem.split("_")[0] in TRAIN_WHAT
    assert load(path).run.dir == f"runs/{path.parent.name}/{path.stem}"


@sample
def test_sample_config_builds_on_the_meta_device(path: Path) -> None:
    cfg = load(path)
    with torch.device("meta"):
        denoiser, vae = build.denoiser(cfg), build.component("vae", cfg.model.vae)
        build.text(cfg)
    schedule = build.schedule(cfg)
    sampler = registry.build("sampler", cfg.sample.sampler, schedule=schedule)
    assert isinstance(sampler, Sampler)
    GuidanceConfig(**dataclasses.asdict(cfg.sample.guidance))
    multiple = vae.factor * denoiser.unet.spec.multiple
    assert cfg.sample.height % multiple == cfg.sample.width % multiple == 0
    assert cfg.sample.hints.keys() <= cfg.adapters.keys()
    assert cfg.sample.prompts


@sample
def test_sample_config_is_named_for_what_it_draws(path: Path) -> None:
    assert path.stem.split("_")[0] in {*TRAIN_WHAT, "adapters", "demo"}
    assert load(path).out.dir == f"outputs/{path.parent.name}/{path.stem}"


@pytest.mark.parametrize(
    ("name", "unet", "vae", "text"),
    [
        ("sd15", 859_520_964, 83_653_863, 123_060_480),
        ("sd15_inpainting", 859_535_364, 83_653_863, 123_060_480),
        ("sd21_base", 865_910_724, 83_653_863, 352_984_064),
        ("sd21_v", 865_910_724, 83_653_863, 352_984_064),
        ("sdxl", 2_567_463_684, 83_653_863, 123_060_480 + 694_659_840),
    ],
)
def test_published_models_have_their_published_sizes(name: str, unet: int, vae: int, text: int) -> None:
    model = load(ROOT / "model" / f"{name}.yaml").model
    assert count(model.unet, "unet") == unet
    assert count(model.vae, "vae") == vae
    assert count(model.text, "text") == text


def test_emoji_unet_has_at_most_twenty_million_parameters() -> None:
    assert count(load(ROOT / "model" / "emoji.yaml").model.unet, "unet") <= 20_000_000

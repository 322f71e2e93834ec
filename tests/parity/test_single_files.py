"""Published layouts written by us, read by diffusers' own converters; and the way back, byte for byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapters  # noqa: F401  (registers the ControlNet that shapes are taken from)
from adapters.controlnet import ControlNet, ControlNetOptions
from ldm import convert
from ldm.convert import detect, model
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE, VAEConfig
from tests.parity.test_controlnet_diffusers import FULL, HINT_WIDTHS, SMALL, shared_config

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single = pytest.importorskip("diffusers.loaders.single_file_utils")
text_words = pytest.importorskip("scripts.benchmarks.networks").text_words

State = dict[str, Tensor]
UNETS = SMALL | {"inpainting": replace(SMALL["sd1"], in_channels=9)}  # latent, mask, masked image
VAE_SMALL = VAEConfig(channels=(8, 16, 16), blocks=1, groups=4)
TEXT_SMALL = TextConfig(width=16, layers=2, heads=1, merges=40, context_length=9)
TEXT_2_SMALL = TextConfig(width=32, layers=2, heads=1, merges=40, context_length=9, activation="gelu", pad="zero")


def reference_unet(name: str, full: bool = False) -> nn.Module:
    config = (FULL if full else UNETS)[name]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)]
    return diffusers.UNet2DConditionModel(**shared_config(config), up_block_types=up)


def reference_vae(config: VAEConfig) -> nn.Module:
    n = len(config.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=["DownEncoderBlock2D"] * n,
        up_block_types=["UpDecoderBlock2D"] * n,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
    )


def reference_text(config: TextConfig, projection: int = 0) -> nn.Module:
    options = transformers.CLIPTextConfig(
        **text_words(config),
        projection_dim=projection or 16,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(options)


def published(state: State) -> State:
    """transformers' names as they stand in files."""
    extra = ("text_model.", "text_projection.")
    return {k if k.startswith(extra) else "text_model." + k: v.clone() for k, v in state.items()}


def same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def known_to_diffusers(state: State) -> State:
    """Without SDXL's vector embedding, which diffusers' own converter of ControlNet files leaves out."""
    return {k: v for k, v in state.items() if not k.startswith("add_embedding.")}


def write_folder(folder: Path, name: str) -> dict[str, State]:
    """A diffusers pipeline folder with random weights in half precision; returns file -> state dict."""
    parts = {
        "unet/diffusion_pytorch_model": reference_unet(name).half().state_dict(),
        "vae/diffusion_pytorch_model": reference_vae(VAE_SMALL).state_dict(),
        "text_encoder/model": published(reference_text(TEXT_2_SMALL if name == "sd2" else TEXT_SMALL).state_dict()),
    }
    if name == "sdxl":
        parts["text_encoder_2/model"] = published(reference_text(TEXT_2_SMALL, projection=24).state_dict())
    old = {"text_model.embeddings.position_ids": torch.arange(9)[None]}  # in older files
    parts["text_encoder/model"] |= old
    for key, state in parts.items():
        (folder / key).parent.mkdir(parents=True)
        save_file(state, folder / f"{key}.safetensors")
    return parts


@pytest.mark.parametrize("name", UNETS)
def test_every_layout_round_trips_byte_for_byte(name: str, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "theirs", name)
    model.import_model(tmp_path / "theirs", tmp_path / "ours")
    model.export([tmp_path / "ours"], "diffusers", tmp_path / "again")
    for key, state in theirs.items():
        same(load_file(tmp_path / "again" / f"{key}.safetensors"), state)
    model.export([tmp_path / "theirs"], "original", tmp_path / "single.safetensors")
    single_file = load_file(tmp_path / "single.safetensors")
    extras: State = {"betas": torch.rand(10, dtype=torch.float64), "alphas_cumprod": torch.rand(10)}
    if name in ("sd2", "sdxl"):
        place = "cond_stage_model.model." if name == "sd2" else "conditioner.embedders.1.model."
        extras[place + "logit_scale"] = torch.tensor(4.6)
    if name == "sd2":
        extras[place + "text_projection"] = torch.randn(32, 24)
    single_file |= extras
    save_file(single_file, tmp_path / "published.safetensors")
    model.import_model(tmp_path / "published.safetensors", tmp_path / "parts")
    model.export([tmp_path / "parts"], "original", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), single_file)


@pytest.mark.parametrize("name", UNETS)
def test_an_exported_folder_is_read_by_from_pretrained(name: str, tmp_path: Path) -> None:
    states = write_folder(tmp_path / "theirs", name)
    model.export([tmp_path / "theirs"], "diffusers", tmp_path / "again")
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    classes |= {"text_encoder": transformers.CLIPTextModel}
    classes |= {"text_encoder_2": transformers.CLIPTextModelWithProjection}
    for key, state in states.items():
        folder = key.partition("/")[0]
        read = classes[folder].from_pretrained(tmp_path / "again" / folder, torch_dtype="auto")
        tensors = published(read.state_dict()) if folder.startswith("text") else read.state_dict()
        assert tensors.keys() == state.keys() - {"text_model.embeddings.position_ids"}
        assert all(torch.equal(tensors[k], state[k].to(tensors[k].dtype)) for k in tensors)
        if folder == "vae":
            assert read.config.scaling_factor == (0.13025 if name == "sdxl" else 0.18215)


@pytest.mark.parametrize("name", UNETS)
def test_original_unet_names_are_those_diffusers_reads(name: str) -> None:
    theirs = reference_unet(name)
    state = theirs.state_dict()
    ours = convert.diffusers_unet(UNETS[name]).to_ours(state)
    original = convert.original_unet(UNETS[name]).to_theirs(ours)
    assert original["input_blocks.0.0.weight"].shape[1] == UNETS[name].in_channels
    prefixed = {f"model.diffusion_model.{k}": v for k, v in original.items()}
    same(single.convert_ldm_unet_checkpoint(prefixed, dict(theirs.config)), dict(state))


def test_original_vae_names_are_those_diffusers_reads() -> None:
    theirs = reference_vae(VAE_SMALL)
    ours = convert.diffusers_vae(VAE_SMALL).to_ours(theirs.state_dict())
    original = convert.original_vae(VAE_SMALL).to_theirs(ours)
    assert original["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    prefixed = {f"first_stage_model.{k}": v for k, v in original.items()}
    same(single.convert_ldm_vae_checkpoint(prefixed, dict(theirs.config)), dict(theirs.state_dict()))


def test_open_clip_names_are_those_diffusers_reads() -> None:
    theirs = reference_text(TEXT_2_SMALL, projection=32)
    ours = convert.transformers_text(TEXT_2_SMALL, projection=True).to_ours(published(theirs.state_dict()))
    original = convert.open_clip_text(TEXT_2_SMALL, projection=True).to_theirs(ours)
    prefix = "conditioner.embedders.1.model."
    prefixed = {prefix + k: v for k, v in original.items()}
    same(single.convert_open_clip_checkpoint(theirs, prefixed, prefix), published(theirs.state_dict()))


@pytest.mark.parametrize("name", SMALL)
def test_controlnet_layouts_hold_the_same_weights(name: str, tmp_path: Path) -> None:
    net = diffusers.ControlNetModel(**shared_config(SMALL[name]), conditioning_embedding_out_channels=HINT_WIDTHS)
    state = {k: torch.randn_like(v) for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    expected = model.load(tmp_path / "theirs.safetensors", "controlnet")
    for layout in ("controlnet_original", "controlnet_standalone", "controlnet_diffusers"):
        file = tmp_path / f"{layout}.safetensors"
        model.export([tmp_path / "theirs.safetensors"], layout, file)
        same(model.load(file, "controlnet"), expected)
        if layout != "controlnet_diffusers":
            same(single.convert_controlnet_checkpoint(load_file(file), dict(net.config)), known_to_diffusers(state))
    same(load_file(tmp_path / "controlnet_diffusers.safetensors"), state)
    unet = {f"model.diffusion_model.{k}": v for k, v in original_unet_state(name).items()}
    full = load_file(tmp_path / "controlnet_original.safetensors") | unet
    save_file(full, tmp_path / "full.safetensors")
    same(model.load(tmp_path / "full.safetensors", "controlnet"), expected)
    ours = ControlNet(ControlNetOptions(hint_widths=HINT_WIDTHS), unet=UNet(SMALL[name]))
    ours.load_state_dict(expected)


def original_unet_state(name: str) -> State:
    return convert.original_unet(SMALL[name]).to_theirs(UNet(SMALL[name]).state_dict())


@pytest.mark.parametrize("name", FULL)
def test_full_size_unet_and_controlnet_names_shapes_and_detection(name: str) -> None:
    """On the meta device: the original names go through diffusers' converter to every tensor of its classes."""
    config = FULL[name]
    with torch.device("meta"):
        unet, theirs = UNet(config), reference_unet(name, full=True)
        net, their_net = ControlNet(ControlNetOptions(), unet=unet), diffusers.ControlNetModel(**shared_config(config))
    original = convert.original_unet(config).to_theirs(unet.state_dict())
    prefixed = {f"model.diffusion_model.{k}": v for k, v in original.items()}
    got = single.convert_ldm_unet_checkpoint(prefixed, dict(theirs.config))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    control = convert.original_controlnet(config).to_theirs(net.state_dict())
    converted = single.convert_controlnet_checkpoint(dict(control), dict(their_net.config))
    known = known_to_diffusers(their_net.state_dict())
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in known.items()}
    family = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL base"}[name]
    forms: list[tuple[State, str, Any]] = [
        (prefixed, family, config),
        (theirs.state_dict(), family, config),
        (unet.state_dict(), family, config),
        (control, f"ControlNet for {family}", None),
        ({f"control_model.{k}": v for k, v in control.items()}, f"ControlNet for {family}", None),
        (their_net.state_dict(), f"ControlNet for {family}", None),
    ]
    for state, said, wanted in forms:
        (part,) = detect.contents(state).parts
        assert detect.architecture(part.config).startswith(said) and not part.problems
        assert wanted in (None, part.config)


def test_full_size_vae_and_text_names_shapes_and_detection() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        vae, their_vae, text = VAE(config), reference_vae(config), TextEncoder(TextConfig())
        their_text = reference_text(TextConfig())
    original = convert.original_vae(config).to_theirs(vae.state_dict())
    prefixed = {f"first_stage_model.{k}": v for k, v in original.items()}
    got = single.convert_ldm_vae_checkpoint(prefixed, dict(their_vae.config))
    assert len(original) == 248 and got.keys() == their_vae.state_dict().keys()
    assert detect.contents(prefixed).parts[0].config == config
    names = convert.transformers_text(TextConfig()).to_theirs(text.state_dict())
    assert names.keys() == published_names(their_text)
    part = detect.contents({f"cond_stage_model.transformer.{k}": v for k, v in names.items()}).parts[0]
    assert part.config == TextConfig() and detect.architecture(part.config).startswith("CLIP ViT-L/14")


def published_names(text: nn.Module) -> set[str]:
    return {k if k.startswith("text_model.") else "text_model." + k for k in text.state_dict()}

"""IP-Adapter files and image encoders: what they are told to be, and the way in and out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from ldm.convert import detect, files, model, slots
from ldm.convert.ip_adapter import published, transformers_vision
from ldm.models.unet import UNet
from ldm.models.vision import OpenCLIPConfig, OpenCLIPTower
from ldm.registry import ConfigError
from ldm.training import checkpoint
from tests.small import SD1

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {"base": {}, "plus": {"width": 64, "depth": 2, "tokens": 6}, "full": {}}
every_variant = pytest.mark.parametrize("variant", OPTIONS)


def make(variant: str) -> tuple[IPAdapter, dict[str, Tensor]]:
    """An adapter and its published tensors."""
    unet = UNet(SD1)
    adapter = IPAdapter(IPAdapterOptions(VIT, variant=variant, **OPTIONS[variant]), unet=unet)
    table = published(unet.spec.cross_attn, variant, OPTIONS[variant].get("depth", 4))
    return adapter, table.to_theirs(adapter.state_dict())


@every_variant
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_published_file_is_told_imported_loaded_and_given_back(variant: str, suffix: str, tmp_path: Path) -> None:
    adapter, theirs = make(variant)
    file = tmp_path / f"published{suffix}"
    if suffix == ".bin":
        nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in theirs.items():
            part, _, rest = key.partition(".")
            nested[part][rest] = value
        torch.save(nested, file)
    else:
        save_file(theirs, file)
    assert any(f"IP-Adapter {variant}" in line for line in model.inspect(file))
    assert not any("missing" in line or "unexpected" in line for line in model.inspect(file))
    [ours] = model.import_model(file, tmp_path / "ours")
    assert ours.name == "ip_adapter.safetensors"
    again, _ = make(variant)
    for source in (ours, file):  # a config may name either
        checkpoint.load_weights(again, source, parts=slots.parts("adapter", {"name": "ip_adapter"}))
        assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    [out] = model.export([ours], "ip_adapter", tmp_path / "out.safetensors")
    assert load_file(out).keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in load_file(out).items())


def test_middle_layer_is_the_last_of_the_published_file() -> None:
    _, theirs = make("base")
    for key, value in theirs.items():
        if "to_k" in key:
            value.fill_(int(key.split(".")[1]))
    renamed = detect.part(theirs, detect.sections(theirs)[0])
    got = [int(renamed.tensors[f"to_k.{i}.weight"][0, 0]) for i in range(16)]
    assert got == [1, 3, 5, 7, 9, 11, 31, 13, 15, 17, 19, 21, 23, 25, 27, 29]
    assert not renamed.problems


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "31.to_" not in k}, "15 cross-attention layers; known: 16 .*, 70"),
        (lambda s: {k: v for k, v in s.items() if "image_proj" not in k}, "unknown kind"),
        (lambda s: {k: v for k, v in s.items() if k != "ip_adapter.3.to_v_ip.weight"}, "1 of 36 tensors missing"),
        (
            lambda s: s | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(1)},
            "IP-Adapter FaceID .with LoRA.; use base, plus or full",
        ),
    ],
)
def test_part_of_a_file_is_refused_in_one_line(spoil: Any, message: str, tmp_path: Path) -> None:
    _, theirs = make("base")
    save_file(spoil(theirs), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=message) as caught:
        model.read([tmp_path / "a.safetensors"])
    assert "\n" not in str(caught.value)


def test_encoder_comes_from_the_transformers_layout(tmp_path: Path) -> None:
    config = OpenCLIPConfig(image_size=16, patch=8, width=64, layers=3, heads=1, mlp=96, embed_dim=24)
    tower = OpenCLIPTower(config)
    theirs = transformers_vision(config).to_theirs(tower.state_dict())
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "model.safetensors")
    found = detect.contents(files.read(tmp_path / "model.safetensors")).parts[0]
    assert not found.problems and found.config == OpenCLIPConfig(**{**vars(config), "activation": "quick_gelu"})
    again = OpenCLIPTower(config)
    file = tmp_path / "model.safetensors"
    checkpoint.load_weights(again, file, parts=slots.parts("image", {"name": "open_clip"}))
    assert all(torch.equal(v, tower.state_dict()[k]) for k, v in again.state_dict().items())

"""IP-Adapter files and image encoders: what they are told to be, and the way in and out."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from ldm.convert import detect, files, model, slots
from ldm.convert.ip_adapter import numbers, published, transformers_vision
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vision import OpenCLIPConfig, OpenCLIPTower
from ldm.registry import ConfigError
from ldm.training import checkpoint
from tests.small import SD1

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {"base": {}, "plus": {"width": 64, "tokens": 6}, "full": {}}
XL = UNetConfig(  # SDXL's 70 layers
    channels=(8, 8, 16), depth=(0, 2, 10), mid_depth=10, context_dim=12, num_heads=4, groups=4, linear_proj=True
)
BASES = {"sd1": SD1, "sdxl": XL}
TENSORS = {  # of a published file
    ("sd1", "base"): 36,
    ("sd1", "plus"): 83,
    ("sd1", "full"): 38,
    ("sdxl", "base"): 144,
    ("sdxl", "plus"): 191,
    ("sdxl", "full"): 146,
}


@functools.cache
def unet(base: str) -> UNet:
    return UNet(BASES[base])


def make(variant: str, base: str = "sd1") -> tuple[IPAdapter, dict[str, Tensor]]:
    """An adapter and its published tensors."""
    adapter = IPAdapter(IPAdapterOptions(VIT, variant=variant, **OPTIONS[variant]), unet=unet(base))
    return adapter, published(unet(base).spec.cross_attn, variant).to_theirs(adapter.state_dict())


@pytest.mark.parametrize(("base", "variant"), TENSORS)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_published_file_is_told_imported_loaded_and_given_back(
    base: str, variant: str, suffix: str, tmp_path: Path
) -> None:
    adapter, theirs = make(variant, base)
    assert len(theirs) == TENSORS[base, variant]
    file = tmp_path / f"published{suffix}"
    if suffix == ".bin":
        nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in theirs.items():
            part, _, rest = key.partition(".")
            nested[part][rest] = value
        torch.save(nested, file)
    else:
        save_file(theirs, file)
    told = list(model.inspect(file))
    assert any(f"IP-Adapter {variant}" in line for line in told) and told[-1] == "    complete"
    assert not any("missing" in line or "unexpected" in line for line in told)
    [ours] = model.import_model(file, tmp_path / "ours")
    assert ours.name == "ip_adapter.safetensors"
    again, _ = make(variant, base)
    for source in (ours, file):  # a config may name either
        checkpoint.load_weights(again, source, parts=slots.parts("adapter", {"name": "ip_adapter"}))
        assert all(torch.equal(v, adapter.state_dict()[k]) for k, v in again.state_dict().items())
    [out] = model.export([ours], "ip_adapter", tmp_path / "out.safetensors")
    assert load_file(out).keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in load_file(out).items())


@pytest.mark.parametrize(
    ("base", "order"),
    [
        ("sd1", [*range(1, 12, 2), 31, *range(13, 30, 2)]),
        ("sdxl", [*range(1, 48, 2), *range(121, 140, 2), *range(49, 120, 2)]),
    ],
)
def test_middle_layers_are_the_last_of_the_published_file(base: str, order: list[int]) -> None:
    _, theirs = make("base", base)
    theirs = {k: torch.full_like(v, int(k.split(".")[1])) if "to_k" in k else v for k, v in theirs.items()}
    renamed = detect.part(theirs, detect.sections(theirs)[0])
    assert [int(renamed.tensors[f"to_k.{i}.weight"][0, 0]) for i in range(len(order))] == order
    assert not renamed.problems


def load(tensors: dict[str, Tensor], base: str, tmp_path: Path) -> str:
    """Load a published file into an adapter of that base, which must refuse it and stay as it is; returns the line."""
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter, _ = make("base", base)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    parts = slots.parts("adapter", {"name": "ip_adapter"})
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(adapter, tmp_path / "theirs.safetensors", parts=parts)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (
            "sdxl",
            "sd1",
            r"108 unexpected: to_k\.16\.weight.*found: IP-Adapter base .*70 layers.*wanted: IP-Adapter .*16 layers",
        ),
        ("sd1", "sdxl", r"108 missing: to_k\.16\.weight.*found: IP-Adapter base .*16 layers"),
    ],
)
def test_file_of_another_base_is_refused_and_named(theirs: str, ours: str, found: str, tmp_path: Path) -> None:
    said = load(make("base", theirs)[1], ours, tmp_path)
    assert re.search(f"of another architecture than IPAdapter .*{found}", said) and "\n" not in said


@pytest.mark.parametrize(
    ("base", "mismatch"),
    [("sd1", r"6 of another shape: to_k\.6\.weight"), ("sdxl", r"24 of another shape: to_k\.28\.weight")],
)
def test_file_with_layers_in_execution_order_is_refused(base: str, mismatch: str, tmp_path: Path) -> None:
    _, theirs = make("base", base)
    swapped = {k: v for k, v in theirs.items() if "image_proj" in k}
    for i, n in enumerate(numbers(unet(base).spec.cross_attn)):  # some files number down, mid, up
        swapped |= {
            f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": theirs[f"ip_adapter.{n}.to_{x}_ip.weight"] for x in "kv"
        }
    assert swapped.keys() == theirs.keys()
    said = load(swapped, base, tmp_path)
    assert re.search(f"{mismatch}.*in another order than the authors' .down, up, mid.", said) and "\n" not in said


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "31.to_" not in k}, "15 cross-attention layers; known: 16 .*, 70"),
        (lambda s: {k: v for k, v in s.items() if "image_proj" not in k}, r"no image_proj\.\* tensors, which"),
        (lambda s: {k: v for k, v in s.items() if "image_proj.norm" not in k}, "unknown kind"),
        (lambda s: {k: v for k, v in s.items() if k != "ip_adapter.3.to_v_ip.weight"}, "1 of 36 tensors missing"),
        (
            lambda s: s | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(1)},
            "IP-Adapter FaceID .*not supported.; use base, plus or full$",
        ),
        (
            lambda s: {k.replace("image_proj.proj.", "image_proj.proj.0."): v for k, v in s.items()},
            "IP-Adapter FaceID .*not supported.; use base, plus or full$",
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

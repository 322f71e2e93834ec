"""TencentARC's style and fuser files: told apart, read in and written back byte by byte, and named as weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adapters  # noqa: F401  (registers them)
from ldm import registry
from ldm.convert import detect, model, slots
from ldm.convert.tables_coadapter import FuserConfig, StyleConfig
from ldm.models.unet import UNet
from ldm.registry import ConfigError
from ldm.training import checkpoint

CONFIGS: dict[str, StyleConfig | FuserConfig] = {
    "t2i_style": StyleConfig(width=16, context_dim=12, tokens=4, depth=2),
    "coadapter_fuser": FuserConfig(width=16, channels=(4, 8, 12, 12), depth=2),
}
every = pytest.mark.parametrize("layout", CONFIGS)


def make(layout: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network and its published tensors."""
    config = CONFIGS[layout]
    net: nn.Module = registry.build(config.kind, config.node, unet=UNet(config.unet))
    return net, config.keymap("original").to_theirs(net.state_dict())


@every
def test_file_is_recognised_imported_and_exported_byte_by_byte(layout: str, tmp_path: Path) -> None:
    _, theirs = make(layout)
    save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    said = " ".join(model.inspect(tmp_path / "theirs.safetensors"))
    assert CONFIGS[layout].words in said and "complete" in said
    (file,) = model.import_model(tmp_path / "theirs.safetensors", tmp_path / "in")
    model.export([file], layout, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@every
@pytest.mark.parametrize("prefix", ["", "adapter.", "module."])
def test_published_files_are_weights_as_they_are(layout: str, prefix: str, tmp_path: Path) -> None:
    source, theirs = make(layout)
    target, _ = make(layout)
    torch.save({prefix + k: v for k, v in theirs.items()}, tmp_path / "a.pth")
    parts = slots.parts(CONFIGS[layout].kind, CONFIGS[layout].node)
    checkpoint.load_weights(target, tmp_path / "a.pth", parts=parts)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize(
    ("config", "tensors", "size"), [(StyleConfig(), 42, 38_587_392), (FuserConfig(), 59, 27_285_184)]
)
def test_names_are_all_of_the_published_ones(config: Any, tensors: int, size: int) -> None:
    shapes = detect.shapes(config)
    assert sum(shape.numel() for shape in shapes.values()) == size
    theirs = [name for pair in config.keymap("original").pairs for name in pair.theirs]
    assert len(set(theirs)) == len(theirs) == tensors == len(shapes)


@every
def test_part_of_a_file_or_another_network_is_refused(layout: str, tmp_path: Path) -> None:
    _, theirs = make(layout)
    del theirs["transformer_layes.1.attn.in_proj_bias"]
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"1 of \d+ tensors missing: layers.1.to_qkv.bias"):
        model.read([tmp_path / "a.safetensors"])
    [other] = CONFIGS.keys() - {layout}
    save_file(make(other)[1], tmp_path / "b.safetensors")
    parts = slots.parts(CONFIGS[layout].kind, CONFIGS[layout].node)
    with pytest.raises(ConfigError, match=r"holds .*, no "):
        checkpoint.load_weights(make(layout)[0], tmp_path / "b.safetensors", parts=parts)


@every
def test_pipelines_have_no_place_for_it(layout: str, tmp_path: Path) -> None:
    save_file(make(layout)[1], tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=f"layout original has no place for a .*; use {layout}"):
        model.export([tmp_path / "a.safetensors"], "original", tmp_path / "b.safetensors")

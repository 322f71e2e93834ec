"""T2I-Adapter files of TencentARC and diffusers: told apart, read in and written back as they were."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.t2i_adapter import T2IAdapter, T2IAdapterOptions
from ldm.control import Adapter
from ldm.convert import model
from ldm.convert.tables_t2i import T2I_MAPS, t2i
from ldm.models.unet import UNet, UNetConfig
from ldm.registry import ConfigError
from ldm.training import checkpoint

SD = UNetConfig(channels=(8, 16, 32, 32), depth=(0,) * 4, mid_depth=0, blocks=1, num_heads=1, groups=4)
XL = UNetConfig(channels=(8, 16, 32), depth=(0,) * 3, mid_depth=0, blocks=1, num_heads=1, groups=4)
KINDS = {"full": SD, "light": SD, "xl": XL}
PARTS = {"": "t2i_adapter"}
variants = pytest.mark.parametrize("variant", KINDS)
layouts = pytest.mark.parametrize("layout", ["original", "diffusers"])


def make(variant: str, hint_channels: int = 1) -> Adapter:
    options = T2IAdapterOptions(variant=variant, hint_channels=hint_channels)
    return T2IAdapter(options, unet=UNet(KINDS[variant]))


def published(net: Adapter, layout: str) -> dict[str, Tensor]:
    config, _ = t2i(net.state_dict(), "ours")
    return T2I_MAPS[layout](config).to_theirs(net.state_dict())


@variants
@layouts
def test_file_is_recognised_imported_and_exported_bit_by_bit(variant: str, layout: str, tmp_path: Path) -> None:
    theirs = published(make(variant), layout)
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert list(model.inspect(tmp_path / "theirs.safetensors"))[-1] == "    complete"
    said = " ".join(model.inspect(tmp_path / "theirs.safetensors"))
    assert "T2I-Adapter" in said and ("SDXL, 1 channel" if variant == "xl" else "SD1.x, 1 channel") in said
    (file,) = model.import_model(tmp_path / "theirs.safetensors", tmp_path / "in")
    model.export([file], f"t2i_{layout}", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.items())


@variants
@pytest.mark.parametrize("prefix", ["", "adapter.", "module."])
def test_published_files_fill_an_adapter_as_they_are(variant: str, prefix: str, tmp_path: Path) -> None:
    source, target = make(variant), make(variant)
    save_file({prefix + k: v for k, v in published(source, "original").items()}, tmp_path / "a.safetensors")
    checkpoint.load_weights(target, tmp_path / "a.safetensors", parts=PARTS)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize(("theirs", "ours"), [("xl", "full"), ("full", "xl"), ("light", "full"), ("full", "light")])
def test_adapter_of_another_kind_is_refused_and_named(theirs: str, ours: str, tmp_path: Path) -> None:
    save_file(published(make(theirs), "original"), tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"of another architecture than T2IAdapter .*found: T2I-Adapter.* for SD"
    ) as e:
        checkpoint.load_weights(make(ours), tmp_path / "a.safetensors", parts=PARTS)
    assert "\n" not in str(e.value)


def test_incomplete_file_is_refused(tmp_path: Path) -> None:
    theirs = published(make("full"), "original")
    del theirs["body.4.in_conv.weight"]
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"1 of 38 tensors missing: levels.2.in_conv.weight"):
        model.read([tmp_path / "a.safetensors"])


def test_pipelines_have_no_place_for_an_adapter(tmp_path: Path) -> None:
    save_file(make("full").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="layout original has no place for a t2i_adapter; use t2i_original"):
        model.export([tmp_path / "a.safetensors"], "original", tmp_path / "b.safetensors")

"""scripts/sample.py with `mask:` on adapters that add residuals: what the UNet hears, left and right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import registry
from ldm.control import Control
from ldm.models.unet import UNet
from scripts import sample
from tests.integration.test_sample import NET, TEXT, UNET, VAE, save, write_config

T2I = {"name": "t2i_adapter", "vae_factor": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet and a T2I-Adapter that hear one hint, and masks `left.png` and `right.png`, white on that half."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    unet = registry.build("unet", UNET)
    model = {"unet": UNET | {"weights": save(unet, root / "unet.safetensors")}}
    for kind, node in (("vae", VAE), ("text", TEXT)):
        model[kind] = node | {"weights": save(registry.build(kind, node), root / f"{kind}.safetensors")}
    nets = {"net": NET, "lines": T2I}
    for name, node in nets.items():
        file = save(registry.build("adapter", node, unet=unet), root / f"{name}.safetensors")
        nets[name] = node | {"weights": file}
    for left, name in ((0, "left"), (16, "right")):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (left, 0, left + 16, 32))
        mask.save(root / f"{name}.png")
    return write_config(root, model, nets, ["an owl"], steps=1)


@pytest.fixture
def heard(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the script for one step, with these settings; returns the Control that the UNet was given."""
    told: list[Control] = []
    forward = UNet.forward

    def listening(unet: UNet, x_t: Tensor, t: Tensor, control: Control) -> Tensor:
        told.append(control)
        return forward(unet, x_t, t, control)

    monkeypatch.setattr(UNet, "forward", listening)
    hints = f"sample.hints.lines={config.parent / 'hint.png'}"

    def call(*overrides: str) -> Control:
        out = tmp_path / str(len(told))
        sample.main(["--config", str(config), f"out.dir={out}", hints, "sample.batch=2", *overrides])
        assert list(out.glob("*.png"))
        return told[-1]

    return call


def test_a_mask_leaves_its_own_adapters_residuals_in_its_part_alone(config: Path, heard: Any) -> None:
    masks = [f"adapters.{name}.mask={config.parent / side}.png" for name, side in (("net", "left"), ("lines", "right"))]
    whole, parted = heard(), heard(*masks)
    assert len(whole.stages) == 2 and len(whole.skips) == len(parted.skips) > 2 and whole.mid is not None
    net = [*zip(whole.skips, parted.skips, strict=True), (whole.mid, parted.mid)]
    for pairs, flipped in ((net, False), (zip(whole.stages, parted.stages, strict=True), True)):
        for pair in pairs:
            before, after = (x.flip(-1) if flipped else x for x in pair)
            half = before.shape[-1] // 2
            assert before[..., half:].abs().max() > 1e-4 and not after[..., half:].any()
            assert before[..., :half].abs().max() > 1e-4 and torch.equal(after[..., :half], before[..., :half])

"""SD1.5's networks at full size, with random weights, in float32: against diffusers and transformers, and from a file.

Pictures of 256 pixels keep it affordable: minutes in all on one core, below 8 GB. Figures are printed (`pytest -rP`).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adapters  # noqa: F401  (registers them)
from ldm import build
from ldm.control import Control

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
networks = pytest.importorskip("scripts.benchmarks.networks")
setting = pytest.importorskip("scripts.benchmarks.setting")

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SIDE = 256
TOLERANCE = 1e-5  # largest difference over the largest value
Run = Callable[[], list[Tensor]]


def unet(scale: Any) -> tuple[nn.Module, Run, Run]:
    theirs = networks.their_unet(scale, CPU)
    ours = networks.our_unet(scale, CPU, theirs)
    x, t = torch.randn(1, 4, SIDE // 8, SIDE // 8), torch.tensor([501])
    context = torch.randn(1, 77, scale.unet.context_dim)
    return ours, lambda: [ours(x, t, Control(context=context))], lambda: [theirs(x, t, context).sample]


def controlnet(scale: Any) -> tuple[nn.Module, Run, Run]:
    theirs = networks.their_controlnet(scale, CPU)
    with torch.device("meta"):
        base = networks.UNet(scale.unet)
    ours = networks.our_controlnet(scale, CPU, base, theirs)
    x, t, hint = torch.randn(1, 4, SIDE // 8, SIDE // 8), torch.tensor([501]), torch.rand(1, 3, SIDE, SIDE)
    context = torch.randn(1, 77, scale.unet.context_dim)

    def said() -> list[Tensor]:
        control = ours.control(x, t, Control(context=context), ours.prepare(hint))
        assert control.mid is not None
        return [*control.skips, control.mid]

    def expected() -> list[Tensor]:
        skips, mid = theirs(x, t, context, hint, return_dict=False)
        return [*skips, mid]

    return ours, said, expected


def vae(scale: Any) -> tuple[nn.Module, Run, Run]:
    theirs = networks.their_vae(scale, CPU)
    ours = networks.our_vae(scale, CPU, theirs)
    x, z = torch.randn(1, 3, SIDE, SIDE).tanh(), torch.randn(1, 4, SIDE // 8, SIDE // 8)
    return (
        ours,
        lambda: [ours.encode(x).mean, ours.decode(z)],
        lambda: [theirs.encode(x).latent_dist.mean, theirs.decode(z).sample],
    )


def text(scale: Any) -> tuple[nn.Module, Run, Run]:
    theirs = networks.their_text(scale, CPU)
    ours = networks.our_text(scale, CPU, theirs)
    ids = networks.ids(scale, ["", "a photograph of an astronaut riding a horse"])
    return ours, lambda: [ours(ids)], lambda: [theirs(ids)[0]]


@pytest.mark.parametrize("make", [unet, controlnet, vae, text], ids=lambda make: make.__name__)
@torch.no_grad()
def test_outputs_are_those_of_the_reference(make: Callable[[Any], tuple[nn.Module, Run, Run]]) -> None:
    scale = networks.SCALES["full"]
    ours, said, expected = make(scale)
    outputs = expected()
    del expected  # and with it the reference: its memory is ours as long as the weights are plain
    for form in ("plain", "ready"):
        if form == "ready":
            setting.ready(ours, setting.Setting(scale, CPU, torch.float32))
        start = time.perf_counter()
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(said(), outputs, strict=True)]
        print(f"{make.__name__}, {form}: {max(errors):.1e} in {time.perf_counter() - start:.1f} s")
        assert max(errors) <= TOLERANCE, form


def test_a_unet_is_filled_from_its_file(tmp_path: Path) -> None:
    """The start of sample.py: what it takes beyond reading the file is printed."""
    file = tmp_path / "unet.safetensors"
    save_file(networks.our_unet(networks.SCALES["full"], CPU, None).state_dict(), file)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as content:
        while content.read(1 << 24):
            pass
    read = time.perf_counter() - start
    loaded = build.component("unet", {"name": "unet", "weights": str(file)})
    filled = time.perf_counter() - start - read
    print(f"{file.stat().st_size / 1e9:.2f} GB: read in {read:.1f} s, built and filled in {filled:.1f} s")
    assert all(value.isfinite().all() and value.any() for value in loaded.state_dict().values())

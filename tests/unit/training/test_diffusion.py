"""The diffusion stage with a text kind that gives a context and a vector, as SDXL's does."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.control import Control
from ldm.data.images import Batch, collate
from ldm.denoiser import Denoiser
from ldm.models.sdxl_text import SDXLText, SDXLTextConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.registry import ConfigError, build
from ldm.schedule import Schedule
from ldm.training.cache import LatentData
from ldm.training.diffusion import DiffusionOptions, DiffusionStage
from ldm.training.distributed import ALONE
from ldm.training.draws import Draws
from tests.small import waken

TOWER: dict[str, Any] = {"width": 8, "layers": 2, "heads": 2, "merges": 60, "context_length": 16}
SIZE = 32


def stage(**options: Any) -> DiffusionStage:
    torch.manual_seed(0)
    text = SDXLText(SDXLTextConfig(clip=TOWER, open_clip={**TOWER, "projection": 6}))
    unet = UNetConfig(channels=(8, 16), blocks=1, depth=(0, 1), context_dim=16, vector_dim=6 + 6 * 256, groups=4)
    return DiffusionStage(
        DiffusionOptions(**options),
        denoiser=Denoiser(waken(UNet(unet)), {}),
        vae=VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0)),
        text=text.requires_grad_(False),
        schedule=Schedule(),
        objective="eps",
        uses={},
    ).train()


def heard(stage: DiffusionStage) -> list[Control]:
    """Filled with the Control of every UNet call from now on."""
    calls: list[Control] = []
    stage.denoiser.unet.register_forward_pre_hook(lambda _, args: calls.append(args[2]))
    return calls


def batch(captions: list[str]) -> Batch:
    image = torch.rand(len(captions), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch([str(i) for i in range(len(captions))], image, captions)


def loss(stage: DiffusionStage, data: Any, n: int) -> Tensor:
    return stage(data, Draws(3, range(n)), "model", 0).total


def test_a_step_tells_the_unet_context_and_vector_and_trains_it() -> None:
    this = stage(drop_text=0.0)
    calls = heard(this)
    loss(this, batch(["a cat", "a dog"]), 2).backward()
    want = this.base(["a cat", "a dog"], (SIZE, SIZE))
    torch.testing.assert_close(calls[0].context, want.context)
    torch.testing.assert_close(calls[0].vector, want.vector)
    gradient = this.denoiser.unet.get_parameter("encoder.vector_embed.0.weight").grad
    assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_unet_is_told_where_pictures_were_cut_from_with_or_without_their_caption(drop: float) -> None:
    this = stage(drop_text=drop)
    calls = heard(this)
    data = dataclasses.replace(batch(["a cat", "a dog"]), origin=torch.tensor([[SIZE, SIZE, 0, 0], [90, 48, 8, 0]]))
    loss(this, data, 2)
    said = ["a cat", "a dog"] if drop == 0 else ["", ""]
    whole, cut = calls[0].vector, this.base(said, (90, 48)).vector
    assert whole is not None and cut is not None
    torch.testing.assert_close(whole[0], this.base(said, (SIZE, SIZE)).vector[0])  # pyright: ignore
    torch.testing.assert_close(whole[1, : 6 + 2 * 256], cut[1, : 6 + 2 * 256])  # pooled text, original size


def test_a_dropped_caption_is_the_empty_one_in_context_and_vector() -> None:
    this = stage(drop_text=1.0)
    calls = heard(this)
    loss(this, batch(["a cat", "a dog"]), 2)
    empty = this.base(["", ""], (SIZE, SIZE))
    torch.testing.assert_close(calls[0].context, empty.context)
    torch.testing.assert_close(calls[0].vector, empty.vector)


def test_cached_and_uncached_steps_are_equal() -> None:
    this = stage(drop_text=0.3, cache=True)
    data = build("data", {"name": "synthetic", "size": SIZE, "length": 4})
    cached = this.cached(data, ALONE)
    assert isinstance(cached, LatentData)
    rows = [0, 2, 3]
    plain = collate([data[row] for row in rows])
    calls = heard(this)
    losses = [loss(this, x, 3) for x in (plain, cached.collate([cached.load(row) for row in rows]))]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(calls[0].context, calls[1].context)
    torch.testing.assert_close(calls[0].vector, calls[1].vector)
    assert losses[0] > 0 and len(calls) == 2


@pytest.mark.parametrize(
    "options", [{"flip": True}, {"crop": "random"}, {"reference": {"same": "file", "itself": True, "crop": 0.5}}]
)
def test_what_is_augmented_is_not_cached(options: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    data = build("data", {"name": "sidecar", "root": str(tmp_path), "size": SIZE, **options})
    with pytest.raises(ConfigError, match=r"stage.cache is on, but data.flip, data.crop or data.reference asks for"):
        stage(cache=True).cached(data, ALONE)


def test_validation_draws_with_both_towers() -> None:
    this = stage(preview_steps=1)
    report = this.validate([batch(["a cat", "a dog"])], images=1, seed=0)
    assert report.figures["loss"] > 0 and report.columns["base"].shape == (1, 3, SIZE, SIZE)


def test_cut_captions_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    this, long = stage(), "a b c d e f g h i j k l m n o p q"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            this.base(["a", long], (SIZE, SIZE))
    assert [r.getMessage()[:24] for r in caplog.records] == ["1 of the 2 prompts so fa"]

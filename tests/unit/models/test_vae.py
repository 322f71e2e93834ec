import math
from collections import Counter

import pytest
import torch
from torch import nn

import ldm.models  # noqa: F401  (registers)
from ldm.models.blocks import GroupNorm
from ldm.models.vae import VAE, Downsample, Posterior, VAEConfig
from ldm.registry import ConfigError, build

TINY = VAEConfig(channels=(8, 16), blocks=1, latent_channels=3, groups=4, scale_factor=0.5)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "total", "encoder", "decoder", "tensors"),
    [
        (VAEConfig(), 83_653_863, 34_163_592, 49_490_179, 248),
        (VAEConfig(channels=(128, 256, 512), latent_channels=3), 55_312_063, 22_351_238, 32_960_771, 204),
    ],
    ids=["f8", "f4"],
)
def test_published_sizes(config: VAEConfig, total: int, encoder: int, decoder: int, tensors: int) -> None:
    with torch.device("meta"):
        vae = VAE(config)
    assert (count(vae), count(vae.encoder), count(vae.decoder)) == (total, encoder, decoder)
    assert len(vae.state_dict()) == tensors


def test_f8_norms_are_52_group_norms_with_eps_1e_6() -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d)]
    assert Counter((type(m), getattr(m, "num_groups", None), m.eps) for m in norms) == {(GroupNorm, 32, 1e-6): 52}


def test_attention_projections_have_biases() -> None:
    vae = VAE(TINY)
    for mid in (vae.encoder.mid, vae.decoder.mid):
        for layer in (mid.attn.to_q, mid.attn.to_k, mid.attn.to_v, mid.attn.to_out):
            assert isinstance(layer, nn.Linear) and layer.bias is not None


def test_downsample_pads_right_and_bottom_only() -> None:
    down = Downsample(1)
    nn.init.zeros_(down.conv.bias)
    nn.init.zeros_(down.conv.weight)
    with torch.no_grad():
        down.conv.weight[0, 0, 0, 0] = 1.0  # picks the upper left pixel of each window
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 2, 4] = 1.0
    out = down(x)
    assert out.shape == (1, 1, 3, 3)
    assert out.nonzero().tolist() == [[0, 0, 1, 2]]  # with symmetric padding the even pixels would be missed


def test_posterior_clamps_logvar() -> None:
    moments = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([100.0, -100.0]).view(1, 2, 1, 1)], dim=1)
    std = Posterior.from_moments(moments).std.flatten()
    torch.testing.assert_close(std, torch.tensor([math.exp(10), math.exp(-15)]), rtol=1e-6, atol=0)


def test_posterior_kl_by_hand() -> None:
    zero = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(Posterior(zero, zero).kl(), torch.zeros(2))
    mean, logvar = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), math.log(4.0))
    expected = 2 * 0.5 * (9 + 4 - 1 - math.log(4.0))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), torch.tensor([expected]))


def test_posterior_sample_is_mean_plus_std_times_noise() -> None:
    posterior = Posterior(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), math.log(9.0)))
    assert posterior.sample(torch.full((1, 1, 1, 1), 0.5)).item() == pytest.approx(3.5)
    assert posterior.mode() is posterior.mean


def test_posterior_of_half_precision_moments_is_float32() -> None:
    posterior = Posterior.from_moments(torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16))
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_f8_latent_of_72x88_is_9x11() -> None:
    vae = VAE(VAEConfig(channels=(8, 8, 8, 8), blocks=1, groups=4))
    assert vae.factor == 8
    latent = vae.to_latent(torch.zeros(1, 3, 72, 88), None)
    assert latent.shape == (1, 4, 9, 11)
    assert vae.from_latent(latent).shape == (1, 3, 72, 88)


def test_latents_are_scaled_samples() -> None:
    vae, x, noise = VAE(TINY), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    posterior = vae.encode(x)
    torch.testing.assert_close(vae.to_latent(x, noise), 0.5 * posterior.sample(noise))
    torch.testing.assert_close(vae.to_latent(x, None), 0.5 * posterior.mean)
    torch.testing.assert_close(vae.from_latent(0.5 * noise), vae.decode(noise))
    torch.testing.assert_close(vae(x)[0], vae.decode(posterior.mean))
    torch.testing.assert_close(vae(x, noise)[0], vae.decode(posterior.sample(noise)))


def test_one_by_one_decoding_equals_batched() -> None:
    vae, z = VAE(TINY), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(vae.from_latent(z, one_by_one=True), vae.from_latent(z), atol=1e-5, rtol=0)


class Local(nn.Module):
    """A decoder without global statistics, for which tiles away from the seams are exact."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(z, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("shape", [(24, 40), (16, 16), (17, 9), (5, 33)])
def test_tiled_decoding_of_a_local_decoder_is_exact(shape: tuple[int, int]) -> None:
    vae, z = VAE(TINY), torch.randn(2, 3, *shape)
    vae.decoder = Local()  # pyright: ignore[reportAttributeAccessIssue]
    tiled = vae.from_latent(z, tile=8)
    assert tiled.shape == (2, 3, 2 * shape[0], 2 * shape[1])
    torch.testing.assert_close(tiled, vae.from_latent(z), atol=1e-5, rtol=0)


class TileMean(Local):
    """A decoder whose tiles disagree as much as they can: each is one flat colour."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return super().forward(z.mean(dim=(2, 3), keepdim=True).expand_as(z))


def test_tiles_are_blended_over_a_quarter_of_their_side() -> None:
    vae, z = VAE(TINY), torch.arange(16.0).expand(1, 3, 8, 16) / 16
    vae.decoder = TileMean()  # pyright: ignore[reportAttributeAccessIssue]
    nn.init.dirac_(vae.post_quant.weight)
    row = vae.from_latent(0.5 * z, tile=10)[0, 0, 0]  # two tiles, latent columns 0..9 and 6..15
    step = row[1:] - row[:-1]
    assert row[0] < row[-1]
    assert (step[:11].abs() < 1e-5).all() and (step[20:].abs() < 1e-5).all()
    assert (step[12:19] > 0).all() and step.max() < 0.3 * (row[-1] - row[0])


def test_wrong_tile_and_size_are_refused() -> None:
    vae = VAE(TINY)
    with pytest.raises(ValueError, match=r"tile is 2 latent pixels, must be at least 4"):
        vae.from_latent(torch.zeros(1, 3, 8, 8), tile=2)
    with pytest.raises(ValueError, match=r"image is \(1, 3, 9, 8\).*multiples of 2; resize or crop"):
        vae.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"must have 3 channels"):
        vae.encode(torch.zeros(1, 1, 8, 8))


def test_every_parameter_gets_a_gradient() -> None:
    vae = VAE(TINY)
    out, posterior = vae(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4))
    (out.square().mean() + posterior.kl().mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None] == []
    assert vae.last_layer.grad is not None


def test_bf16_weights_decode_float32_latents() -> None:
    vae = VAE(TINY).to(torch.bfloat16)
    assert vae.from_latent(torch.randn(1, 3, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (32, 48)}, r"vae.channels has \[48\], must be multiples of vae.groups=32"),
        ({"channels": ()}, "vae.channels is empty"),
        ({"blocks": 0}, "vae.blocks is 0, must be at least 1"),
        ({"scale_factor": 0.0}, "vae.scale_factor is 0.0, must be positive"),
        ({"chanels": (32,)}, "did you mean 'channels'"),
    ],
)
def test_bad_config_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build("vae", {"name": "kl", **options})
    assert "\n" not in str(error.value)


def test_builds_from_yaml_lists() -> None:
    vae = build("vae", {"name": "kl", "channels": [8, 16], "blocks": 1, "groups": 4})
    assert vae.config.channels == (8, 16) and vae.factor == 2

"""Our KL-VAE against diffusers' AutoencoderKL with the same random weights."""

import pytest
import torch

from ldm.convert import diffusers_vae
from ldm.models.vae import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "f8": VAEConfig(channels=(8, 16, 16, 16), blocks=2, groups=4),
    "f4": VAEConfig(channels=(8, 16, 32), blocks=1, latent_channels=3, groups=8),
}


def reference(config: VAEConfig) -> torch.nn.Module:
    levels = len(config.channels)
    model = diffusers.AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that biases and norms matter too
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_agree(name: str) -> None:
    config = CONFIGS[name]
    theirs, ours = reference(config), VAE(config)
    ours.load_state_dict(diffusers_vae(config).to_ours(theirs.state_dict()))
    x, z = torch.rand(2, 3, 24, 40) * 2 - 1, torch.randn(2, config.latent_channels, 6, 10)
    with torch.no_grad():
        expected, got = theirs.encode(x).latent_dist, ours.encode(x)
        for a, b in ((got.mean, expected.mean), (got.logvar, expected.logvar), (got.std, expected.std)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        noise = torch.randn_like(got.mean)
        torch.testing.assert_close(got.sample(noise), expected.mean + expected.std * noise, atol=1e-5, rtol=1e-5)
        kl = expected.kl()
        torch.testing.assert_close(got.kl(), kl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(name: str) -> None:
    config = CONFIGS[name]
    original, keys = reference(config).state_dict(), diffusers_vae(config)
    back = keys.to_theirs(keys.to_ours(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[k], original[k]) for k in original)


def test_older_attention_names_are_read() -> None:
    config = CONFIGS["f4"]
    state, keys = reference(config).state_dict(), diffusers_vae(config)
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(state)
    for new_name, old_name in renames.items():
        old = {k.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): v for k, v in old.items()}
    assert old.keys() != state.keys()
    expected = keys.to_ours(state)
    assert all(torch.equal(v, expected[k]) for k, v in keys.to_ours(old).items())


def test_f8_has_every_tensor_of_the_reference() -> None:
    config = VAEConfig()
    with torch.device("meta"):
        theirs, ours = (
            diffusers.AutoencoderKL(
                block_out_channels=config.channels,
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
            ),
            VAE(config),
        )
    renamed = diffusers_vae(config).to_theirs(ours.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert len(renamed) == 248


def test_foreign_keys_are_refused() -> None:
    keys = diffusers_vae(CONFIGS["f4"])
    said = r"1 keys are not in this layout: encoder.conv_inn.weight \(nearest: encoder.conv_in.weight\); check that the"
    with pytest.raises(ValueError, match=said):
        keys.to_ours({"encoder.conv_inn.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 keys have no name in this layout: encoder.nothing"):
        keys.to_theirs({"encoder.nothing": torch.zeros(1)})

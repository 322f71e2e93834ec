import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import registry
from ldm.control import Control, ExtraKV
from ldm.models.blocks import timestep_embedding
from ldm.models.unet import CrossAttn, DecoderLevel, Tap, UNet, UNetConfig, num_parameters
from ldm.registry import ConfigError
from tests.small import SD1, SD15, SDXL, SHALLOW, latents, random_control, trained_unet


@contextmanager
def decoder_outputs(unet: UNet) -> Iterator[list[Tensor]]:
    """What each decoder block puts out, in order."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    blocks = [block for level in cast("list[DecoderLevel]", unet.decoder.levels) for block in level.blocks]
    handles = [block.register_forward_hook(remember) for block in blocks]
    yield seen
    for handle in handles:
        handle.remove()


def first_difference(plain: list[Tensor], unet: UNet, x_t: Tensor, t: Tensor, control: Control) -> int:
    """Index of the first decoder block whose output is not what it was in `plain`."""
    with decoder_outputs(unet) as changed:
        unet(x_t, t, control)
    assert len(plain) == len(changed) == len(unet.spec.skips)
    equal = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert equal == sorted(equal, reverse=True)  # once changed, changed to the end
    return equal.count(True)


def zeros(control: Control) -> Control:
    assert control.mid is not None
    return Control(skips=tuple(torch.zeros_like(s) for s in control.skips), mid=torch.zeros_like(control.mid))


def test_fresh_unet_returns_exactly_zero() -> None:
    unet = UNet(SD1)
    weights = [p for name, p in unet.named_parameters() if name.endswith("weight")]
    assert sum(not p.any() for p in weights) == 39
    x_t, t, base = latents(SD1)
    assert not unet(x_t, t, base).any()


def test_prediction_has_the_latents_shape_whatever_it_is() -> None:
    unet = trained_unet(dataclasses.replace(SD1, out_channels=6))
    x_t, t, base = latents(SD1, multiple=1)
    assert x_t.shape == (2, 4, 8, 16)
    assert unet(x_t, t, base).shape == (2, 6, 8, 16)
    assert unet(x_t, t.float() + 0.5, base).isfinite().all()


def test_forward_is_decoder_of_encoder() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1)
    control = base + random_control(unet.spec, *x_t.shape[-2:])
    enc = unet.encoder(x_t, t, control)
    assert torch.equal(unet.decoder(enc, control), unet(x_t, t, control))
    assert enc.emb.shape == (2, unet.spec.emb_dim)


@pytest.mark.parametrize("config", [SD1, SHALLOW], ids=["sd1", "shallow"])
def test_features_have_the_shapes_of_the_spec(config: UNetConfig) -> None:
    unet = trained_unet(config)
    x_t, t, base = latents(config)
    enc = unet.encoder(x_t, t, base)
    h, w = x_t.shape[-2:]
    taps = (*unet.spec.skips, unet.spec.mid)
    expected = [(2, tap.channels, h // tap.stride, w // tap.stride) for tap in taps]
    assert [tuple(f.shape) for f in (*enc.skips, enc.mid)] == expected


@pytest.mark.parametrize("k", range(12))
def test_skip_residual_k_is_first_read_by_decoder_block_11_minus_k(k: int) -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1, multiple=1)
    noise = random_control(unet.spec, *x_t.shape[-2:])
    silent = zeros(noise)
    only = dataclasses.replace(silent, skips=(*silent.skips[:k], noise.skips[k], *silent.skips[k + 1 :]))
    with decoder_outputs(unet) as plain:
        unet(x_t, t, base)
    assert first_difference(plain, unet, x_t, t, base + only) == 11 - k


def test_mid_residual_is_read_by_every_decoder_block() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1, multiple=1)
    noise = random_control(unet.spec, *x_t.shape[-2:])
    with decoder_outputs(unet) as plain:
        unet(x_t, t, base)
    assert first_difference(plain, unet, x_t, t, base + Control(mid=noise.mid)) == 0


def test_zero_residuals_change_no_bit() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1)
    silent = zeros(random_control(unet.spec, *x_t.shape[-2:]))
    assert torch.equal(unet(x_t, t, base + silent), unet(x_t, t, base))


@pytest.mark.parametrize("s", range(4))
def test_stage_residual_is_added_before_its_skip_is_stored(s: int) -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1)
    stages = random_control(unet.spec, *x_t.shape[-2:]).stages
    only = tuple(x if i == s else torch.zeros_like(x) for i, x in enumerate(stages))
    plain, changed = unet.encoder(x_t, t, base), unet.encoder(x_t, t, base + Control(stages=only))
    tapped = 3 * s + 2  # last block of the resolution: SD1.5's skips 2, 5, 8, 11
    for i, (a, b) in enumerate(zip(plain.skips, changed.skips, strict=True)):
        if i < tapped:
            assert torch.equal(a, b)
        elif i == tapped:
            assert torch.equal(a + stages[s], b)
        else:
            assert not torch.equal(a, b)
    assert not torch.equal(plain.mid, changed.mid)


def test_image_prompt_reaches_every_cross_attention_layer_once() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1, multiple=1)
    layers = unet.spec.cross_attn
    k = tuple(torch.randn(2, 3, a.inner_dim) for a in layers)
    with decoder_outputs(unet) as plain:
        unet(x_t, t, base)
    read: list[int] = []
    for i in range(len(layers)):
        v = tuple(torch.full_like(k[j], float(i == j)) for j in range(len(layers)))
        read.append(first_difference(plain, unet, x_t, t, base + Control(attn=(ExtraKV(k=k, v=v),))))
    below = [0] * sum(layer.part != "up" for layer in layers)
    assert read == [*below, *range(3, 12)]  # SD1.5's first three decoder blocks have no attention


def test_image_prompt_of_scale_zero_changes_no_bit() -> None:
    unet = trained_unet(SHALLOW)
    x_t, t, base = latents(SHALLOW)
    k = tuple(torch.randn(2, 3, a.inner_dim) for a in unet.spec.cross_attn)
    prompt = Control(attn=(ExtraKV(k=k, v=k),))
    plain = unet(x_t, t, base)
    assert torch.equal(unet(x_t, t, base + prompt.scaled(0.0)), plain)
    assert not torch.equal(unet(x_t, t, base + prompt), plain)


def test_guidance_batch_equals_two_calls() -> None:
    unet = trained_unet(SHALLOW)
    x_t, t, cond = latents(SHALLOW)
    uncond = Control(context=torch.zeros_like(cast("Tensor", cond.context)))
    cond = cond + random_control(unet.spec, *x_t.shape[-2:])
    both = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), Control.batch(uncond, cond))
    apart = torch.cat([unet(x_t, t, uncond), unet(x_t, t, cond)])
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=0)


def test_vector_is_added_to_the_timestep_embedding() -> None:
    unet = trained_unet(dataclasses.replace(SHALLOW, vector_dim=6))
    assert unet.encoder.vector_embed is not None
    x_t, t, base = latents(unet.config)
    time = unet.encoder.time_embed(timestep_embedding(t, unet.config.channels[0]))
    both = time + unet.encoder.vector_embed(cast("Tensor", base.vector))
    torch.testing.assert_close(unet.encoder(x_t, t, base).emb, F.silu(both))


def test_recomputed_activations_give_the_same_loss_and_gradients() -> None:
    unet = trained_unet(SHALLOW).requires_grad_(True)
    x_t, t, base = latents(SHALLOW)

    def run() -> tuple[Tensor, list[Tensor]]:
        loss = unet(x_t, t, base).square().mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(unet.parameters())))

    loss, grads = run()
    unet.checkpoint_activations()
    again, grads_again = run()
    assert torch.equal(loss, again)
    torch.testing.assert_close(grads_again, grads, atol=1e-5, rtol=0)


def test_recomputing_keeps_fewer_activations() -> None:
    unet = trained_unet(SD1).requires_grad_(True)
    x_t, t, base = latents(SD1, multiple=1)

    def saved() -> int:
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            unet(x_t, t, base).sum()
        return total

    everything = saved()
    unet.checkpoint_activations()
    assert saved() < everything / 2
    unet.checkpoint_activations(False)
    assert saved() == everything


@pytest.mark.parametrize("size", [(12, 16), (8, 20)])
def test_size_that_does_not_halve_often_enough_is_refused(size: tuple[int, int]) -> None:
    h, w = size
    _, t, base = latents(SD1)
    with pytest.raises(ValueError, match=rf"latent is {h}x{w} \(h w\); both must be multiples of 8"):
        UNet(SD1)(torch.randn(2, 4, h, w), t, base)


def wrong(field: str) -> tuple[Tensor, Control, str]:
    """Input that does not fit SHALLOW, and what must be said about it."""
    x_t, _, base = latents(SHALLOW)
    noise = random_control(trained_unet().spec, *x_t.shape[-2:])
    return {
        "channels": (x_t[:, :3], base, "x_t has 3 channels; this UNet takes 4"),
        "no context": (x_t, Control(), r"Control\.context is None; this UNet has cross-attention"),
        "context width": (x_t, Control(context=torch.randn(2, 5, 7)), r"context is \(2, 5, 7\) .* needs b=2, d=12"),
        "context batch": (x_t, Control(context=torch.randn(1, 5, 12)), r"context is \(1, 5, 12\) .* needs b=2, d=12"),
        "vector": (x_t, base + Control(vector=torch.randn(2, 6)), "takes no vector, the Control has one"),
        "skips": (x_t, base + Control(skips=noise.skips[1:]), r"skips has 3 entries; this UNet has 4 skips"),
        "stages": (x_t, base + Control(stages=noise.stages[1:]), r"stages has 1 entries; this UNet has 2 resolutions"),
    }[field]


@pytest.mark.parametrize(
    "field", ["channels", "no context", "context width", "context batch", "vector", "skips", "stages"]
)
def test_input_that_does_not_fit_gets_one_line(field: str) -> None:
    x_t, control, message = wrong(field)
    with pytest.raises(ValueError, match=message) as caught:
        trained_unet()(x_t, torch.zeros(2), control)
    assert "\n" not in str(caught.value)


def test_missing_vector_is_refused() -> None:
    unet = trained_unet(dataclasses.replace(SHALLOW, vector_dim=6))
    x_t, t, base = latents(SHALLOW)
    with pytest.raises(ValueError, match=r"takes a vector .* has none"):
        unet(x_t, t, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [8, 16], "depth": [1, 1, 1]}, "depth has 3 entries, channels 2"),
        ({"channels": [8, 16], "depth": [0, 1], "blocks": [1, 1, 1]}, "blocks has 3 entries, channels 2"),
        ({"channels": [8, 16], "depth": [0, 1], "head_dim": 8}, "num_heads is 8 and head_dim 8; set one"),
        ({"channels": [8, 16], "depth": [0, 1], "num_heads": 0, "groups": 8}, "must be positive"),
        ({"channels": [8, 20], "depth": [0, 1], "groups": 8}, r"channels \[20\] are not multiples of groups=8"),
        ({"channels": [8, 20], "depth": [0, 1], "groups": 4}, "attention width 20 is not a multiple of 8 heads"),
        (
            {"channels": [8, 16], "depth": [0, 1], "groups": 8, "num_heads": None, "head_dim": 24},
            "channels 16 are not a multiple of head_dim=24",
        ),
        ({"groups": 0}, "groups is 0, must be at least 1 everywhere"),
        ({"channels": [], "depth": []}, r"channels is \(\), must be at least 1 everywhere"),
        ({"channels": [0, 32], "depth": [0, 1]}, r"channels is \(0, 32\), must be at least 1 everywhere"),
        ({"blocks": 0}, "blocks is 0, must be at least 1 everywhere"),
        ({"blocks": [2, 2, -1, 2]}, r"blocks is \(2, 2, -1, 2\), must be at least 1 everywhere"),
        ({"out_channels": 0}, "out_channels is 0, must be at least 1 everywhere"),
        ({"depth": [1, 1, -1, 0]}, r"depth is \(1, 1, -1, 0\), must be at least 0"),
        ({"mid_depth": -1}, "mid_depth is -1, must be at least 0"),
        ({"chanels": [8, 16]}, "unknown keys .*did you mean 'channels'"),
    ],
)
def test_config_that_does_not_fit_gets_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"unet 'unet': .*{message}") as caught:
        registry.build("unet", {"name": "unet", **options})
    assert "\n" not in str(caught.value)


def test_sd15_spec() -> None:
    with torch.device("meta"):
        unet = UNet(SD15)
    spec = unet.spec
    assert num_parameters(unet) == 859_520_964 and len(unet.state_dict()) == 686
    channels = [320] * 4 + [640] * 3 + [1280] * 5
    strides = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert spec.skips == tuple(Tap(c, s) for c, s in zip(channels, strides, strict=True))
    assert spec.stages == (Tap(320, 1), Tap(640, 2), Tap(1280, 4), Tap(1280, 8))
    assert (spec.mid, spec.multiple) == (Tap(1280, 8), 8)
    assert (spec.in_channels, spec.emb_dim, spec.context_dim, spec.vector_dim) == (4, 1280, 768, None)
    down = [CrossAttn(c, 8, "down") for c in (320, 320, 640, 640, 1280, 1280)]
    up = [CrossAttn(c, 8, "up") for c in (1280, 1280, 1280, 640, 640, 640, 320, 320, 320)]
    assert spec.cross_attn == (*down, CrossAttn(1280, 8, "mid"), *up)


def test_sdxl_spec() -> None:
    with torch.device("meta"):
        unet = UNet(SDXL)
    spec = unet.spec
    assert num_parameters(unet) == 2_567_463_684 and len(unet.state_dict()) == 1680
    assert [tap.channels for tap in spec.skips] == [320] * 4 + [640] * 3 + [1280] * 2
    assert [tap.stride for tap in spec.skips] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert spec.stages == (Tap(320, 1), Tap(640, 2), Tap(1280, 4))
    assert (spec.vector_dim, spec.context_dim, spec.multiple) == (2816, 2048, 4)
    assert len(spec.cross_attn) == 70
    assert set(spec.cross_attn) == {
        *(CrossAttn(640, 10, part) for part in ("down", "up")),
        *(CrossAttn(1280, 20, part) for part in ("down", "mid", "up")),
    }


def test_skips_of_unequal_levels() -> None:
    unet = trained_unet(dataclasses.replace(SHALLOW, blocks=(2, 1)))
    assert unet.spec.skips == (Tap(8, 1), Tap(8, 1), Tap(8, 1), Tap(8, 2), Tap(16, 2))
    x_t, t, base = latents(SHALLOW)
    assert unet(x_t, t, base).shape == x_t.shape

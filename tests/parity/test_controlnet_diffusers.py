"""Our ControlNet against diffusers' ControlNetModel with the same random weights, and the facts a tolerance hides."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.controlnet import ControlNet, ControlNetOptions
from ldm.control import Control
from ldm.convert import diffusers_controlnet, diffusers_unet
from ldm.models.blocks import timestep_embedding
from ldm.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TIME_IDS, TIME_ID_DIM, POOLED = 6, 8, 24  # small versions of SDXL's 6, 256, 1280
HINT_WIDTHS = (4, 8, 8, 16)
SMALL = {
    "sd1": UNetConfig(channels=(16, 32, 32, 32), depth=(1, 1, 1, 0), context_dim=24, num_heads=4, groups=8),
    "sd2": UNetConfig(
        channels=(16, 32, 64, 64),
        depth=(1, 1, 1, 0),
        context_dim=24,
        num_heads=None,
        head_dim=8,
        linear_proj=True,
        groups=8,
    ),
    "sdxl": UNetConfig(
        channels=(16, 32, 64),
        depth=(0, 2, 3),
        mid_depth=3,
        context_dim=24,
        num_heads=None,
        head_dim=8,
        linear_proj=True,
        vector_dim=POOLED + TIME_IDS * TIME_ID_DIM,
        groups=8,
    ),
}
FULL = {
    "sd1": UNetConfig(),
    "sd2": UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_proj=True),
    "sdxl": UNetConfig(
        channels=(320, 640, 1280),
        depth=(0, 2, 10),
        mid_depth=10,
        context_dim=2048,
        num_heads=None,
        head_dim=64,
        linear_proj=True,
        vector_dim=2816,
    ),
}
SIZES = {"sd1": (361_279_120, 340), "sd2": (364_228_240, 340), "sdxl": (1_251_014_160, 844)}
ZERO_CONVS = {"sd1": 11_479_680, "sd2": 11_479_680, "sdxl": 6_560_640}
NORMS = {"sd1": (20, 7, 21), "sd2": (20, 7, 21), "sdxl": (16, 5, 102)}  # GN 1e-5, GN 1e-6, LN 1e-5


def shared_config(config: UNetConfig) -> dict[str, Any]:
    """What UNet2DConditionModel and ControlNetModel have in common; `attention_head_dim` is the number of heads."""
    out: dict[str, Any] = {
        "in_channels": config.in_channels,
        "block_out_channels": config.channels,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        "layers_per_block": config.blocks,
        "transformer_layers_per_block": [d or 1 for d in config.depth[:-1]] + [config.mid_depth],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads(c) for c in config.channels],
        "use_linear_projection": config.linear_proj,
        "norm_num_groups": config.groups,
    }
    if config.vector_dim:
        dim = 256 if config.vector_dim == 2816 else TIME_ID_DIM
        out |= {"addition_embed_type": "text_time", "addition_time_embed_dim": dim}
        out |= {"projection_class_embeddings_input_dim": config.vector_dim}
    return out


def random_weights(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return model.eval()


def unets(config: UNetConfig) -> tuple[UNet, nn.Module]:
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)]
    theirs = random_weights(diffusers.UNet2DConditionModel(**shared_config(config), up_block_types=up))
    ours = UNet(config).eval()
    ours.load_state_dict(diffusers_unet(config).to_ours(theirs.state_dict()))
    return ours, theirs


def controlnets(config: UNetConfig, unet: UNet) -> tuple[ControlNet, nn.Module]:
    net = diffusers.ControlNetModel(**shared_config(config), conditioning_embedding_out_channels=HINT_WIDTHS)
    theirs = random_weights(net)
    ours = ControlNet(ControlNetOptions(hint_widths=HINT_WIDTHS), unet=unet).eval()
    ours.load_state_dict(diffusers_controlnet(config).to_ours(theirs.state_dict()))
    return ours, theirs


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor, Control, dict[str, Any]]:
    b, side = 2, 2 ** (len(config.channels) - 1)
    x, hint = torch.randn(b, 4, 2 * side, side), torch.rand(b, 3, 16 * side, 8 * side)
    t, context = torch.tensor([10, 981]), torch.randn(b, 7, config.context_dim)
    words: dict[str, Any] = {"encoder_hidden_states": context}
    if not config.vector_dim:
        return x, hint, t, Control(context=context), words
    pooled, time_ids = torch.randn(b, POOLED), torch.tensor([[64.0, 48, 0, 3, 64, 64], [32, 32, 1, 0, 16, 64]])
    words["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    sizes = timestep_embedding(time_ids.flatten(), TIME_ID_DIM).view(b, -1)
    return x, hint, t, Control(context=context, vector=torch.cat([pooled, sizes], dim=-1)), words


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_residuals_and_controlled_prediction_agree(name: str, scale: float) -> None:
    config = SMALL[name]
    unet, their_unet = unets(config)
    net, their_net = controlnets(config, unet)
    x, hint, t, base, words = inputs(config)
    skips, mid = their_net(x, t, controlnet_cond=hint, conditioning_scale=scale, return_dict=False, **words)
    control = net.control(x, t, base, net.prepare(hint)).scaled(scale)
    assert control.mid is not None and len(control.skips) == len(skips) == len(unet.spec.skips)
    for got, expected in zip((*control.skips, control.mid), (*skips, mid), strict=True):
        assert expected.std() > 0.01
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected = their_unet(
        x, t, down_block_additional_residuals=skips, mid_block_additional_residual=mid, **words
    ).sample
    got = unet(x, t, base + control)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - unet(x, t, base)).abs().max() > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_exact(name: str) -> None:
    config = SMALL[name]
    _, theirs = controlnets(config, UNet(config))
    original, keys = theirs.state_dict(), diffusers_controlnet(config)
    back = keys.to_theirs(keys.to_ours(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[k], original[k]) for k in original)


@pytest.mark.parametrize("name", FULL)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        net = ControlNet(ControlNetOptions(), unet=UNet(FULL[name]))
    total, tensors = SIZES[name]
    assert sum(p.numel() for p in net.parameters()) == total
    assert len(net.state_dict()) == tensors
    assert sum(p.numel() for p in net.hint.parameters()) == 1_086_480
    assert sum(p.numel() for m in (net.zero_convs, net.zero_mid) for p in m.parameters()) == ZERO_CONVS[name]


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_the_reference_at_full_size(name: str) -> None:
    with torch.device("meta"):
        ours = ControlNet(ControlNetOptions(), unet=UNet(FULL[name]))
        theirs = diffusers.ControlNetModel(**shared_config(FULL[name]))
    renamed = diffusers_controlnet(FULL[name]).to_theirs(ours.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", FULL)
def test_norm_census(name: str) -> None:
    with torch.device("meta"):
        net = ControlNet(ControlNetOptions(), unet=UNet(FULL[name]))
    found = Counter((type(m), m.eps) for m in net.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm))
    a, b, c = NORMS[name]
    assert found == {(nn.GroupNorm, 1e-5): a, (nn.GroupNorm, 1e-6): b, (nn.LayerNorm, 1e-5): c}


def test_42_tensors_of_sd1_are_not_the_unets() -> None:
    with torch.device("meta"):
        unet = UNet(FULL["sd1"])
        net = ControlNet(ControlNetOptions(), unet=unet)
    new = net.state_dict().keys() - unet.state_dict().keys()
    assert len(new) == 42
    assert Counter(key.split(".")[0] for key in new) == {"hint": 16, "zero_convs": 24, "zero_mid": 2}


def test_hint_encoder_strides() -> None:
    with torch.device("meta"):
        net = ControlNet(ControlNetOptions(), unet=UNet(FULL["sd1"]))
    convs = [m for m in net.hint.convs if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convs] == [
        (3, 16, 1),
        (16, 16, 1),
        (16, 32, 2),
        (32, 32, 1),
        (32, 96, 2),
        (96, 96, 1),
        (96, 256, 2),
        (256, 320, 1),
    ]

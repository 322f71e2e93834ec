"""Our UNet against diffusers' UNet2DConditionModel with the same random weights, and the facts a tolerance hides."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.control import Control
from ldm.convert import diffusers_unet
from ldm.models.attention import GEGLU, Attention
from ldm.models.blocks import timestep_embedding
from ldm.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TIME_IDS, TIME_ID_DIM, POOLED = 6, 8, 24  # small versions of SDXL's 6, 256, 1280
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
    "one_block_inpainting": UNetConfig(
        in_channels=9, channels=(16, 16), blocks=1, depth=(0, 1), context_dim=12, num_heads=2, groups=4
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
    "sdxl_refiner": UNetConfig(
        channels=(384, 768, 1536, 1536),
        depth=(0, 4, 4, 0),
        mid_depth=4,
        context_dim=1280,
        num_heads=None,
        head_dim=64,
        linear_proj=True,
        vector_dim=2560,
    ),
    "sd1_inpainting": UNetConfig(in_channels=9),
}
SIZES = {
    "sd1": (859_520_964, 686),
    "sd2": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
    "sdxl_refiner": (2_259_526_660, 1220),
    "sd1_inpainting": (859_535_364, 686),
}
# GroupNorm eps 1e-5 (residual blocks, output), GroupNorm eps 1e-6 (transformers), LayerNorm eps 1e-5.
NORMS = {"sd1": (45, 16, 48), "sd2": (45, 16, 48), "sdxl": (35, 11, 210)}


def reference_config(config: UNetConfig) -> dict[str, Any]:
    """The same network in diffusers' words; its `attention_head_dim` is the number of heads."""
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)]
    out: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.channels,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.blocks,
        "transformer_layers_per_block": [d or 1 for d in config.depth[:-1]] + [config.mid_depth],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads(c) for c in config.channels],
        "use_linear_projection": config.linear_proj,
        "norm_num_groups": config.groups,
    }
    if config.vector_dim:
        # 2816 = 1280 + 6 * 256, 2560 = 1280 + 5 * 256
        dim = 256 if config.vector_dim > 2000 else TIME_ID_DIM
        out |= {"addition_embed_type": "text_time", "addition_time_embed_dim": dim}
        out |= {"projection_class_embeddings_input_dim": config.vector_dim}
    return out


def random_weights(model: nn.Module, std: float = 0.1) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=std)
    return model.eval()


def pair(name: str) -> tuple[UNet, nn.Module]:
    config = SMALL[name]
    theirs, ours = random_weights(diffusers.UNet2DConditionModel(**reference_config(config))), UNet(config).eval()
    ours.load_state_dict(diffusers_unet(config).to_ours(theirs.state_dict()))
    return ours, theirs


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Control, dict[str, Any]]:
    """A batch of two, and the same conditioning in both worlds."""
    b, side = 2, 2 ** (len(config.channels) - 1)
    x, t, context = (
        torch.randn(b, config.in_channels, 2 * side, side),
        torch.tensor([10, 981]),
        torch.randn(b, 7, config.context_dim),
    )
    words: dict[str, Any] = {"encoder_hidden_states": context}
    if not config.vector_dim:
        return x, t, Control(context=context), words
    pooled, time_ids = torch.randn(b, POOLED), torch.tensor([[64.0, 48, 0, 3, 64, 64], [32, 32, 1, 0, 16, 64]])
    sizes = timestep_embedding(time_ids.flatten(), TIME_ID_DIM).view(b, -1)
    words["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return x, t, Control(context=context, vector=torch.cat([pooled, sizes], dim=-1)), words


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_prediction_agrees(name: str) -> None:
    ours, theirs = pair(name)
    x, t, control, words = inputs(SMALL[name])
    expected = theirs(x, t, **words).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, control), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_exact(name: str) -> None:
    _, theirs = pair(name)
    original, keys = theirs.state_dict(), diffusers_unet(SMALL[name])
    back = keys.to_theirs(keys.to_ours(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[k], original[k]) for k in original)


@pytest.mark.parametrize("name", FULL)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        unet = UNet(FULL[name])
    total, tensors = SIZES[name]
    assert sum(p.numel() for p in unet.parameters()) == total
    assert len(unet.state_dict()) == tensors


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_tensor_of_the_reference_at_full_size(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(FULL[name]), diffusers.UNet2DConditionModel(**reference_config(FULL[name]))
    renamed = diffusers_unet(FULL[name]).to_theirs(ours.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", NORMS)
def test_norm_census(name: str) -> None:
    """Swapping the two eps moves outputs by about 1e-5 only, so it is counted instead."""
    with torch.device("meta"):
        unet = UNet(FULL[name])
    found = Counter((type(m), m.eps) for m in unet.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm))
    a, b, c = NORMS[name]
    assert found == {(nn.GroupNorm, 1e-5): a, (nn.GroupNorm, 1e-6): b, (nn.LayerNorm, 1e-5): c}
    transformers = [m for n, m in unet.named_modules() if n.endswith("attn.norm")]
    assert len(transformers) == b and {m.eps for m in transformers if isinstance(m, nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_attention_biases_and_heads(name: str) -> None:
    with torch.device("meta"):
        unet = UNet(FULL[name])
    for module in unet.modules():
        if isinstance(module, Attention):
            assert [layer.bias is None for layer in (module.to_q, module.to_k, module.to_v)] == [True] * 3
            assert module.to_out.bias is not None
            width = module.to_q.out_features
            assert module.heads == (8 if name == "sd1" else width // 64)


def test_geglu_gates_with_the_exact_gelu() -> None:
    """The tanh form differs by 6e-5 in a whole UNet's output."""
    ff = GEGLU(4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    value, gate = ff.proj(x).chunk(2, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(ff(x), ff.out(value * gelu), atol=1e-12, rtol=0)


def test_time_embedding_values() -> None:
    got = timestep_embedding(torch.tensor([10]), 320)[0, [0, 1, 2, 160, 161, 162, 319]]
    expected = torch.tensor([-0.83907, -0.99987, -0.87164, -0.54402, -0.01583, 0.49016, 0.00105926])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fresh_unet_predicts_exactly_zero() -> None:
    unet = UNet(SMALL["sd1"])
    x, t, control, _ = inputs(SMALL["sd1"])
    assert torch.equal(unet(x, t, control), torch.zeros_like(x))


def test_zero_initialised_weights_of_sd1() -> None:
    """22 residual blocks, 16 transformers and the output: counted on a narrow network of the same layout."""
    unet = UNet(UNetConfig(channels=(8, 8, 8, 8), context_dim=4, num_heads=1, groups=4))
    zero = [n for n, p in unet.named_parameters() if n.endswith("weight") and not p.any()]
    assert len(zero) == 39

"""The style adapter: published size, forward, weight and null."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.style_adapter import StyleAdapter, StyleAdapterOptions
from ldm import build, generate, registry
from ldm.control import Control
from ldm.convert.tables_coadapter import StyleConfig
from ldm.denoiser import AdapterUse, Denoiser, check_use
from ldm.models.unet import UNet, num_parameters
from ldm.models.vision import OpenCLIPConfig, OpenCLIPTower
from ldm.registry import ConfigError
from ldm.source import Start
from tests.small import SD15, SHALLOW, latents, trained_unet

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
VIT_L = {"name": "open_clip", "width": 1024, "layers": 2, "mlp": 4096, "embed_dim": 768, "activation": "quick_gelu"}


def make(unet: UNet, **options: Any) -> StyleAdapter:
    return StyleAdapter(StyleAdapterOptions(VIT, **{"tokens": 4, "heads": 2, **options}), unet=unet)


def transformer(state: dict[str, Tensor], x: Tensor, heads: int, depth: int = 3) -> Tensor:
    """What style adapters and fusers have in common, in torch's own layers, from the released names: b n d."""

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm(x, "ln_pre")
    for i in range(depth):
        at = f"transformer_layes.{i}"
        attn = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        attn.load_state_dict(
            {n.removeprefix(f"{at}.attn."): v for n, v in state.items() if n.startswith(f"{at}.attn.")}
        )
        y = norm(x, f"{at}.ln_1")
        x = x + attn(y, y, y, need_weights=False)[0]
        h = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{at}.mlp.c_proj")
    return norm(x, "ln_post")


@functools.cache
def setting() -> tuple[UNet, StyleAdapter, Denoiser]:
    torch.manual_seed(0)
    unet = trained_unet()
    adapter = make(unet).requires_grad_(False)
    return unet, adapter, Denoiser(unet, {"a": adapter})


def test_size_of_the_published_adapter() -> None:
    with torch.device("meta"):
        adapter = StyleAdapter(StyleAdapterOptions(VIT_L), unet=UNet(SD15))
        said = adapter.prepare(torch.empty(2, 1, 257, 1024))
    assert num_parameters(adapter) == 38_587_392 and len(adapter.state_dict()) == 42
    assert said.tokens.shape == (2, 8, 768)


@torch.no_grad()
def test_forward_is_that_of_the_released_code() -> None:
    _, adapter, _ = setting()
    features = torch.randn(2, 1, 5, 16)
    theirs = StyleConfig(16, 12, 4).keymap("original").to_theirs(adapter.state_dict())
    x = torch.cat([features[:, 0], theirs["style_embedding"].expand(2, -1, -1)], dim=1)
    wanted = transformer(theirs, x, heads=2)[:, -4:] @ theirs["proj"]
    torch.testing.assert_close(adapter.prepare(features).tokens, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoder_gives_its_last_block_without_layer_norm() -> None:
    config = OpenCLIPConfig(image_size=16, patch=8, width=16, layers=3, heads=2, mlp=32, embed_dim=8)
    tower = OpenCLIPTower(config).eval()
    adapter = StyleAdapter(StyleAdapterOptions({"name": "open_clip"}), unet=trained_unet(), tower=tower)
    seen: list[Tensor] = []
    tower.net.transformer.resblocks[2].register_forward_hook(lambda *a: seen.append(a[2]))
    assert torch.equal(adapter.encode(torch.rand(2, 1, 3, 16, 16))[:, 0], seen[0])
    assert seen[0].shape == (2, 5, 16)


@torch.no_grad()
def test_scale_multiplies_the_tokens_and_zero_is_absent() -> None:
    unet, _, net = setting()
    x_t, t, base = latents()
    ready = net.prepare({"a": torch.randn(2, 1, 5, 16)})
    whole, half, none = (net.control(x_t, t, base, ready, {"a": AdapterUse(scale=s)}).context for s in (1.0, 0.5, 0.0))
    assert whole is not None and half is not None and none is None
    assert torch.equal(half, 0.5 * whole) and torch.equal(whole, ready["a"].tokens)
    silent = base + net.control(x_t, t, base, ready, {"a": AdapterUse(scale=0.0)})
    assert torch.equal(unet(x_t, t, silent), unet(x_t, t, base))


@torch.no_grad()
def test_null_is_the_texts_own_last_tokens_at_any_scale() -> None:
    _, adapter, net = setting()
    x_t, t, base = latents()
    assert base.context is not None
    features = torch.randn(2, 3, 5, 16)
    features[0, 1:] = adapter.null(features)[0, 1:]  # picture 0 has one reference of three
    ready = net.prepare({"a": features})
    context = net.control(x_t, t, base, ready, {"a": AdapterUse(scale=0.5)}).context
    assert context is not None and context.shape[1] == 3 * 4
    own = base.context[0, -4:]
    assert torch.equal(context[0, 4:8], own) and torch.equal(context[0, 8:], own)
    assert torch.equal(context[1], 0.5 * ready["a"].tokens[1])


@torch.no_grad()
def test_branches_of_guidance_are_as_long_and_the_unconditional_one_hears_no_style() -> None:
    unet, _, net = setting()
    x_t, _, base = latents()
    assert base.context is not None
    negative = Control(context=torch.randn_like(base.context))
    images = torch.rand(2, 1, 3, 16, 16)
    pair = generate._Branches(net, Control(context=base.context), negative, 1, Start(x_t))
    pair.prepare({"a": images}, {}, {})
    uncond, cond = pair(x_t, 500.0, True)
    assert negative.context is not None
    t = torch.full((2,), 500.0)
    longer = Control(context=torch.cat([negative.context, negative.context[:, -4:]], dim=1))
    torch.testing.assert_close(uncond, unet(x_t, t, longer), atol=1e-5, rtol=0)
    styled = Control(context=torch.cat([base.context, net.prepare(net.encode({"a": images}))["a"].tokens], dim=1))
    torch.testing.assert_close(cond, unet(x_t, t, styled), atol=1e-5, rtol=0)


def test_scale_is_allowed_but_neither_mask_nor_blocks() -> None:
    _, adapter, net = setting()
    check_use("a", AdapterUse(scale=0.7), adapter, net.unet.spec)
    for use in (AdapterUse(mask="m.png"), AdapterUse(blocks={"mid": 0.5})):
        with pytest.raises(ConfigError, match=r"adapters\.a speaks through .* allowed: any number; mask and blocks"):
            check_use("a", use, adapter, net.unet.spec)


def test_features_or_text_that_do_not_fit_are_refused() -> None:
    _, adapter, net = setting()
    with pytest.raises(ValueError, match=r"image features are \(2, 1, 5, 8\), must be b m n 16"):
        adapter.prepare(torch.randn(2, 1, 5, 8))
    x_t, t, _ = latents()
    ready = net.prepare({"a": torch.randn(2, 1, 5, 16)})
    with pytest.raises(ValueError, match="the text has 3 tokens; a style adapter of 4 needs at least as many"):
        net.control(x_t, t, Control(context=torch.randn(2, 3, 12)), ready)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "t2i_style.tokens is 0, must be at least 1"),
        ({"heads": 3}, "t2i_style.heads is 3, must divide the encoder's width 16"),
        ({"encoder": {}}, "t2i_style.encoder is not set; name an image tower"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        registry.build("adapter", {"name": "t2i_style", "encoder": VIT, **options}, unet=UNet(SHALLOW))
    assert "\n" not in str(caught.value)


def test_its_hint_is_an_image_prompt_of_the_encoders_size() -> None:
    assert build.reference_size("a", {"name": "t2i_style", "encoder": VIT}) == 16

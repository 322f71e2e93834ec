import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.ip_adapter import IPAdapter, IPAdapterOptions, SimpleIPAdapter
from adapters.layers import FrozenEncoder
from ldm import build, generate, registry
from ldm.config import from_mapping
from ldm.control import Control
from ldm.convert.ip_adapter import numbers, published
from ldm.convert.keymap import KeyMap
from ldm.denoiser import AdapterUse, Denoiser
from ldm.models.clip import ViT, ViTConfig
from ldm.models.unet import UNet, UNetConfig, num_parameters
from ldm.models.vision import MEAN, STD, OpenCLIPConfig, OpenCLIPTower
from ldm.registry import ConfigError
from ldm.source import Start
from ldm.training import checkpoint
from tests.small import SD1, SD15, SDXL, SHALLOW, latents, trained_unet

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
VIT_H, BIG_G = {"name": "open_clip"}, {"name": "open_clip", "width": 1664, "layers": 48, "mlp": 8192, "embed_dim": 1280}
SD2 = UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_proj=True)
KV = {"sd15": 19_169_280, "sd2": 25_559_040, "sdxl": 340_787_200}


@functools.cache
def on_meta(name: str) -> UNet:
    with torch.device("meta"):
        return UNet({"sd15": SD15, "sd2": SD2, "sdxl": SDXL}[name])


def make(unet: UNet, **options: Any) -> IPAdapter:
    return IPAdapter(IPAdapterOptions(VIT, **options), unet=unet)


def heard(unet: UNet, adapter: Any, x_t: Tensor, t: Tensor, base: Control, features: Tensor) -> Tensor:
    return unet(x_t, t, base + adapter.control(x_t, t, base, adapter.prepare(features)))


@pytest.mark.parametrize(
    ("config", "options", "encoder", "total", "projection"),
    [
        ("sd15", {}, VIT_H, 22_319_616, 3_150_336),
        ("sd15", {"variant": "plus"}, VIT_H, 49_087_488, 29_918_208),
        ("sd15", {"variant": "full"}, VIT_H, 21_794_304, 2_625_024),
        ("sd2", {}, VIT_H, 29_759_488, 4_200_448),
        ("sdxl", {}, BIG_G, 351_285_248, 10_498_048),
        ("sdxl", {}, VIT_H, 349_188_096, 8_400_896),
        ("sdxl", {"variant": "plus", "width": 1280}, VIT_H, 423_748_864, 82_961_664),
    ],
)
def test_sizes_of_the_published_adapters(
    config: str, options: dict[str, Any], encoder: dict[str, Any], total: int, projection: int
) -> None:
    short = {**encoder, "layers": 2}  # the adapter's size does not depend on the encoder's depth
    with torch.device("meta"):
        adapter = IPAdapter(IPAdapterOptions(short, **options), unet=on_meta(config))
    assert num_parameters(adapter) == total == KV[config] + projection
    assert num_parameters(adapter.image) == projection


@pytest.mark.parametrize(("encoder", "size", "tensors"), [(VIT_H, 632_076_800, 520), (BIG_G, 1_844_907_264, None)])
def test_sizes_of_the_published_encoders(encoder: dict[str, Any], size: int, tensors: int | None) -> None:
    from ldm.convert.ip_adapter import transformers_vision

    with torch.device("meta"):
        tower = registry.build("image", encoder)
    assert num_parameters(tower) == size
    theirs = [name for pair in transformers_vision(tower.config).pairs for name in pair.theirs]
    assert {pair.ours for pair in transformers_vision(tower.config).pairs} == set(tower.state_dict())
    assert tensors is None or len(theirs) == tensors


def test_encoder_is_neither_in_the_file_nor_in_the_parameters_nor_kept_twice() -> None:
    tower = ViT(ViTConfig(16, 8, 16, 2, 2))
    unet = trained_unet()
    one, two = (IPAdapter(IPAdapterOptions(VIT), unet=unet, tower=tower) for _ in range(2))
    assert one.image.encoder.tower is two.image.encoder.tower is tower
    assert {key.split(".")[0] for key in one.state_dict()} == {"image", "to_k", "to_v"}
    assert not [key for key in one.state_dict() if "encoder" in key]
    assert ViT not in {type(module) for module in one.modules()}
    one.to(torch.float64)
    assert next(tower.parameters()).dtype == torch.float64  # it goes where its adapter goes


def test_equal_encoders_of_a_config_are_one() -> None:
    node = {"name": "ip_adapter", "encoder": VIT}
    cfg = from_mapping(
        {
            "model": {"unet": _unet_node()},
            "adapters": {"a": node, "b": node, "c": {**node, "encoder": {**VIT, "layers": 3}}},
        }
    )
    net = build.denoiser(cfg)
    towers = [net.adapter(name).image.encoder.tower for name in "abc"]  # pyright: ignore[reportAttributeAccessIssue]
    assert towers[0] is towers[1] and towers[0] is not towers[2]
    assert not any(p.requires_grad for p in towers[0].parameters()) and not towers[0].training


def _unet_node() -> dict[str, Any]:
    return {"name": "unet"} | {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(SHALLOW).items()
    }


def test_copied_keys_and_values_double_what_the_text_says() -> None:
    unet = trained_unet(SD1)
    adapter = make(unet)
    attn = unet.encoder.levels[0].blocks[0].attn.blocks[0].attn2  # pyright: ignore
    assert torch.equal(adapter.to_k[0].weight, attn.to_k.weight)  # pyright: ignore[reportArgumentType]
    assert adapter.to_k[0].weight.data_ptr() != attn.to_k.weight.data_ptr()  # pyright: ignore[reportCallIssue]
    tokens, x = torch.randn(2, 5, 12), torch.randn(2, 7, 8)
    extra = [(adapter.to_k[0](tokens), adapter.to_v[0](tokens), 1.0)]
    bias = attn.to_out.bias
    torch.testing.assert_close(attn(x, tokens, extra) - bias, 2 * (attn(x, tokens) - bias), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "plus", "full"])
def test_two_equal_references_are_one(variant: str) -> None:
    unet = trained_unet()
    adapter = make(unet, variant=variant, width=64 if variant == "plus" else None)
    x_t, t, base = latents()
    one = torch.randn(2, 1, 1 if variant == "base" else 5, 16)
    both = torch.cat([one, one], dim=1)
    single = heard(unet, adapter, x_t, t, base, one)
    torch.testing.assert_close(heard(unet, adapter, x_t, t, base, both), single, atol=1e-5, rtol=0)
    other = torch.cat([one, torch.randn_like(one)], dim=1)
    assert (heard(unet, adapter, x_t, t, base, other) - single).abs().max() > 1e-5
    swapped = heard(unet, adapter, x_t, t, base, other.flip(1))
    torch.testing.assert_close(swapped, heard(unet, adapter, x_t, t, base, other), atol=1e-5, rtol=0)


@torch.no_grad()
def test_simple_adapter_reads_the_tokens_with_the_texts_own_keys_and_values() -> None:
    unet = trained_unet()
    adapter = SimpleIPAdapter(IPAdapterOptions(VIT), unet=unet)
    assert {key.split(".")[0] for key in adapter.state_dict()} == {"image"}
    x_t, t, base = latents()
    assert base.context is not None
    features = torch.randn(2, 1, 1, 16)
    joined = Control(context=torch.cat([base.context, adapter.image(features)], dim=1))
    assert torch.equal(heard(unet, adapter, x_t, t, base, features), unet(x_t, t, joined))


@torch.no_grad()
def test_null_image_of_base_is_a_zero_vector_that_still_says_something() -> None:
    unet = trained_unet()
    adapter = make(unet)
    x_t, t, base = latents()
    null = adapter.null(torch.randn(2, 3, 1, 16))
    assert null.shape == (2, 3, 1, 16) and not null.any()
    assert adapter.image(null).abs().mean() > 0.1  # bias and LayerNorm
    assert not torch.equal(heard(unet, adapter, x_t, t, base, null), unet(x_t, t, base))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plus", "full"])
def test_null_image_of_plus_and_full_is_the_encoded_zero_image_made_once(variant: str) -> None:
    tower = OpenCLIPTower(
        OpenCLIPConfig(image_size=16, patch=8, width=16, layers=2, heads=2, mlp=32, embed_dim=8)
    ).eval()
    options = IPAdapterOptions({"name": "open_clip"}, variant=variant, width=64 if variant == "plus" else None)
    adapter = IPAdapter(options, unet=trained_unet(), tower=tower)
    calls: list[Tensor] = []
    tower.net.conv1.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    features = adapter.encode(torch.rand(2, 3, 3, 16, 16))
    assert features.shape == (2, 3, 5, 16)
    nulls = [adapter.null(features) for _ in range(3)]
    assert len(calls) == 2  # the references, and once the zero image
    assert calls[1].abs().max() < 1e-6  # zero behind the normalisation: a mean colour, not black
    assert all(torch.equal(null, nulls[0]) for null in nulls) and nulls[0].any()
    assert torch.equal(nulls[0][0, 0], nulls[0][1, 2])


@torch.no_grad()
def test_published_encoder_normalises_as_clip_and_leaves_length_alone() -> None:
    tower = OpenCLIPTower(
        OpenCLIPConfig(image_size=16, patch=8, width=16, layers=3, heads=2, mlp=32, embed_dim=8)
    ).eval()
    image = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(tower(2 * image - 1), tower.net((image - mean) / std), atol=1e-6, rtol=0)
    assert (tower(2 * image - 1).norm(dim=-1) - 1).abs().max() > 1e-3
    seen: list[Tensor] = []
    tower.net.transformer.resblocks[1].register_forward_hook(lambda *a: seen.append(a[2]))
    assert torch.equal(tower.tokens(2 * image - 1), seen[0])  # behind 2 of 3 blocks, without LayerNorm


@torch.no_grad()
def test_references_of_any_size_are_brought_to_the_encoders() -> None:
    encoder = FrozenEncoder(ViT(ViTConfig(16, 8, 16, 2, 2)).eval(), pooled=True)
    image = torch.rand(1, 2, 3, 32, 32)
    small = nn.functional.interpolate(image[0], size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)[None]
    torch.testing.assert_close(encoder(image), encoder(small), atol=1e-6, rtol=0)
    assert encoder(torch.rand(1, 1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 4, 16, 16), (2, 1, 1, 16, 16)])
def test_references_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"references are \(.*\), must be b m 3 h w"):
        make(trained_unet()).encode(torch.rand(shape))


def test_features_of_another_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image features are \(2, 1, 1, 8\), must be b m n 16"):
        make(trained_unet()).prepare(torch.randn(2, 1, 1, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "big"}, "variant is 'big'; allowed: base, plus, full"),
        ({"init": "zero"}, "init is 'zero'; allowed: copy, random"),
        ({"tokens": 0}, "tokens is 0, must be at least 1"),
        ({"variant": "full", "tokens": 3}, "one per token of the encoder"),
        ({"variant": "plus", "width": 30}, "width 30 is not a multiple of head_dim 64"),
        ({"encoder": {}}, "encoder is not set; name an image tower"),
        ({"encoder": {"name": "vitt"}}, "image.name is 'vitt'; registered: dino, open_clip, swin, vit"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        registry.build("adapter", {"name": "ip_adapter", "encoder": VIT, **options}, unet=UNet(SHALLOW))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_block_weights_leave_the_named_attention_alone() -> None:
    unet = trained_unet(SD1)
    adapter = make(unet)
    x_t, t, base = latents(SD1, multiple=1)
    net = Denoiser(unet, {"a": adapter})
    ready = net.prepare({"a": torch.randn(2, 1, 1, 16)})

    def drawn(blocks: dict[str, float] | None, scale: float = 1.0) -> Tensor:
        return unet(x_t, t, base + net.control(x_t, t, base, ready, {"a": AdapterUse(blocks=blocks, scale=scale)}))

    assert torch.equal(drawn({"down": 0, "mid": 0, "up": 0}), unet(x_t, t, base))
    assert torch.equal(drawn({}), drawn(None))
    torch.testing.assert_close(drawn({"down": 0.5, "mid": 0.5, "up": 0.5}), drawn(None, 0.5), atol=1e-6, rtol=0)
    said = net.control(x_t, t, base, ready, {"a": AdapterUse(blocks={"down": 0, "mid": 0, "up": 0, "up.1.2": 1})})
    on = [layer.name for layer, v in zip(unet.spec.cross_attn, said.attn[0].v, strict=True) if v.any()]
    assert on == ["up.1.2"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [({"upp": 1}, "blocks has 'upp'; this UNet has .*did you mean 'up'"), ({"up": float("nan")}, "blocks.up is nan")],
)
def test_unknown_block_or_weight_is_refused_when_the_config_is_read(blocks: dict[str, float], message: str) -> None:
    node = {"name": "ip_adapter", "encoder": VIT, "blocks": blocks}
    with pytest.raises(ConfigError, match=message):
        build.denoiser(from_mapping({"model": {"unet": _unet_node()}, "adapters": {"a": node}}))


@torch.no_grad()
def test_mask_of_ones_is_no_mask_and_of_zeros_no_adapter() -> None:
    unet = trained_unet()
    adapter = make(unet)
    x_t, t, base = latents()
    said = adapter.prepare(torch.randn(2, 1, 1, 16))
    ones = torch.ones(2, 1, 40, 40)
    assert torch.equal(unet(x_t, t, base + said.masked(ones)), unet(x_t, t, base + said))
    assert torch.equal(unet(x_t, t, base + said.masked(0 * ones)), unet(x_t, t, base))
    left = ones.clone()
    left[..., 20:] = 0
    right = said.masked(1 - left)
    halves = unet(x_t, t, base + said.masked(left) + right)
    torch.testing.assert_close(halves, unet(x_t, t, base + said), atol=1e-5, rtol=0)
    assert not torch.equal(unet(x_t, t, base + right), unet(x_t, t, base + said))


@torch.no_grad()
def test_everything_but_the_unet_runs_once_per_image() -> None:
    unet = trained_unet()
    adapter = make(unet)
    counts = dict.fromkeys(("tower", "k", "v", "proj"), 0)
    modules = {
        "tower": adapter.image.encoder.tower,
        "k": adapter.to_k[0],
        "v": adapter.to_v[1],
        "proj": adapter.image.proj,
    }

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    for name, module in modules.items():
        module.register_forward_hook(count(name))
    x_t, _, base = latents()
    assert base.context is not None
    pair = generate._Branches(
        Denoiser(unet, {"a": adapter}), Control(context=base.context), Control(context=0 * base.context), 5, Start(x_t)
    )
    pair.prepare({"a": torch.rand(2, 1, 3, 16, 16)}, {}, {})
    for step in range(5):
        pair.step = step
        pair(x_t, 500.0, True)
    assert counts == {"tower": 1, "k": 2, "v": 2, "proj": 2}  # the condition and the null image, whatever the steps


@pytest.mark.parametrize("config", ["sd15", "sdxl"])
def test_published_numbers_are_odd_and_run_down_up_mid(config: str) -> None:
    layers = on_meta(config).spec.cross_attn
    found = dict(zip(numbers(layers), layers, strict=True))
    assert sorted(found) == list(range(1, 2 * len(layers), 2))
    if config == "sd15":
        assert found[31].part == "mid" and found[13].name == "up.1.0"
        assert [found[n].inner_dim for n in range(1, 32, 2)] == [
            *(320, 320, 640, 640, 1280, 1280),
            *(1280, 1280, 1280, 640, 640, 640, 320, 320, 320),
            1280,
        ]
    else:
        assert {found[n].part for n in range(121, 140, 2)} == {"mid"}
        assert {found[n].name for n in range(69, 88, 2)} == {"up.0.1"}  # InstantStyle's style block


def test_file_names_are_the_published_ones() -> None:
    unet = UNet(SD1)
    for variant, count in (("base", 36), ("plus", 83), ("full", 38)):
        adapter = make(unet, variant=variant, width=64 if variant == "plus" else None)
        table: KeyMap = published(unet.spec.cross_attn, variant)
        theirs = table.to_theirs(adapter.state_dict())
        assert len(theirs) == count and {k.split(".")[0] for k in theirs} == {"image_proj", "ip_adapter"}
        again = table.to_ours(theirs)
        assert again.keys() == adapter.state_dict().keys()
        assert all(torch.equal(again[k], v) for k, v in adapter.state_dict().items())


def test_weights_of_another_base_are_refused_with_what_differs() -> None:
    adapter = make(UNet(SHALLOW))
    other = make(UNet(dataclasses.replace(SHALLOW, context_dim=20))).state_dict()
    with pytest.raises(ConfigError, match=r"mis-shaped: .*\(.*20.*\) \(expected .*12"):
        checkpoint.load_tensors(adapter, other, "other.safetensors")
    more = make(UNet(SD1)).state_dict()
    with pytest.raises(ConfigError, match="unexpected: to_k"):
        checkpoint.load_tensors(adapter, more, "sd1.safetensors")


def test_layers_in_the_published_order_are_refused() -> None:
    unet = UNet(SD1)
    state = make(unet).state_dict()
    order = sorted(range(16), key=lambda i: numbers(unet.spec.cross_attn)[i])
    swapped = {k: v for k, v in state.items() if not k.startswith("to_")}
    swapped |= {f"to_{x}.{i}.weight": state[f"to_{x}.{j}.weight"] for x in "kv" for i, j in enumerate(order)}
    with pytest.raises(ConfigError, match=r"mis-shaped: to_k.*expected"):
        checkpoint.load_tensors(make(unet), swapped, "swapped.safetensors")


@torch.no_grad()
@pytest.mark.parametrize(("variant", "tokens"), [("base", 1), ("full", 5)])
def test_no_image_may_be_zeros_or_the_features_of_a_black_picture(variant: str, tokens: int) -> None:
    unet = trained_unet()
    features = torch.randn(2, 1, tokens, 16)
    zeros, black = (make(unet, variant=variant, no_image=word).null(features) for word in ("zeros", "black"))
    assert not zeros.any()
    assert black.any() and black.shape == features.shape
    with pytest.raises(ConfigError, match="no_image is 'white'; allowed: None, zeros, black"):
        make(unet, no_image="white")

import math
from typing import Any

import pytest
import torch

import ldm.models  # noqa: F401  (registers)
from ldm.models.clip import CLIP, CLIPConfig, ViT, ViTConfig
from ldm.registry import ConfigError, build

TEXT = {"width": 16, "layers": 2, "heads": 2, "merges": 100, "context_length": 12}
VIT = {"name": "vit", "image_size": 16, "patch": 4, "width": 16, "layers": 3, "heads": 2}
SWIN = {"name": "swin", "image_size": 16, "width": 8, "depths": [2, 2], "heads": [1, 2], "window": 2}
EMOJI_TEXT = {"width": 192, "layers": 4, "heads": 3, "merges": 7678, "context_length": 32}


def tiny(image: dict[str, Any]) -> CLIP:
    return build("clip", {"name": "clip", "text": TEXT, "image": image, "embed_dim": 8})


@pytest.mark.parametrize("image", [VIT, SWIN], ids=["vit", "swin"])
def test_embeddings_have_unit_length_and_every_parameter_a_gradient(image: dict[str, Any]) -> None:
    clip = tiny(image)
    x, tokens = torch.rand(3, 3, 16, 16) * 2 - 1, clip.text.tokenizer(["a cat", "a dog", ""])
    a, b, scale = clip(x, tokens.ids)
    assert a.shape == b.shape == (3, 8)
    torch.testing.assert_close(torch.stack([a, b]).norm(dim=-1), torch.ones(2, 3))
    assert scale.item() == pytest.approx(1 / 0.07)
    (scale * a @ b.T).square().sum().backward()
    assert [name for name, p in clip.named_parameters() if p.grad is None] == []


def test_logit_scale_stops_at_100() -> None:
    clip = tiny(VIT)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(500))
    assert clip(torch.zeros(1, 3, 16, 16), clip.text.tokenizer(["a"]).ids)[2] == 100


def test_state_dict_names() -> None:
    tops = {key.split(".")[0] for key in tiny(VIT).state_dict()}
    assert tops == {"text", "image", "text_proj", "image_proj", "logit_scale"}


def test_text_embedding_ignores_the_layer_given_to_cross_attention() -> None:
    last, other = (
        tiny(VIT),
        build("clip", {"name": "clip", "text": {**TEXT, "layer": "penultimate"}, "image": VIT, "embed_dim": 8}),
    )
    other.load_state_dict(last.state_dict())
    ids = last.text.tokenizer(["a cat"]).ids
    torch.testing.assert_close(other.encode_text(ids), last.encode_text(ids))
    assert not torch.allclose(other.text(ids), last.text(ids))


def test_vit_tokens_are_the_penultimate_block_with_the_class_token() -> None:
    vit, x = ViT(ViTConfig(image_size=16, patch=4, width=16, layers=3, heads=2)), torch.randn(2, 3, 16, 16)
    tokens = vit.tokens(x)
    assert tokens.shape == (2, 17, 16)
    last = vit.net.transformer.resblocks[2](tokens)
    torch.testing.assert_close(vit(x), vit.net.ln_post(last)[:, 0])


def test_vit_has_no_projection_and_keeps_every_block() -> None:
    vit = ViT(ViTConfig(image_size=16, patch=4, width=16, layers=3, heads=2))
    assert vit.net.proj is None and len(vit.net.transformer.resblocks) == 3


def test_emoji_towers_fit_the_budget() -> None:
    with torch.device("meta"):
        vit = build("clip", {"name": "clip", "text": EMOJI_TEXT})
        swin = build("clip", {"name": "clip", "text": EMOJI_TEXT, "image": {"name": "swin"}})
    assert vit.text.config.vocab_size == 8192
    for clip in (vit, swin):
        assert 2 * sum(p.numel() for p in clip.parameters()) < 13e6  # bytes in half precision


def test_wrong_image_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vit: image is 8x16 \(h w\), must be 16 on both sides; resize it"):
        tiny(VIT).encode_image(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match=r"swin: image is 3x16 \(h w\), sides must be at least 4"):
        tiny(SWIN).encode_image(torch.zeros(1, 3, 3, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": {"name": "resnet"}}, "image.name is 'resnet'; registered: dino, open_clip, swin, vit"),
        ({"image": {"patc": 8}}, "did you mean 'patch'"),
        ({"image": {"image_size": 60}}, "vit.image_size is 60, must be a multiple of vit.patch=8"),
        ({"image": {"width": 100}}, "vit.width is 100, must be a multiple of vit.heads=3"),
        ({"image": {"name": "swin", "heads": [2, 4]}}, "give one number per stage"),
        ({"image": {"name": "swin", "heads": [2, 4, 7]}}, r"swin.heads has \[7\]"),
        ({"text": {"widht": 3}}, "did you mean 'width'"),
        ({"embed_dim": 0}, "clip.embed_dim is 0, must be at least 1"),
    ],
)
def test_bad_config_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("clip", {"name": "clip", "text": TEXT, **options})


def test_default_config_is_a_vit() -> None:
    with torch.device("meta"):
        assert isinstance(CLIP(CLIPConfig(text=TEXT)).image, ViT)

from typing import Any

import pytest
import torch

import ldm.models  # noqa: F401  (registers)
from ldm.models.sdxl_text import SDXLText
from ldm.registry import ConfigError, build

TOWER: dict[str, Any] = {"width": 8, "layers": 2, "heads": 2, "merges": 50, "context_length": 8}


def tiny(**options: Any) -> SDXLText:
    return build("text", {"name": "sdxl", "clip": TOWER, "open_clip": {**TOWER, "projection": 6}, **options}).eval()


def test_base_has_the_published_parameters() -> None:
    with torch.device("meta"):
        text: SDXLText = build("text", {"name": "sdxl"})
    first, second = text.towers
    assert sum(p.numel() for p in first.parameters()) == 123_060_480
    assert sum(p.numel() for p in second.parameters()) == 694_659_840
    assert (first.config.pad, second.config.pad) == ("eos", "zero")
    assert (first.config.activation, second.config.activation) == ("quick_gelu", "gelu")
    assert all(t.config.layer == "penultimate" and not t.config.final_norm for t in text.towers)
    assert text.vector(torch.zeros(1, 1280), (1024, 1024)).shape == (1, 2816)


def test_state_dict_is_both_towers_under_their_own_names() -> None:
    text = tiny()
    first, second = text.towers
    names = {f"clip.{k}" for k in first.state_dict()} | {f"open_clip.{k}" for k in second.state_dict()}
    assert text.state_dict().keys() == names and "open_clip.text_proj" in names


def test_the_refiner_is_the_second_tower_with_a_score() -> None:
    text = tiny(clip=None, aesthetic=6.0)
    assert len(text.towers) == 1
    pooled = torch.zeros(2, 6)
    vector = text.vector(pooled, (64, 32))
    assert vector.shape == (2, 6 + 5 * 256)
    assert torch.equal(vector[:, : 6 + 4 * 256], tiny().vector(pooled, (64, 32))[:, : 6 + 4 * 256])
    with torch.device("meta"):
        full: SDXLText = build("text", {"name": "sdxl", "clip": None, "aesthetic": 6.0})
    assert full.vector(torch.zeros(1, 1280), (8, 8)).shape == (1, 2560)


@pytest.mark.parametrize("options", [{}, {"clip": None, "aesthetic": 6.0}])
def test_where_a_picture_was_cut_from_takes_the_place_of_drawn_whole(options: dict[str, Any]) -> None:
    text, pooled = tiny(**options), torch.randn(2, 6)
    told = text.placed(text.vector(pooled, (64, 32)), torch.tensor([[64, 32, 0, 0], [80, 90, 3, 5]]))
    assert torch.equal(told[0], text.vector(pooled, (64, 32))[0])  # whole and uncropped: nothing new
    sizes = told[1, 6:].view(-1, 256)
    expected = text.vector(pooled, (80, 90))[1, 6:].view(-1, 256)[:2]  # original height and width come first
    assert torch.equal(sizes[:2], expected)
    assert torch.equal(sizes[2:4], text.vector(pooled, (3, 5))[1, 6:].view(-1, 256)[:2])
    assert torch.equal(sizes[4:], text.vector(pooled, (64, 32))[1, 6:].view(-1, 256)[4:])  # target, or score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"open_clip": {**TOWER, "projection": None}}, "text.open_clip.projection is null, must be a width"),
        (
            {"clip": {**TOWER, "merges": 60}},
            "text.clip has context_length=8, merges=60; must be those of text.open_clip",
        ),
        ({"clip": {**TOWER, "widht": 8}}, r"text.clip: unknown keys \['widht'\].*did you mean 'width'"),
        ({"clip": 3}, "text 'sdxl': .*mapping"),
    ],
)
def test_bad_config_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)

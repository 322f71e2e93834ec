"""Swin: one function of images of every size, equal to transformers' where that is one."""

import math
from typing import Any

import pytest
import torch

from ldm.models.swin import Swin, SwinConfig


def tiny(**words: Any) -> Swin:
    torch.manual_seed(0)
    return Swin(SwinConfig(**{"width": 8, "depths": (2, 2), "heads": (1, 2), "window": 4} | words)).eval()


def test_stages_at_other_sizes() -> None:
    swin = tiny(image_size=16, depths=(2, 2, 1), heads=(1, 2, 4), window=2)
    for size, expected in (((16, 16), (4, 4)), ((40, 24), (10, 6)), ((37, 22), (10, 6))):
        x = torch.randn(2, 3, *size)
        stages = swin.stages(x)
        shapes = [(2, 8 * 2**k, expected[0] / 2**k, expected[1] / 2**k) for k in range(3)]
        assert [tuple(s.shape) for s in stages] == [(b, c, math.ceil(h), math.ceil(w)) for b, c, h, w in shapes]
        tokens = swin.tokens(x)
        torch.testing.assert_close(tokens, stages[-1].flatten(2).mT)
        torch.testing.assert_close(swin(x), tokens.mean(dim=1))


def test_windows_do_not_shrink_to_the_map() -> None:
    """So the same weights are the same function at every image size."""
    small, large = (tiny(image_size=side) for side in (16, 64))
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(small(x), large(x))


def test_images_of_a_batch_do_not_meet() -> None:
    swin, x = tiny(pyramid=True), torch.randn(3, 3, 37, 22)
    for together, alone in zip(swin.stages(x), swin.stages(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)


def test_pixels_in_the_unit_range() -> None:
    signed, unit = tiny(), tiny(unit_range=True)
    unit.load_state_dict(signed.state_dict())
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(unit(x * 2 - 1), signed(x))
    assert (signed.zero_colour, unit.zero_colour) == ((0.0, 0.0, 0.0), (-1.0, -1.0, -1.0))


@pytest.mark.parametrize("size", [(96, 96), (64, 132), (89, 50), (24, 24)])
def test_maps_equal_transformers(size: tuple[int, int]) -> None:
    """transformers pads, then shifts; it drops the shift where a map fits one window, which is undone here."""
    transformers = pytest.importorskip("transformers")
    ours = tiny(image_size=32, depths=(2, 2, 2), heads=(1, 2, 4), pyramid=True)
    words: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4, "hidden_act": "gelu"}
    config = transformers.SwinConfig(
        **words, depths=[2, 2, 2], num_heads=[1, 2, 4], drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3"]
    )
    theirs = transformers.SwinBackbone(config).eval()
    for name, layer in theirs.named_modules():
        if type(layer).__name__ == "SwinLayer":
            layer.shift_size = 2 * (int(name.rpartition(".")[2]) % 2)
            layer.set_shift_and_window_size = lambda size: None
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    _copy(theirs, ours)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(x).feature_maps
        for got, want in zip(ours.stages(x), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def _copy(theirs: Any, ours: Swin) -> None:
    """Their weights into ours, written out by hand: an independent reading of both layouts."""
    state, new = theirs.state_dict(), {}
    first = "swin.embeddings.patch_embeddings.projection"
    for part in ("weight", "bias"):
        new[f"net.patch_embed.proj.{part}"] = state[f"{first}.{part}"]
        new[f"net.patch_embed.norm.{part}"] = state[f"swin.embeddings.norm.{part}"]
        for k in range(3):
            new[f"norms.{k}.{part}"] = state[f"hidden_states_norms.stage{k + 1}.{part}"]
            for j in range(2):
                a, b = f"swin.encoder.layers.{k}.blocks.{j}", f"net.layers.{k}.blocks.{j}"
                names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "mlp.fc1"}
                names |= {"mlp.fc2": "mlp.fc2", "attn.proj": "attention.o_proj"}
                new |= {f"{b}.{ours_}.{part}": state[f"{a}.{their}.{part}"] for ours_, their in names.items()}
                qkv = [state[f"{a}.attention.{x}_proj.{part}"] for x in "qkv"]
                new[f"{b}.attn.qkv.{part}"] = torch.cat(qkv)
                table = "relative_position_bias_table"
                new[f"{b}.attn.{table}"] = state[f"{a}.attention.relative_position_bias.{table}"]
        for k in range(2):
            new[f"net.layers.{k + 1}.downsample.norm.{part}"] = state[f"swin.encoder.layers.{k}.downsample.norm.{part}"]
    for k in range(2):
        name = "downsample.reduction.weight"
        new[f"net.layers.{k + 1}.{name}"] = state[f"swin.encoder.layers.{k}.{name}"]
    ours.load_state_dict(new)

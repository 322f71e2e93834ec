"""Released SeeCoder files: two networks in one, told apart, read in, named as weights and written back byte by byte."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapters  # noqa: F401  (registers them)
from ldm import config as configs
from ldm import registry
from ldm.convert import detect, model, slots
from ldm.convert.tables_seecoder import OUTER, SeeCoderConfig, swin_buffers, swin_map
from ldm.models.swin import Swin, SwinConfig
from ldm.models.unet import UNet
from ldm.registry import ConfigError
from ldm.training import checkpoint
from scripts import convert

ROOT = Path(__file__).resolve().parents[3]
LARGE = SwinConfig(
    image_size=384,
    width=192,
    depths=(2, 2, 18, 2),
    heads=(6, 12, 24, 48),
    window=12,
    pyramid=True,
    unit_range=True,
)
SMALL = SwinConfig(
    image_size=64, width=8, depths=(2, 1, 1, 1), heads=(1, 2, 4, 4), window=2, pyramid=True, unit_range=True
)
CODER = SeeCoderConfig(
    channels=(16, 32, 64), dim=16, tokens=7, layers=2, hidden=12, decoder_layers=1, decoder_hidden=10
)
position = pytest.mark.parametrize("pa", [False, True])


@functools.cache
def networks(pa: bool) -> tuple[Swin, nn.Module, dict[str, Tensor]]:
    """A backbone, an adapter, and a released file of both."""
    torch.manual_seed(1)
    config = dataclasses.replace(CODER, position=pa)
    backbone, adapter = Swin(SMALL), registry.build("adapter", config.node, unet=UNet(config.unet))
    theirs = swin_map(SMALL, "original").to_theirs(backbone.state_dict()) | swin_buffers(SMALL)
    theirs = {f"imencoder.{k}": v for k, v in theirs.items()}
    theirs |= config.keymap("original").to_theirs(adapter.state_dict())
    return backbone, adapter, {OUTER + k: v.contiguous().clone() for k, v in theirs.items()}


@position
def test_file_is_told_imported_and_exported_byte_by_byte(
    pa: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    save_file(networks(pa)[2], theirs, metadata={"format": "pt"})
    convert.main(["inspect", str(theirs)])
    said = capsys.readouterr().out
    assert "layout: seecoder" in said and said.count("    complete") == 2
    assert f"SeeCoder{'-PA' if pa else ''} (7 tokens of 16, features (16, 32, 64))" in said
    assert "swin: Swin (8 wide, blocks (2, 1, 1, 1), window 2)" in said
    assert not any(word in said for word in ("unknown", "missing", "not in this file"))
    convert.main(["import", str(theirs), "--out", str(tmp_path / "in")])
    assert {path.stem for path in (tmp_path / "in").iterdir()} == {"swin", "seecoder"}
    convert.main(["export", str(tmp_path / "in"), "--layout", "seecoder", "--out", str(back)])
    assert back.read_bytes() == theirs.read_bytes()


@position
@pytest.mark.parametrize("prefix", [OUTER, "", "model.ctx.image.", "module."])
def test_one_file_fills_both_slots_whatever_stands_before_its_names(pa: bool, prefix: str, tmp_path: Path) -> None:
    backbone, adapter, theirs = networks(pa)
    save_file(
        {prefix + k.removeprefix(OUTER): v.half() if v.is_floating_point() else v for k, v in theirs.items()},
        tmp_path / "x.safetensors",
    )
    config = dataclasses.replace(CODER, position=pa)
    swin = {"name": "swin", **dataclasses.asdict(SMALL)}
    for kind, node, source in (("image", swin, backbone), ("adapter", config.node, adapter)):
        target: nn.Module = registry.build(kind, node, **({"unet": UNet(config.unet)} if kind == "adapter" else {}))
        checkpoint.load_weights(target, tmp_path / "x.safetensors", parts=slots.parts(kind, node))
        assert all(torch.equal(v, source.state_dict()[k].half().float()) for k, v in target.state_dict().items())


def test_relative_positions_are_those_of_timm_and_what_the_file_says_of_them_is_not_read(tmp_path: Path) -> None:
    from timm.models.swin_transformer import get_relative_position_index

    made = swin_buffers(dataclasses.replace(SMALL, window=5))
    assert {name.partition(".attn.")[2] for name in made} == {"relative_position_index"} and len(made) == 5
    for index in made.values():
        assert index.dtype == torch.int64 and torch.equal(index, get_relative_position_index(5, 5))
    backbone, _, theirs = networks(False)
    without = {k: v for k, v in theirs.items() if "relative_position_index" not in k}
    wrong = {k: v * 0 if v.dtype == torch.int64 else v for k, v in theirs.items()}
    for state in (without, wrong):
        save_file(state, tmp_path / "a.safetensors")
        read = model.read([tmp_path / "a.safetensors"])
        assert read.extras == {}
        assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in read.parts["swin"][1].items())
        (tmp_path / "b.safetensors").unlink(missing_ok=True)
        model.export([tmp_path / "a.safetensors"], "seecoder", tmp_path / "b.safetensors")
        again = load_file(tmp_path / "b.safetensors")
        assert again.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in again.items())


@pytest.mark.parametrize(("pa", "tensors", "size"), [(False, 616, 294_114_996), (True, 622, 295_358_388)])
def test_released_networks_have_their_sizes_and_names(pa: bool, tensors: int, size: int) -> None:
    coder = SeeCoderConfig(position=pa)
    shapes = {"swin": detect.shapes(LARGE), "seecoder": detect.shapes(coder)}
    sizes = {part: sum(shape.numel() for shape in found.values()) for part, found in shapes.items()}
    assert sizes["swin"] == 195_201_204 and sum(sizes.values()) == size
    parts = {"image_decoder.": 27_783_168, "query_transformer.": size - 195_201_204 - 27_783_168}
    for part, count in parts.items():
        assert sum(v.numel() for k, v in shapes["seecoder"].items() if k.startswith(part)) == count
    blank = {part: {k: torch.empty(v, device="meta") for k, v in found.items()} for part, found in shapes.items()}
    theirs = {f"imencoder.{k}": v for k, v in swin_map(LARGE, "original").to_theirs(blank["swin"]).items()}
    theirs |= {f"imencoder.{k}": v for k, v in swin_buffers(LARGE).items()}
    theirs |= coder.keymap("original").to_theirs(blank["seecoder"])
    assert len(theirs) == tensors
    counts = {mark: sum(k.startswith(mark) for k in theirs) for mark in ("imencoder.", "imdecoder.", "qtransformer.")}
    assert counts == {"imencoder.": 357, "imdecoder.": 94, "qtransformer.": 165 + 6 * pa}
    for name, shape in NAMES.items():
        assert tuple(theirs[name].shape) == shape, name
    assert ("qtransformer.pe_layer.mlp.0.weight" in theirs) == pa
    mlp = [tuple(theirs[f"qtransformer.pe_layer.mlp.{n}.weight"].shape) for n in (0, 2, 4) if pa]
    assert mlp == [(768, 80), (768, 768), (768, 768)][: 3 * pa]


NAMES = {  # some of each sort, as the released code has them
    "imencoder.patch_embed.proj.weight": (192, 3, 4, 4),
    "imencoder.patch_embed.norm.bias": (192,),
    "imencoder.layers.2.blocks.17.norm1.weight": (768,),
    "imencoder.layers.0.blocks.1.attn.relative_position_bias_table": (529, 6),
    "imencoder.layers.3.blocks.1.attn.relative_position_index": (144, 144),
    "imencoder.layers.3.blocks.0.attn.qkv.weight": (4608, 1536),
    "imencoder.layers.1.blocks.0.attn.proj.bias": (384,),
    "imencoder.layers.0.blocks.0.mlp.fc1.weight": (768, 192),
    "imencoder.layers.0.downsample.norm.weight": (768,),
    "imencoder.layers.2.downsample.reduction.weight": (1536, 3072),
    "imencoder.norm3.weight": (1536,),
    "imdecoder.level_embed": (3, 768),
    "imdecoder.inproj_layers.res3.0.weight": (768, 384, 1, 1),
    "imdecoder.inproj_layers.res5.0.bias": (768,),
    "imdecoder.inproj_layers.res4.1.weight": (768,),
    "imdecoder.transformer.layers.5.self_attn.in_proj_weight": (2304, 768),
    "imdecoder.transformer.layers.0.self_attn.out_proj.bias": (768,),
    "imdecoder.transformer.layers.0.linear1.weight": (1024, 768),
    "imdecoder.transformer.layers.3.norm2.bias": (768,),
    "imdecoder.lateral_layers.res5.weight": (768, 1536, 1, 1),
    "imdecoder.lateral_layers.res3.norm.bias": (768,),
    "qtransformer.init_query.weight": (148, 768),
    "qtransformer.query_pos_embedding.weight": (148, 768),
    "qtransformer.level_embed.weight": (3, 768),
    "qtransformer.transformer_selfatt_layers.8.self_attn.in_proj_bias": (2304,),
    "qtransformer.transformer_selfatt_layers.0.norm.weight": (768,),
    "qtransformer.transformer_crossatt_layers.8.multihead_attn.out_proj.weight": (768, 768),
    "qtransformer.transformer_crossatt_layers.0.norm.bias": (768,),
    "qtransformer.transformer_feedforward_layers.8.linear1.weight": (2048, 768),
    "qtransformer.transformer_feedforward_layers.0.norm.weight": (768,),
}


def test_a_stage_halves_at_its_end_there_and_at_the_start_of_the_next_one_here() -> None:
    theirs = {pair.theirs[0]: pair.ours for pair in swin_map(LARGE, "original").pairs}
    assert theirs["layers.0.downsample.reduction.weight"] == "net.layers.1.downsample.reduction.weight"
    assert theirs["layers.2.downsample.norm.bias"] == "net.layers.3.downsample.norm.bias"
    assert "layers.3.downsample.norm.bias" not in theirs
    state = detect.shapes(LARGE)
    assert set(theirs.values()) == set(state)


@pytest.mark.parametrize(
    ("spoil", "slot", "said"),
    [
        (
            lambda s: drop(s, "imdecoder.level_embed"),
            "seecoder",
            r"1 of \d+ tensors missing: image_decoder.level_embed",
        ),
        (lambda s: drop(s, "imencoder.norm2.bias"), "swin", r"1 of \d+ tensors missing: norms.2.bias"),
        (lambda s: drop(s, "imencoder."), "swin", r"holds seecoder, no swin"),
        (lambda s: {k: v for k, v in s.items() if "imencoder" in k}, "seecoder", r"holds swin, no seecoder"),
        (lambda s: s | {f"{OUTER}odd.weight": torch.ones(1)}, "seecoder", r"1 unexpected: odd.weight"),
        (lambda s: s | {f"{OUTER}imencoder.head.weight": torch.ones(1)}, "swin", r"1 unexpected: head.weight"),
        (lambda s: drop(s, "imencoder.layers.1."), "swin", r"blocks per stage are .*0.*: some are missing"),
    ],
)
def test_part_of_a_file_is_refused_in_one_line(spoil: Any, slot: str, said: str, tmp_path: Path) -> None:
    save_file(spoil(networks(False)[2]), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=said) as caught:
        model.load(tmp_path / "x.safetensors", slot)
    assert "\n" not in str(caught.value)


def drop(state: dict[str, Tensor], mark: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(OUTER + mark)}


def test_a_backbone_without_a_norm_per_stage_has_no_place_in_the_layout(tmp_path: Path) -> None:
    save_file(Swin(dataclasses.replace(SMALL, pyramid=False)).state_dict(), tmp_path / "swin.safetensors")
    save_file(networks(False)[1].state_dict(), tmp_path / "seecoder.safetensors")
    with pytest.raises(ConfigError, match=r"2 keys have no name in this layout: net.norm"):
        model.export([tmp_path], "seecoder", tmp_path / "x.safetensors")
    (tmp_path / "swin.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"layout seecoder needs seecoder and swin; given: seecoder"):
        model.export([tmp_path], "seecoder", tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"layout original has no place for a seecoder; use seecoder"):
        model.export([tmp_path], "original", tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["train/sd15/seecoder", "train/sd15/seecoder_pa", "sample/sd15/seecoder"])
def test_configs_have_the_shape_of_the_released_networks(name: str) -> None:
    node = configs.load(ROOT / "configs" / f"{name}.yaml").adapters["see"]
    shape = {k: v for k, v in node["encoder"].items() if k not in ("weights", "weights_prefix")}
    assert registry.options("image", shape) == LARGE
    with torch.device("meta"):
        coder = SeeCoderConfig(position=name.endswith("_pa"))
        options = {k: v for k, v in node.items() if k != "weights"}
        built: nn.Module = registry.build("adapter", options, unet=UNet(coder.unet))
    assert {k: v.shape for k, v in built.state_dict().items()} == detect.shapes(coder)

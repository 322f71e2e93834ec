"""Files whose tensors are missing, empty, turned or of another rank: one line from inspecting and loading, no more."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import adapters  # noqa: F401
from ldm import registry
from ldm.convert import detect, infer, keymap, model, slots
from ldm.convert.tables_seecoder import SeeCoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.registry import ConfigError
from ldm.training import checkpoint
from tests.small import SHALLOW

FLAT = UNetConfig(channels=(8, 16, 32, 32), depth=(0,) * 4, mid_depth=0, blocks=1, num_heads=1, groups=1)
XL = UNetConfig(channels=(8, 16, 32), depth=(0,) * 3, mid_depth=0, blocks=1, num_heads=1, groups=1)
CROSS = UNetConfig(channels=(8, 8, 8, 8), context_dim=12, num_heads=1, groups=1)
WORDS = {"width": 16, "layers": 2, "heads": 1, "merges": 4, "context_length": 4}
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
CLIP = {"image_size": 16, "patch": 8, "width": 64, "layers": 2, "heads": 1, "mlp": 8, "embed_dim": 6}
TINY = {"channels": [8, 16], "blocks": 1, "groups": 4}
IP = {"name": "ip_adapter", "encoder": VIT}
SWIN = {"image_size": 32, "width": 8, "depths": [2, 1], "heads": [1, 2], "window": 2, "pyramid": True}
NODES: dict[str, tuple[str, dict[str, Any], UNetConfig | None]] = {  # kind, YAML, UNet
    "unet": (
        "unet",
        {"name": "unet", **TINY, "depth": [0, 1], "mid_depth": 0, "context_dim": 12, "vector_dim": 6},
        None,
    ),
    "vae": ("vae", {"name": "kl", **TINY}, None),
    "text": ("text", {"name": "clip", **WORDS}, None),
    "text_2": ("text", {"name": "sdxl", "clip": None, "open_clip": {**WORDS, "projection": 6}}, None),
    "image": ("image", {"name": "open_clip", **CLIP}, None),
    "controlnet": ("adapter", {"name": "controlnet", "hint_widths": [4, 8]}, SHALLOW),
    "t2i_full": ("adapter", {"name": "t2i_adapter"}, FLAT),
    "t2i_light": ("adapter", {"name": "t2i_adapter", "variant": "light"}, FLAT),
    "t2i_xl": ("adapter", {"name": "t2i_adapter", "variant": "xl"}, XL),
    "ip_base": ("adapter", IP, CROSS),
    "ip_plus": ("adapter", {**IP, "variant": "plus", "width": 8, "head_dim": 8, "depth": 1, "tokens": 2}, CROSS),
    "ip_full": ("adapter", {**IP, "variant": "full"}, CROSS),
    "seecoder": ("adapter", {**SeeCoderConfig((16, 32), 12, 7, 2, 12, 1, 10).node, "heads": 1}, CROSS),
    "swin": ("image", {"name": "swin", **SWIN}, None),
}
CASES = [
    *((name, "original") for name in ("unet", "vae", "t2i_full", "t2i_xl", "ip_base", "ip_plus", "ip_full")),
    *((name, "original") for name in ("seecoder", "swin")),
    *((name, "diffusers") for name in ("controlnet", "t2i_light")),
    *((name, "transformers") for name in ("text", "text_2", "image")),
    *((name, "ours") for name in ("text_2", "t2i_light", "ip_plus")),
    ("image", "open_clip"),
]
TELLING = re.compile(  # what a network's shape is read from, under our names; the rest is compared with it
    r"conv_in\.weight$|conv_out\.weight$|embed\.0\.weight|attn2\.to_k|proj_in\.weight|levels\.0\.(in_|blocks\.0\.)conv"
    r"|levels\.0\.blocks\.0\.(res\.)?conv1\.weight|out_conv\.weight|hint\.convs\.[02]\.weight|embedding|text_proj"
    r"|net\.(conv1|proj)|resblocks\.0\.(mlp\.c_fc|attn\.in_proj)_?\.?weight|image\.proj\.(latents|.*weight)|to_k\.0"
    r"|patch_embed\.proj\.weight|0\.attn\.relative_position_bias_table|inputs\.\d\.conv\.w|queries|0\.ff\.linear1\.weight"
)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda v: v.new_ones(()),
    "flat": lambda v: v.reshape(-1),
    "empty": lambda v: v[:0],
    "empty last": lambda v: v[..., :0],
    "turned": lambda v: v.transpose(0, -1),
    "deeper": lambda v: v[None],
}


def valid(name: str, naming: str) -> tuple[torch.nn.Module, dict[str, str], dict[str, Tensor], list[str]]:
    """A network, its parts, a file of it, and those names in the file from which its shape is read."""
    kind, node, unet = NODES[name]
    net = registry.build(kind, node, **({"unet": UNet(unet)} if unet else {}))
    parts = dict(slots.parts(kind, node))
    [(mark, component)] = parts.items()
    ours = {key[len(mark) :]: value for key, value in net.state_dict().items()}
    table = infer.keymap(detect.READERS[component](ours, "ours")[0], naming)
    prefix = next(s.prefix for s in (*detect.SECTIONS, *detect.BARE) if (s.component, s.naming) == (component, naming))
    state = {prefix + key: value.contiguous() for key, value in table.to_theirs(ours).items()}
    telling = [prefix + pair.theirs[-1] for pair in table.pairs if TELLING.search(pair.ours)]
    return net, parts, state, [key for key in telling if key in state]


def refusals(net: torch.nn.Module, parts: dict[str, str], file: Path) -> list[str]:
    """What `inspect` and loading say against a file; anything but a ConfigError gets out."""
    said: list[str] = []
    for act in (lambda: [*model.inspect(file)], lambda: checkpoint.load_weights(net, file, parts=parts)):
        try:
            act()
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(("name", "naming"), CASES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_spoilt_tensor_is_refused_in_one_line(name: str, naming: str, tmp_path: Path) -> None:
    net, parts, state, telling = valid(name, naming)
    file = tmp_path / "x.safetensors"
    save_file(state, file)
    assert refusals(net, parts, file) == [] and len(telling) >= 3
    for i, key in enumerate(telling):
        changes = list(CHANGES.items())[i % 2 :: 2]  # half of them on each tensor, all of them on each network
        spoilt = {change: {**state, key: make(state[key]).contiguous()} for change, make in changes}
        spoilt["dropped"] = {k: v for k, v in state.items() if k != key}
        for change, tensors in spoilt.items():
            if change != "dropped" and tensors[key].shape == state[key].shape:
                continue
            save_file(tensors, file)
            said = refusals(net, parts, file)
            assert said and not any("\n" in line for line in said), (key, change, said)


def test_sizes_are_read_or_refused() -> None:
    ours = {"a": torch.zeros(2, 0), "b": torch.zeros(())}
    assert keymap.size(ours, "a", 0) == 2
    for key, axis, said in (
        ("a", 1, r"a \(our name\) is \(2, 0\), wanted a size of at least 1 on axis 1"),
        ("a", 2, r"is \(2, 0\), wanted .* on axis 2"),
        ("b", 0, r"b \(our name\) is \(\), wanted"),
        ("c", 0, r"c \(our name\) is missing: this is part of a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=said):
            keymap.size(ours, key, axis)


@pytest.mark.parametrize("number", ["300000000", "9" * 5000])
def test_a_name_that_counts_to_no_end_is_refused_at_once(number: str, tmp_path: Path) -> None:
    _, _, state, _ = valid("unet", "original")
    save_file({**state, f"model.diffusion_model.input_blocks.{number}.0.x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=rf"has number {number[:12]} among \d+ tensors") as caught:
        list(model.inspect(tmp_path / "x.safetensors"))
    assert len(str(caught.value)) < 400


def test_weights_of_eight_bits_are_read_and_their_nan_is_found(tmp_path: Path) -> None:
    net, parts, state, _ = valid("vae", "original")
    small = {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    save_file(small, tmp_path / "x.safetensors")
    assert refusals(net, parts, tmp_path / "x.safetensors") == []
    assert torch.equal(net.get_parameter("quant.weight"), small["first_stage_model.quant_conv.weight"].float())
    small["first_stage_model.quant_conv.weight"] = torch.full((8, 8, 1, 1), torch.nan).to(torch.float8_e4m3fn)
    save_file(small, tmp_path / "x.safetensors")
    assert "NaN or infinite values in 1 tensors (quant.weight)" in refusals(net, parts, tmp_path / "x.safetensors")[0]

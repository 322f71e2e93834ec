"""SeeCoder against references built of torch's own attention, and what its tokens do and do not depend on."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.seecoder import Attention, Position, SeeCoder, SeeCoderOptions
from ldm.control import Control
from ldm.denoiser import AdapterUse, check_use
from ldm.registry import ConfigError
from ldm.training import checkpoint
from tests.small import trained_unet

SWIN = {"name": "swin", "image_size": 32, "width": 8, "depths": [1, 2, 1, 1], "heads": [1, 2, 2, 4], "window": 2}
WIDTHS, SIZES = (16, 32, 64), ((4, 6), (2, 3), (1, 2))  # of its last three stages; of some maps
HEADS, DIM, GLOBAL, LOCAL = 2, 12, 2, 3
SMALL = SeeCoderOptions(
    SWIN, global_queries=GLOBAL, local_queries=LOCAL, layers=7, hidden=16, decoder_layers=2, decoder_hidden=20, heads=2
)
both_attentions = pytest.mark.parametrize("attention", ["per_image", "over_tokens"])


def make(**words: Any) -> SeeCoder:
    """In eval mode and float64; no parameter is at its start, nor alike between two networks of one shape."""
    net = SeeCoder(SeeCoderOptions(**{**vars(SMALL), **words}), unet=trained_unet()).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def some_maps(b: int = 1, m: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.randn(b, m, c, *size, dtype=torch.double) for c, size in zip(WIDTHS, SIZES, strict=True))


def tokens(net: SeeCoder, maps: tuple[Tensor, ...]) -> Tensor:
    context = net.prepare(maps).context
    assert context is not None
    return context


def theirs(ours: Attention) -> nn.MultiheadAttention:
    """torch's attention, sequence first, with the same weights: their names are the same."""
    made = nn.MultiheadAttention(DIM, HEADS).double().eval()
    made.load_state_dict(ours.state_dict())
    return made


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, (DIM,), layer.weight, layer.bias)


def project(x: Tensor, layer: Any) -> Tensor:
    """Map b c h w through a 1x1 convolution and GroupNorm to b h*w dim."""
    y = torch.einsum("bchw,dc->bdhw", x, layer.conv.weight[..., 0, 0])
    if layer.conv.bias is not None:
        y = y + layer.conv.bias.view(-1, 1, 1)
    return F.group_norm(y, math.gcd(32, DIM), layer.norm.weight, layer.norm.bias).flatten(2).mT


def official_decoder(net: Any, maps: list[Tensor]) -> list[Tensor]:
    """As the released code: res5, res4, res3 in one row of tokens b n d, which its attention takes for n b d."""
    coarse_first = list(range(len(maps)))[::-1]
    levels = [project(maps[i], net.inputs[i]) + net.level_embed[row] for row, i in enumerate(coarse_first)]
    x = torch.cat(levels, dim=1)
    for layer in net.layers:
        x = norm(x + theirs(layer.attn)(x, x, x)[0], layer.norm1)
        x = norm(x + layer.ff.linear2(F.relu(layer.ff.linear1(x))), layer.norm2)
    parts = dict(zip(coarse_first, x.split([level.shape[1] for level in levels], dim=1), strict=True))
    return [parts[i] + project(maps[i], net.laterals[i]) for i in range(len(maps))]


def official_queries(net: Any, levels: list[Tensor]) -> Tensor:
    """As the released code, sequence first: levels n b d, finest first; all of them are read once in each round."""
    b = levels[0].shape[0]
    memory = [level.transpose(0, 1) + net.level_embed[i] for i, level in enumerate(levels)]
    keys = memory
    if net.position is not None:
        keys = [x + net.position(size).transpose(0, 1) for x, size in zip(memory, SIZES, strict=True)]
    output, place = (x[:, None].expand(-1, b, -1) for x in (net.queries, net.query_position))
    whole, local, local_place = output[:GLOBAL], output[GLOBAL:], place[GLOBAL:]
    for k, layer in enumerate(net.layers):
        i = k % 3
        heard = theirs(layer.cross_attn)(query=local + local_place, key=keys[i], value=memory[i])[0]
        z = torch.cat([whole, norm(local + heard, layer.cross_norm)])
        z = norm(z + theirs(layer.self_attn)(query=z + place, key=z + place, value=z)[0], layer.self_norm)
        z = norm(z + layer.ff.linear2(F.relu(layer.ff.linear1(z))), layer.ff_norm)
        whole, local = z[:GLOBAL], z[GLOBAL:]
    return torch.cat([whole, local]).transpose(0, 1)


@pytest.mark.parametrize("position", [False, True])
def test_tokens_of_one_image_equal_the_released_codes(position: bool) -> None:
    net, maps = make(position=position), some_maps()
    flat = [x[:, 0] for x in maps]
    decoded = official_decoder(net.image_decoder, flat)
    for got, want in zip(net.image_decoder(flat), decoded, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    got = tokens(net, maps)
    assert got.shape == (1, GLOBAL + LOCAL, DIM)
    torch.testing.assert_close(got, official_queries(net.query_transformer, decoded), atol=1e-6, rtol=0)


def test_query_transformer_equals_the_reference_in_a_batch() -> None:
    net = make(position=True).query_transformer
    levels = [torch.randn(3, h * w, DIM, dtype=torch.double) for h, w in SIZES]
    torch.testing.assert_close(net(levels, SIZES), official_queries(net, levels), atol=1e-6, rtol=0)


@both_attentions
def test_images_of_a_batch_do_not_meet(attention: str) -> None:
    """In the released code they do: its attention runs along the batch."""
    net, maps = make(decoder_attention=attention), some_maps(b=2)
    torch.testing.assert_close(tokens(net, maps)[1:], tokens(net, tuple(x[1:] for x in maps)))
    flat = [x[:, 0] for x in maps]
    leaky, alone = official_decoder(net.image_decoder, flat), official_decoder(net.image_decoder, [x[1:] for x in flat])
    assert (leaky[0][1:] - alone[0]).abs().max() > 0.01


def test_attention_per_image_is_the_released_one_on_a_single_row() -> None:
    attention, x = make().image_decoder.layers[0].get_submodule("attn"), torch.randn(2, 5, DIM, dtype=torch.double)
    assert isinstance(attention, Attention)
    row = x.reshape(1, 10, DIM)
    expected = theirs(attention)(row, row, row)[0].reshape(2, 5, DIM)
    torch.testing.assert_close(attention.alone(x), expected, atol=1e-12, rtol=0)


@both_attentions
def test_a_decoder_token_sees_the_others_over_tokens_only(attention: str) -> None:
    layer = make(decoder_attention=attention).image_decoder.layers[0]
    x = torch.randn(1, 6, DIM, dtype=torch.double)
    other = x.clone()
    other[:, 2] += torch.randn(DIM)
    changed = (layer(other) - layer(x)).abs().amax(dim=-1)[0] > 1e-6
    assert changed.tolist() == [attention == "over_tokens" or i == 2 for i in range(6)]
    if attention == "over_tokens":
        seen = x.transpose(0, 1)
        ours = layer.get_submodule("attn")
        assert isinstance(ours, Attention)
        heard = theirs(ours)(seen, seen, seen)[0].transpose(0, 1)
        torch.testing.assert_close(ours(x, x, x), heard, atol=1e-12, rtol=0)


@pytest.mark.parametrize("position", [False, True])
def test_only_position_tells_where_in_a_level_a_pixel_lies(position: bool) -> None:
    net = make(position=position).query_transformer
    levels = [torch.randn(1, h * w, DIM, dtype=torch.double) for h, w in SIZES]
    shuffled = [levels[0][:, torch.randperm(24)], *levels[1:]]
    difference = (net(levels, SIZES) - net(shuffled, SIZES)).abs().max()
    assert difference > 1e-2 if position else difference < 1e-9


def test_position_starts_as_none_and_may_be_missing_where_training_begins(tmp_path: Path) -> None:
    unet, maps = trained_unet(), tuple(x.float() for x in some_maps())
    plain, placed = (
        SeeCoder(SeeCoderOptions(**{**vars(SMALL), "position": p}), unet=unet).eval() for p in (False, True)
    )
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match=r"6 missing: query_transformer.position"):
        checkpoint.load_weights(placed, tmp_path / "plain.safetensors")
    checkpoint.load_weights(placed, tmp_path / "plain.safetensors", may_lack=SeeCoder.silent_parts)
    assert torch.equal(tokens(placed, maps), tokens(plain, maps))
    placed.query_transformer.get_parameter("position.mlp.4.weight").data.normal_()
    assert not torch.equal(tokens(placed, maps), tokens(plain, maps))
    part = {k: v for k, v in placed.state_dict().items() if not k.endswith("mlp.2.bias")}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"1 missing: query_transformer.position.mlp.2.bias"):
        checkpoint.load_weights(placed, tmp_path / "part.safetensors", may_lack=SeeCoder.silent_parts)


def code(position: Position, size: tuple[int, int]) -> Tensor:
    """What the MLP reads, h w 80."""
    seen: list[Tensor] = []
    hook = position.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    position(size)
    hook.remove()
    return seen[0][0].view(*size, 80)


def test_position_code_has_the_papers_numbers() -> None:
    position = Position(8).eval()
    got = code(position, (2, 2))
    for i, part in enumerate(got.split(20, dim=-1)):  # sine and cosine of the row, then of the column
        sign = torch.tensor([-1.0, 1.0])
        expected = [sign[:, None].expand(2, 2), torch.zeros(2, 2), sign.expand(2, 2), torch.zeros(2, 2)][i]
        torch.testing.assert_close(part, expected[..., None].expand(-1, -1, 20), atol=1e-6, rtol=0)
    y = 2 * math.pi * 0.5 / 16  # half a cell below the centre
    frequencies = code(position, (16, 20))[8, 0, :20].asin() / y
    torch.testing.assert_close(frequencies[[0, 1, 19]], torch.tensor([1.0, 1.1157, 8.0]), atol=1e-4, rtol=1e-3)
    assert all(torch.isclose(b / a, torch.tensor(8 ** (1 / 19)), atol=1e-3) for a, b in pairwise(frequencies))


def test_positions_are_shifted_in_training_by_at_most_half_a_cell() -> None:
    position = Position(8)
    angles = torch.stack([code(position, (4, 4))[0, 1, ::40] for _ in range(50)]).asin()  # of row 0 and of column 1
    cells = angles / (math.pi / 2) - torch.tensor([-1.5, -0.5])
    assert cells[:, 1].unique().numel() > 10 and cells[:, 1].abs().max() <= 0.5 + 1e-6
    assert not torch.equal(cells[:, 0], cells[:, 1])


def test_null_stands_for_zero_tokens_row_by_row() -> None:
    net, maps = make(), some_maps(b=3)
    null = net.null(maps)
    assert not tokens(net, null).any() and [x.shape[-2:] for x in null] == [(1, 1)] * 3
    drop = torch.tensor([False, True, False])
    dropped = tuple(torch.where(drop.view(-1, 1, 1, 1, 1), n, x) for n, x in zip(null, maps, strict=True))
    got = tokens(net, dropped)
    assert not got[1].any()
    torch.testing.assert_close(got[[0, 2]], tokens(net, maps)[[0, 2]])


def test_unconditional_tokens_may_come_from_a_file(tmp_path: Path) -> None:
    plain, file = make(), tmp_path / "null.safetensors"
    n, dim = plain.query_transformer.queries.shape
    own = torch.randn(n - 2, dim)
    save_file({"null": own[None].half()}, file)
    net = make(unconditional=str(file))
    net.load_state_dict(plain.state_dict())
    maps = some_maps()
    both = tuple(torch.cat([x, torch.zeros_like(x)]) for x in maps)
    got = tokens(net, both)
    torch.testing.assert_close(got[:1], tokens(plain, maps))
    assert torch.equal(got[1], F.pad(own.half().float(), (0, 0, 0, 2)))


@pytest.mark.parametrize("shape", [(99, 12), (2, 5), (3,)])
def test_unconditional_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"null": torch.zeros(shape)}, tmp_path / "null.safetensors")
    net = make(unconditional=str(tmp_path / "null.safetensors"))
    with pytest.raises(ConfigError, match=r"seecoder.unconditional: .*null.safetensors has tensors of"):
        net.prepare(tuple(torch.zeros_like(x) for x in some_maps()))


@pytest.mark.parametrize("size", [(37, 22), (8, 160), (160, 8), (355, 200), (4, 4)])
def test_references_of_every_size_give_as_many_tokens(size: tuple[int, int]) -> None:
    net = make()
    got = tokens(net, net.encode(torch.rand(1, 1, 3, *size, dtype=torch.double)))
    assert got.shape == (1, GLOBAL + LOCAL, DIM) and got.isfinite().all()


def test_several_references_are_one_longer_row() -> None:
    net = make()
    pictures = torch.rand(2, 3, 3, 16, 24, dtype=torch.double)
    apart = [tokens(net, net.encode(pictures[:, i : i + 1])) for i in range(3)]
    torch.testing.assert_close(tokens(net, net.encode(pictures)), torch.cat(apart, dim=1))


def test_maps_of_another_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"with c of \[16, 32, 64\]: encode the references with this adapter's backb"):
        make().prepare(some_maps()[::-1])


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (AdapterUse(scale=0.5), r"its scale is 0.5, allowed: 0, 1"),
        (AdapterUse(start=0.2), r"stands for the text, but start is 0.2 and end 1; it must be heard at every step"),
        (AdapterUse(end=0.5), r"start is 0 and end 0.5"),
        (AdapterUse(mask="m.png"), r"mask and blocks cannot act on it"),
    ],
)
def test_uses_that_a_text_could_not_have_are_refused(use: AdapterUse, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_use("see", use, make(), trained_unet().spec)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"decoder_attention": "both"}, r"decoder_attention is 'both'; allowed: per_image, over_tokens"),
        ({"encoder": {"name": "vit"}}, r"must be a Swin, whose stages it reads"),
        ({"heads": 5}, r"heads is 5, must divide 12"),
        ({"levels": 5}, r"levels is 5, must be at most 4: the backbone's stages"),
        ({"layers": 0}, r"layers is 0, must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0, must be in \[0, 1\)"),
    ],
)
def test_options_that_do_not_fit_are_one_line(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(**words)


def test_tokens_are_the_context_and_nothing_else() -> None:
    net, maps = make(), some_maps()
    prepared = net.prepare(maps)
    assert prepared == Control(context=prepared.context)
    assert net.control(torch.zeros(1), torch.zeros(1), Control(), prepared) is prepared

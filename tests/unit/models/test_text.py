import logging

import pytest
import torch
from torch import nn

import ldm.models  # noqa: F401  (registers)
from ldm.models.text import TextConfig, TextEncoder, Tokenizer
from ldm.registry import ConfigError, build

TINY = TextConfig(width=16, layers=3, heads=2, merges=100, context_length=12)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (TextConfig(), 123_060_480),
        (TextConfig(width=1024, layers=24, heads=16, activation="gelu", pad="zero"), 352_984_064),
        (TextConfig(width=1024, layers=23, heads=16, activation="gelu", pad="zero"), 340_387_840),
        (TextConfig(width=1280, layers=32, heads=20, activation="gelu", pad="zero"), 694_659_840 - 1280 * 1280),
    ],
    ids=["clip-l", "h", "h-23-layers", "bigg-without-projection"],
)
def test_published_sizes(config: TextConfig, total: int) -> None:
    with torch.device("meta"):
        text = TextEncoder(config)
    assert sum(p.numel() for p in text.parameters()) == total
    assert config.vocab_size == 49408


def test_meta_device_and_loading() -> None:
    text, ids = TextEncoder(TINY), torch.randint(0, 600, (2, 12))
    with torch.device("meta"):
        empty = TextEncoder(TINY)
    empty.load_state_dict(text.state_dict(), assign=True)
    torch.testing.assert_close(empty(ids), text(ids))


def test_known_ids() -> None:
    tokens = Tokenizer()(["a cat", ""])
    assert tokens.ids.shape == (2, 77) and tokens.ids.dtype == torch.int64
    assert tokens.ids[0, :4].tolist() == [49406, 320, 2368, 49407]
    assert tokens.ids[0, 4:].unique().tolist() == [49407]
    assert tokens.ids[1].unique().tolist() == [49406, 49407]
    assert Tokenizer(pad="zero")(["a cat"]).ids[0, 4:].unique().tolist() == [0]


def test_fewer_merges_are_a_smaller_encoding_of_the_same_text() -> None:
    full, small = Tokenizer(), Tokenizer(merges=1000)
    assert (small.vocab_size, small.bos, small.eos) == (1514, 1512, 1513)
    for text in ("a flat emoji of a red apple", "Zürich, 3 o'clock!", "日本"):
        ids = small([text]).ids[0]
        inner = ids[(ids != small.bos) & (ids != small.eos)].tolist()
        assert max(inner) < 1512
        assert small._bpe.decode(inner).strip() == full._bpe.decode(full._bpe.encode(text)).strip()
    none = Tokenizer(merges=0)
    assert none(["cat"]).ids[0, :5].tolist() == [512, 66, 64, 256 + 83, 513]  # c, a, t at the end of a word


def test_small_encodings_do_not_change_the_full_one() -> None:
    before = Tokenizer()(["a red apple"]).ids
    Tokenizer(merges=10)(["a red apple"])
    assert torch.equal(Tokenizer()(["a red apple"]).ids, before)


def test_long_prompts_are_cut_and_reported() -> None:
    tokens = Tokenizer(context_length=6)(["a b c d", "a b c d e", "a"])
    assert tokens.truncated == (1,)
    assert (tokens.ids[:, 0] == 49406).all()
    assert tokens.ids[0, 5] == tokens.ids[1, 5] == 49407
    assert torch.equal(tokens.ids[0], tokens.ids[1])


def test_long_prompts_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    text = TextEncoder(TINY)
    with caplog.at_level(logging.WARNING):
        ids = text.ids(["a", "a b c d e f g h i j k l"])
    assert ids.shape == (2, 12)
    assert [r.getMessage() for r in caplog.records] == [
        "1 of the 2 prompts so far are longer than 12 tokens and were cut, e.g. 'a b c d e f g h i j k l'; "
        "this is said once"
    ]


def test_cut_prompts_are_warned_about_once_with_the_count_so_far(caplog: pytest.LogCaptureFixture) -> None:
    text, long = TextEncoder(TINY), "a b c d e f g h i j k l"
    with caplog.at_level(logging.WARNING):
        for texts in (["a", "b"], ["a", long], [long, long]):
            text.ids(texts)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("1 of the 4 prompts so far")


def test_attention_is_causal() -> None:
    text, ids = TextEncoder(TINY).eval(), torch.randint(0, 600, (1, 12))
    other = ids.clone()
    other[0, 7] += 1
    a, b = text(ids), text(other)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert ((a[:, 7:] - b[:, 7:]).abs().amax(-1) > 0).all()


def test_layers_and_final_norm() -> None:
    text, ids = TextEncoder(TINY).eval(), torch.randint(0, 600, (2, 12))
    blocks = [text.hidden(ids, skip) for skip in (0, 1, 2)]
    assert not torch.allclose(blocks[0], blocks[1])
    variants = {
        ("last", True): text.ln_final(blocks[0]),
        ("last", False): blocks[0],
        ("penultimate", True): text.ln_final(blocks[1]),
        ("penultimate", False): blocks[1],
    }
    for (layer, norm), expected in variants.items():
        config = TextConfig(width=16, layers=3, heads=2, merges=100, context_length=12, layer=layer, final_norm=norm)
        variant = TextEncoder(config).eval()
        variant.load_state_dict(text.state_dict())
        torch.testing.assert_close(variant(ids), expected)


def test_outputs_are_the_layer_and_the_projected_pooled_text_of_the_last_block() -> None:
    config = TextConfig(width=16, layers=3, heads=2, merges=100, context_length=12, final_norm=False, projection=5)
    text, ids = TextEncoder(config).eval(), TextEncoder(TINY).ids(["a b", "c"])
    pooled = text.pooled(text.ln_final(text.hidden(ids)), ids) @ text.text_proj
    for clip_skip in (1, 2, 3):
        tokens, features = text.outputs(ids, clip_skip)
        assert features is not None and features.shape == (2, 5)
        torch.testing.assert_close(tokens, text.hidden(ids, clip_skip - 1))
        torch.testing.assert_close(features, pooled)
    torch.testing.assert_close(text.outputs(ids)[0], text(ids))
    assert TextEncoder(TINY).outputs(ids)[1] is None


def test_pooled_takes_the_first_end_mark() -> None:
    text = TextEncoder(TINY)
    eos = text.tokenizer.eos
    ids = torch.tensor([[1, 2, eos, eos], [1, eos, eos, eos]])
    tokens = torch.arange(2 * 4 * 16.0).view(2, 4, 16)
    torch.testing.assert_close(text.pooled(tokens, ids), torch.stack([tokens[0, 2], tokens[1, 1]]))


@pytest.mark.parametrize(("name", "kind"), [("quick_gelu", "QuickGELU"), ("gelu", "GELU")])
def test_activation_kind(name: str, kind: str) -> None:
    text = TextEncoder(TextConfig(width=16, layers=2, heads=2, merges=10, activation=name))
    found = [m for m in text.modules() if "GELU" in type(m).__name__]
    assert [type(m).__name__ for m in found] == [kind] * 2
    assert all(getattr(m, "approximate", "none") == "none" for m in found)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(found[0](x), x * torch.sigmoid(1.702 * x) if kind == "QuickGELU" else nn.GELU()(x))


def test_norms_have_eps_1e_5() -> None:
    text = TextEncoder(TINY)
    norms = [m for m in text.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 7 and {m.eps for m in norms} == {1e-5}


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="text: 13 positions and skip=0; this tower has 12 positions and 3 layers"):
        TextEncoder(TINY)(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "text.activation is 'relu', must be one of quick_gelu, gelu"),
        ({"pad": "none"}, "text.pad is 'none', must be one of eos, zero"),
        ({"layer": "first"}, "text.layer is 'first'"),
        ({"width": 30, "heads": 4}, "text.width is 30, must be a positive multiple of text.heads=4"),
        ({"layers": 1, "layer": "penultimate"}, "text.layers is 1, must be at least 2"),
        ({"context_length": 2}, "text.context_length is 2"),
        ({"merges": 50_000}, "text.merges is 50000"),
        ({"projection": 0}, "text.projection is 0, must be null or at least 1"),
    ],
)
def test_bad_config_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("text", {"name": "clip", **options})

from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning import TextUse, condition, count_cut
from ldm.control import Control
from ldm.models.sdxl_text import SDXLText, SDXLTextConfig
from ldm.models.text import Text, TextConfig, TextEncoder
from ldm.registry import ConfigError

T = TypeVar("T", bound=Text)
SHAPE: dict[str, Any] = {"width": 16, "layers": 3, "heads": 2, "merges": 60, "context_length": 8}  # room for 6 tokens
SIZE = (32, 48)
CHUNKS, WEIGHTS = TextUse(long="chunks"), TextUse(weights=True)
LONG, LONGER = "a b c d e f g h", "a b c d e f g h i j k l m"  # one token a letter: 2 and 3 chunks


def sd1() -> TextEncoder:
    return lively(TextEncoder(TextConfig(**SHAPE)))


def sdxl() -> SDXLText:
    return lively(SDXLText(SDXLTextConfig(clip=SHAPE, open_clip={**SHAPE, "width": 24, "projection": 10})))


def lively(text: T) -> T:
    """Large embeddings, with which prompts differ, and a norm that gives tokens a mean, as trained towers have."""
    for name, parameter in text.named_parameters():
        if "embedding" in name or "ln_final" in name:
            torch.nn.init.normal_(parameter, mean=0.3)
    return text.eval().requires_grad_(False)


def tensors(control: Control) -> tuple[Tensor, Tensor | None]:
    assert control.context is not None
    return control.context, control.vector


def context(text: Text, prompts: list[str], use: TextUse, beside: list[str] | None = None) -> Tensor:
    return tensors(condition(text, prompts, SIZE, use, beside))[0]


def test_plain_prompts_are_the_towers_tokens_and_brackets_are_text() -> None:
    text, prompts = sd1(), ["a", "(b:2) [c]", "a"]
    got, vector = tensors(condition(text, prompts, SIZE))
    assert vector is None
    torch.testing.assert_close(got, text(text.ids(prompts)))
    torch.testing.assert_close(got, context(text, prompts, CHUNKS)[:, :8])


def test_long_prompts_are_chunks_each_with_its_own_marks_and_padding() -> None:
    text = sdxl()
    seen: list[list[list[int]]] = []
    for tower in text.towers:
        tower.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    got = context(text, [LONG], CHUNKS)
    words, bos, eos = text.towers[0].tokenizer.words(LONG), 572, 573
    assert seen[0] == [[bos, *words[:6], eos], [bos, *words[6:], *[eos] * 5]]
    assert seen[1] == [[bos, *words[:6], eos], [bos, *words[6:], eos, *[0] * 4]]
    ids = [tower.tokenizer(["a b c d e f", "g h"]).ids for tower in text.towers]
    parts = torch.cat([tower(i) for tower, i in zip(text.towers, ids, strict=True)], dim=-1)
    torch.testing.assert_close(got, parts.flatten(0, 1)[None])


def test_the_shorter_branch_is_filled_with_empty_chunks() -> None:
    text = sd1()
    nothing, short = text(text.ids([""])), text(text.ids(["a"]))
    negative = context(text, ["", "a"], CHUNKS, [LONG, LONGER])[:1, :16]
    torch.testing.assert_close(negative, torch.cat([nothing, nothing], dim=1))
    got = context(text, ["a"], CHUNKS, [LONGER])
    torch.testing.assert_close(got, torch.cat([short, nothing, nothing], dim=1))
    assert context(text, [LONG], CHUNKS, ["a"]).shape[1] == 16
    assert context(text, [LONG], TextUse(), [LONGER]).shape[1] == 8


@pytest.mark.parametrize("make", [sd1, sdxl])
def test_a_prompt_means_the_same_whatever_shares_its_batch(make: Any) -> None:
    text, prompts, negatives = make(), ["(a:1.5)", LONG, LONGER], ["", "[b]", "a"]
    use = TextUse(weights=True, long="chunks")
    together, vectors = tensors(condition(text, prompts, SIZE, use, negatives))
    assert together.shape[1] == 6 * 8  # 1, 2 and 3 chunks
    q = torch.randn(1, 5, together.shape[-1])
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone, vector = tensors(condition(text, [prompt], SIZE, use, [negative]))
        assert alone.shape[1] == 8 * (i + 1)
        mates = together[i : i + 1]
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, mates, mates), F.scaled_dot_product_attention(q, alone, alone)
        )
        torch.testing.assert_close(vector, None if vectors is None else vectors[i : i + 1])


def test_weights_scale_their_tokens_and_keep_the_mean() -> None:
    text = sd1()
    z = text(text.ids(["a b c"]))
    by_hand = z * torch.tensor([1, 1, 1.5, 1, 1, 1, 1, 1])[:, None]
    got = context(text, ["a (b:1.5) c"], WEIGHTS)
    torch.testing.assert_close(got, by_hand * z.mean() / by_hand.mean())
    assert not torch.allclose(got, z, atol=1e-2)


def test_a_mean_of_zero_is_not_restored() -> None:
    text = TextEncoder(TextConfig(**SHAPE)).eval()  # the norm is untrained
    z = text(text.ids(["a b c"]))
    by_hand = z * torch.tensor([1, 1, 1.5, 1, 1, 1, 1, 1])[:, None]
    torch.testing.assert_close(context(text, ["a (b:1.5) c"], WEIGHTS), by_hand)


def test_weights_leave_unweighted_prompts_alone_bit_for_bit() -> None:
    text = sd1()
    assert torch.equal(context(text, ["a b", ""], WEIGHTS), context(text, ["a b", ""], TextUse()))


def test_pooled_text_is_that_of_the_first_chunk_without_weights() -> None:
    text = sdxl()
    use = TextUse(weights=True, long="chunks", clip_skip=3)
    got = tensors(condition(text, [f"({LONG}:1.7)"], SIZE, use))[1]
    torch.testing.assert_close(got, tensors(condition(text, ["a b c d e f"], SIZE))[1])


def test_each_different_chunk_is_encoded_once() -> None:
    text, rows = sd1(), list[int]()
    text.token_embedding.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    condition(text, [LONG, "a", "a", LONG], SIZE, CHUNKS)
    assert rows == [3]  # two of the long prompt, and "a"


def test_cut_tokens_are_counted_as_they_are_read() -> None:
    text = sd1()
    assert [count_cut(text, prompt) for prompt in ("", "a b c d e f", LONG)] == [0, 0, 2]
    assert count_cut(text, LONG, CHUNKS) == 0
    assert count_cut(text, "(a:1.5) b c d e f") > 0 == count_cut(text, "(a:1.5) b c d e f", WEIGHTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_skip": 0}, "clip_skip is 0; allowed: from 1"),
        ({"long": "chunk"}, "long_prompts is 'chunk'; allowed: cut, chunks; did you mean 'chunks'"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextUse(**options)


def test_options_that_the_model_cannot_follow_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_skip is 4; allowed for this text encoder: 1..3, or null"):
        condition(sdxl(), ["a"], SIZE, TextUse(clip_skip=4))
    with pytest.raises(ConfigError, match="the model has no text encoder to use it"):
        condition(None, ["a"], SIZE, CHUNKS)
    assert condition(None, ["a"], SIZE) == Control()


def test_an_empty_prompt_is_zeros_for_sdxl_and_its_encoding_elsewhere() -> None:
    text = lively(sdxl())
    control = condition(text, ["a cat", ""], SIZE)
    tokens, vector = tensors(control)
    pooled = text.open_clip.config.projection
    assert not tokens[1].any() and tokens[0].any()
    assert vector is not None and not vector[1, :pooled].any() and torch.equal(vector[1, pooled:], vector[0, pooled:])
    assert tensors(condition(lively(sd1()), ["a cat", ""], SIZE))[0][1].any()


def test_chunk_counts_without_a_small_common_multiple_are_refused() -> None:
    words = " ".join(["cat"] * 6)
    prompts = [" ".join([words] * n) for n in range(1, 12)]
    with pytest.raises(ConfigError, match=r"set sample.batch=1"):
        condition(sd1(), prompts, SIZE, TextUse(long="chunks"))

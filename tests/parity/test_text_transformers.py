"""Our text tower against transformers' CLIPTextModel and open_clip's CLIP, and our tokenizer against open_clip's."""

from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F

from ldm.convert import transformers_text
from ldm.models.clip import CLIP, CLIPConfig
from ldm.models.text import TextConfig, TextEncoder, Tokenizer

transformers = pytest.importorskip("transformers")
text_words = pytest.importorskip("scripts.benchmarks.networks").text_words

SMALL: dict[str, Any] = {"width": 32, "layers": 3, "heads": 4, "merges": 200, "context_length": 20}
PROMPTS = ["a cat", "", "a flat emoji of a red apple", "a b c d e f g h i j k l m n o p q r s t u v"]


def reference(config: TextConfig) -> torch.nn.Module:
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            **text_words(config),
            eos_token_id=config.vocab_size - 1,
            bos_token_id=config.vocab_size - 2,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pair(**options: Any) -> tuple[TextEncoder, torch.nn.Module]:
    config = TextConfig(**{**SMALL, **options})
    theirs, ours = reference(config), TextEncoder(config).eval()
    ours.load_state_dict(transformers_text(config).to_ours(theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_tokens_and_pooled_agree(activation: str) -> None:
    ours, theirs = pair(activation=activation)
    ids = ours.tokenizer(PROMPTS).ids
    expected = theirs(input_ids=ids, output_hidden_states=True)
    tokens = ours(ids)
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooled(tokens, ids), expected.pooler_output, atol=1e-5, rtol=1e-5)
    for skip in (0, 1, 2):
        torch.testing.assert_close(ours.hidden(ids, skip), expected.hidden_states[-1 - skip], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected.hidden_states[-1], expected.last_hidden_state, atol=1e-2)


@torch.no_grad()
def test_the_wrong_gelu_is_seen() -> None:
    ours, theirs = pair(activation="quick_gelu")
    wrong = TextEncoder(TextConfig(**{**SMALL, "activation": "gelu"})).eval()
    wrong.load_state_dict(ours.state_dict())
    ids = ours.tokenizer(PROMPTS).ids
    assert (wrong(ids) - theirs(input_ids=ids).last_hidden_state).abs().max() > 1e-3


@torch.no_grad()
def test_penultimate_layer_equals_one_layer_less() -> None:
    """SD2 in diffusers is the 23-layer form of a 24-layer tower."""
    ours, theirs = pair(layer="penultimate", activation="gelu", pad="zero")
    ids = ours.tokenizer(PROMPTS).ids
    expected = theirs(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours(ids), ours.ln_final(expected), atol=1e-5, rtol=1e-5)


def test_round_trip_is_exact_with_either_prefix() -> None:
    config = TextConfig(**SMALL)
    keys = transformers_text(config)
    bare = {k.removeprefix("text_model."): v for k, v in reference(config).state_dict().items()}
    published = {f"text_model.{k}": v for k, v in bare.items()}
    back = keys.to_theirs(keys.to_ours(bare))
    assert back.keys() == published.keys()
    assert all(torch.equal(back[k], published[k]) for k in back)
    older = {**published, "text_model.embeddings.position_ids": torch.arange(20)[None]}
    assert keys.to_ours(older).keys() == keys.to_ours(bare).keys()


def test_missing_rows_are_refused() -> None:
    config = TextConfig(**SMALL)
    state = {
        k: v for k, v in reference(config).state_dict().items() if not k.endswith("layers.1.self_attn.k_proj.bias")
    }
    with pytest.raises(ValueError, match=r"1 keys are missing: text_model.encoder.layers.1.self_attn.k_proj.bias"):
        transformers_text(config).to_ours(state)


def test_clip_l_has_the_196_tensors_of_the_published_file() -> None:
    with torch.device("meta"):
        text = TextEncoder(TextConfig())
    assert len(transformers_text(text.config).to_theirs(text.state_dict())) == 196


def test_tokenizer_equals_open_clips() -> None:
    texts = [*PROMPTS[:3], "Ünïcode &amp; punctuation!!  don't", "x " * 100]
    expected = open_clip.tokenizer.SimpleTokenizer()(texts)
    assert torch.equal(Tokenizer(pad="zero")(texts).ids, expected)


@torch.no_grad()
def test_clip_equals_open_clips() -> None:
    theirs = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg={"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16},
        text_cfg={"context_length": 20, "vocab_size": 714, "width": 32, "heads": 4, "layers": 3},
    ).eval()
    image = {"image_size": 16, "patch": 4, "width": 32, "layers": 2, "heads": 4}
    ours = CLIP(CLIPConfig(text={**SMALL, "activation": "gelu", "pad": "zero"}, image=image, embed_dim=24)).eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    x, ids = torch.randn(3, 3, 16, 16), ours.text.tokenizer(PROMPTS[:3]).ids
    torch.testing.assert_close(ours.encode_image(x), theirs.encode_image(x, normalize=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids, normalize=True), atol=1e-5, rtol=1e-5)
    a, b, scale = ours(x, ids)
    loss = open_clip.loss.ClipLoss()(a, b, scale)
    logits = scale * a @ b.T
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(loss, expected)


def from_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in state.items():
        if key == "visual.proj":
            out["image_proj"] = value
        elif key.startswith("visual."):
            out["image.net." + key.removeprefix("visual.")] = value
        elif key == "text_projection":
            out["text_proj"] = value
        elif key != "attn_mask":
            out[key if key == "logit_scale" else "text." + key] = value
    return out

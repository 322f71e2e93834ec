"""SDXL's towers against transformers', its vector against diffusers' sinusoids, and clip skip against hidden states."""

from typing import Any

import pytest
import torch

from ldm.conditioning import TextUse, condition
from ldm.convert import transformers_text
from ldm.models.sdxl_text import SDXLText, SDXLTextConfig
from ldm.models.text import TextConfig, TextEncoder

transformers = pytest.importorskip("transformers")
embeddings = pytest.importorskip("diffusers.models.embeddings")
text_words = pytest.importorskip("scripts.benchmarks.networks").text_words

TOWER: dict[str, Any] = {"layers": 4, "heads": 4, "merges": 200, "context_length": 16}
CLIP = {**TOWER, "width": 24}
OPEN_CLIP = {**TOWER, "width": 32, "projection": 20}
PROMPTS = ["a cat", "", "a flat emoji of a red apple"]


def reference(config: TextConfig) -> torch.nn.Module:
    """The published class of this shape, with random weights. Its end mark is found as SDXL's files say: argmax."""
    kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
    model = kind(
        transformers.CLIPTextConfig(
            **text_words(config),
            projection_dim=config.projection or 1,
            eos_token_id=2,
            bos_token_id=0,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def load(tower: TextEncoder, theirs: torch.nn.Module) -> None:
    table = transformers_text(tower.config, projection=tower.config.projection is not None)
    tower.load_state_dict(table.to_ours(theirs.state_dict()))


@pytest.fixture
def pair() -> tuple[SDXLText, list[torch.nn.Module]]:
    ours = SDXLText(SDXLTextConfig(clip=CLIP, open_clip=OPEN_CLIP, zero_empty=False)).eval()  # as with words
    theirs = [reference(tower.config) for tower in ours.towers]
    for tower, model in zip(ours.towers, theirs, strict=True):
        load(tower, model)
    return ours, theirs


@torch.no_grad()
def test_context_and_vector_are_those_of_the_published_pipeline(pair: tuple[SDXLText, list[torch.nn.Module]]) -> None:
    ours, theirs = pair
    ids = [tower.tokenizer(PROMPTS).ids for tower in ours.towers]
    outputs = [model(input_ids=i, output_hidden_states=True) for model, i in zip(theirs, ids, strict=True)]
    got = condition(ours, PROMPTS, (48, 64))
    assert got.context is not None and got.vector is not None
    want = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    torch.testing.assert_close(got.context, want, atol=1e-5, rtol=1e-5)
    numbers = torch.tensor([48.0, 64, 0, 0, 48, 64])
    sinusoids = embeddings.get_timestep_embedding(numbers, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    want = torch.cat([outputs[1].text_embeds, sinusoids.flatten().expand(3, -1)], dim=1)
    torch.testing.assert_close(got.vector, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_towers_pad_differently(pair: tuple[SDXLText, list[torch.nn.Module]]) -> None:
    first, second = (tower.tokenizer(["a"]).ids[0, 3:].unique().tolist() for tower in pair[0].towers)
    assert first == [713] and second == [0]


@pytest.mark.parametrize("clip_skip", [1, 2, 4])
@torch.no_grad()
def test_clip_skip_is_the_hidden_state_and_the_models_own_norm(
    pair: tuple[SDXLText, list[torch.nn.Module]], clip_skip: int
) -> None:
    sdxl, theirs = pair
    sd1 = TextEncoder(TextConfig(**CLIP)).eval()
    load(sd1, theirs[0])
    states = theirs[0](input_ids=sd1.tokenizer(PROMPTS).ids, output_hidden_states=True).hidden_states
    use = TextUse(clip_skip=clip_skip)
    got = condition(sd1, PROMPTS, (8, 8), use).context
    torch.testing.assert_close(got, sd1.ln_final(states[-clip_skip]), atol=1e-5, rtol=1e-5)
    both = condition(sdxl, PROMPTS, (8, 8), use)
    assert both.context is not None
    torch.testing.assert_close(both.context[..., :24], states[-clip_skip], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.vector, condition(sdxl, PROMPTS, (8, 8)).vector)

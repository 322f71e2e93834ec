import logging

import pytest
import torch

from ldm.data.images import Batch
from ldm.models.clip import CLIP, CLIPConfig, ViTConfig
from ldm.models.text import TextConfig
from ldm.training.clip import CLIPStage
from ldm.training.draws import Draws


def test_cut_captions_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    text = TextConfig(width=16, layers=1, heads=2, context_length=6, merges=10)
    stage = CLIPStage(clip=CLIP(CLIPConfig(text, ViTConfig(16, 8, 16, 1, 2), embed_dim=8)))
    batch = Batch(["a", "b"], torch.zeros(2, 3, 16, 16), ["a", "a b c d e f g h"])
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            stage(batch, Draws(0, [0, 1]), "model", step)
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == [
        "1 of the 2 prompts so far are longer than 6 tokens and were cut"
    ]

import logging

import pytest
import torch

from ldm.data.images import Batch
from ldm.registry import build
from ldm.training.clip import CLIPStage


def test_cut_captions_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    text = {"width": 16, "layers": 1, "heads": 2, "context_length": 6, "merges": 10}
    image = {"image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
    stage = CLIPStage(clip=build("clip", {"name": "clip", "text": text, "image": image, "embed_dim": 8}))
    batch = Batch(["a", "b"], torch.rand(2, 3, 16, 16), ["a", "a b c d e f g h"])
    with caplog.at_level(logging.WARNING):
        stage.validate([batch, batch], 0, 0)  # reads captions as forward does, which imports for long
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == [
        "1 of the 2 prompts so far are longer than 6 tokens and were cut"
    ]

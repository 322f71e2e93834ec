import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from ldm.control import Control
from ldm.training.cache import Latents


def test_latents_are_pinned_with_all_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    mean, std, context, vector, hint = (torch.rand(2, 3) for _ in range(5))
    base = Control(context=context, vector=vector)
    again: Latents = pin_memory(Latents(["a", "b"], mean, std, base, {"edge": hint}))  # as DataLoader does
    assert again.keys == ["a", "b"] and len(pinned) == 5
    assert again.base.context is not None and again.base.vector is not None
    news = (again.mean, again.std, again.base.context, again.base.vector, again.hints["edge"])
    for new, old in zip(news, (mean, std, context, vector, hint), strict=True):
        assert new is not old and torch.equal(new, old)

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from ldm.training.cache import Latents


def test_latents_are_pinned_with_all_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    mean, std, context, hint = (torch.rand(2, 3) for _ in range(4))
    again: Latents = pin_memory(Latents(["a", "b"], mean, std, context, {"edge": hint}))  # as DataLoader does
    assert again.keys == ["a", "b"] and len(pinned) == 4
    for new, old in ((again.mean, mean), (again.std, std), (again.context, context), (again.hints["edge"], hint)):
        assert new is not old and torch.equal(new, old)

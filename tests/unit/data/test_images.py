import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from ldm.data import DataError, Sample, collate


def sample(key: str = "a", size: int = 8, **kwargs) -> Sample:
    return Sample(key, torch.zeros(3, size, size), "text", **kwargs)


def test_collate_stacks_images_hints_and_references():
    image = torch.rand(3, 8, 8)
    batch = collate(
        [Sample(str(i), image * i / 2, f"t{i}", {"edge": image * i / 2}, reference=image * i / 2) for i in range(3)]
    )
    assert batch.keys == ["0", "1", "2"] and batch.text == ["t0", "t1", "t2"]
    assert batch.image.shape == batch.hints["edge"].shape == (3, 3, 8, 8)
    assert batch.reference is not None and torch.equal(batch.reference[2], image)
    assert batch.to("cpu").image.equal(batch.image)


@pytest.mark.parametrize(("low", "high"), [(-1.01, 0.0), (0.0, 1.01), (0.0, float("nan")), (0.0, 255.0)])
def test_image_outside_minus_one_to_one_is_refused(low, high):
    image = torch.zeros(3, 8, 8)
    image[0, 0, 0], image[1, 1, 1] = low, high
    with pytest.raises(DataError, match=r"a: image has values in .* must be in \[-1, 1\]"):
        Sample("a", image, "")


def test_hint_outside_zero_to_one_is_refused():
    with pytest.raises(DataError, match=r"a: hint 'edge' has values in \[-0.5, -0.5\], must be in \[0, 1\]"):
        sample(hints={"edge": torch.full((3, 8, 8), -0.5)})


def test_hint_of_another_size_is_refused():
    with pytest.raises(DataError, match="hint 'edge' is 6x4, its image 8x8"):
        sample(hints={"edge": torch.zeros(3, 4, 6)})


@pytest.mark.parametrize("image", [torch.zeros(1, 8, 8), torch.zeros(8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_image_must_have_three_float_channels(image):
    with pytest.raises(DataError, match="must be 3 h w and floating point"):
        Sample("a", image, "")


def test_collate_refuses_mixtures():
    with pytest.raises(DataError, match="b is 16x16, a is 8x8"):
        collate([sample(), sample("b", 16)])
    with pytest.raises(DataError, match=r"b has hints \['edge'\], a has \[\]"):
        collate([sample(), sample("b", hints={"edge": torch.zeros(3, 8, 8)})])
    with pytest.raises(DataError, match="0 samples"):
        collate([])


def test_batch_is_pinned_with_all_its_tensors(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    image = torch.rand(3, 8, 8)
    batch = collate([Sample("a", image, "text", {"edge": image}, reference=image)])
    again = pin_memory((["position"], batch))[1]  # what DataLoader does to its batches on CUDA
    assert isinstance(again, type(batch)) and again.text == ["text"] and len(pinned) == 3
    for new, old in ((again.image, batch.image), (again.hints["edge"], batch.hints["edge"])):
        assert new is not old and new.equal(old)
    assert again.reference is not None and again.reference.equal(image[None])

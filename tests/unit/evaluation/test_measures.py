"""Measures on pictures whose scores are known, and the choice of a measure by a hint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import adapters.hints  # noqa: F401  registers the extractors
import ldm.evaluation.maps  # noqa: F401  registers its measures
from ldm import registry
from ldm.evaluation.colour import cell_means, lab, projections
from ldm.evaluation.edges import edge_map
from ldm.evaluation.fidelity import edge_f1
from ldm.evaluation.measures import BY_HINT, ClipI, Measure, by_hint
from ldm.registry import ConfigError

VIT = {"name": "vit", "image_size": 8, "patch": 4, "width": 8, "layers": 1, "heads": 1}


def measure(name: str) -> Measure:
    return registry.build("measure", {"name": name})


def scores(m: Measure, pictures: Tensor, hints: Tensor) -> Tensor:
    return m.score(m.picture(pictures), m.hint(hints))


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [  # CIE Lab of sRGB colours under D65, as colour calculators give them
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((0.01, 0.01, 0.01), (0.699, 0, 0)),  # both linear parts: 903.3 * 0.01 / 12.92
    ],
)
def test_lab_of_known_colours(rgb: tuple[float, ...], expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(lab(torch.tensor(rgb).float()), torch.tensor(expected).float(), atol=0.02, rtol=0)


def test_cells_are_means_in_row_order() -> None:
    image = torch.arange(4.0).repeat_interleave(2).expand(1, 3, 4, 8)  # four columns of two pixels
    assert cell_means(image, 2)[0, :, 0].tolist() == [0.5, 2.5, 0.5, 2.5]
    with pytest.raises(ValueError, match="at least 9x9"):
        cell_means(image, 9)


def test_palette_is_the_mean_distance_of_cells() -> None:
    hint = torch.zeros(2, 3, 16, 16)
    picture = hint.clone()
    picture[1, :, :8] = 0.3  # half of the cells off by 0.3 in each channel
    assert scores(measure("palette"), picture, hint).tolist() == pytest.approx([0, 0.3 * 3**0.5 / 2])
    picture[1] = 1.0
    assert scores(measure("palette_lab"), picture, hint).tolist() == pytest.approx([0, 100], abs=1e-3)


def test_palette_sees_colour_and_not_what_is_drawn_inside_a_cell() -> None:
    checker = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    grey = torch.full((1, 3, 16, 16), 0.5)
    assert scores(measure("palette"), checker.float().expand(1, 3, 16, 16), grey).item() == pytest.approx(0)


def test_palette_of_a_reference_is_blind_to_place_and_counts_a_shift_as_its_delta_e() -> None:
    m = measure("palette_reference")
    reference = torch.rand(1, 3, 32, 32)
    moved = reference.flip(-1).roll(5, dims=-2)
    assert scores(m, moved, reference[:, None]).item() == pytest.approx(0, abs=1e-4)
    greys = torch.tensor([0.2, 0.5]).view(2, 1, 1, 1).expand(2, 3, 40, 24)  # any size
    shift = (lab(greys[1, :, 0, 0]) - lab(greys[0, :, 0, 0])).norm().item()
    assert scores(m, greys[:1], greys[1:, None]).item() == pytest.approx(shift, rel=0.03)
    assert m.image_prompt and not m.more_is_better
    exact = scores(m, greys[:1], reference[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(m, greys[:1], reference[:, None]), exact)


def test_projections_give_the_wasserstein_distance_of_sets_along_each_axis() -> None:
    a, b = torch.rand(2, 1, 50, 3, generator=torch.Generator().manual_seed(0))
    along = projections(a, 400)
    assert along.shape == (1, 400, 50) and (along.diff(dim=-1) >= 0).all()
    shift = torch.tensor([3.0, -4.0, 0.0])
    assert (projections(a + shift, 400) - along).abs().mean().item() == pytest.approx(2.5, rel=0.01)  # |d| / 2
    same = a[:, torch.randperm(50)]
    torch.testing.assert_close(projections(same), projections(a))
    assert (projections(a) - projections(b)).abs().mean() > 0.01


def test_edge_f1_is_that_of_the_edges_of_both() -> None:
    pictures, hints = torch.rand(2, 3, 3, 16, 16)
    assert torch.equal(scores(measure("edge_f1"), pictures, hints), edge_f1(edge_map(pictures), edge_map(hints)))


def clip_i(folder: Path) -> ClipI:
    tower = registry.build("image", VIT)
    file = folder / "tower.safetensors"
    save_file(tower.state_dict(), file)
    return registry.build("measure", {"name": "clip_i", "encoder": {**VIT, "weights": str(file)}})


def test_clip_i_is_the_cosine_of_the_named_towers_features(tmp_path: Path) -> None:
    m = clip_i(tmp_path)
    a, b = torch.rand(2, 2, 3, 8, 8)
    cosine = torch.nn.functional.cosine_similarity(m.tower(a * 2 - 1), m.tower(b * 2 - 1))
    torch.testing.assert_close(scores(m, a, b[:, None]), cosine, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores(m, a, a[:, None]), torch.ones(2))


def test_clip_i_fits_any_size_to_the_tower_and_keeps_float32_under_autocast(tmp_path: Path) -> None:
    m = clip_i(tmp_path)
    small = torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scores(m, small.expand(1, 3, 8, 8), small[:, :, :1, :1].expand(1, 3, 20, 12)[:, None])
    torch.testing.assert_close(got, torch.ones(1), atol=1e-5, rtol=0)
    assert got.dtype == torch.float32


def test_clip_i_refuses_a_random_tower() -> None:
    with pytest.raises(ConfigError, match="has no weights"):
        registry.build("measure", {"name": "clip_i", "encoder": VIT})


def test_a_hint_is_measured_by_its_extractor_first() -> None:
    assert by_hint("a", ["color", "sketch"]) == ("palette", "palette_lab")
    assert by_hint("a", ["mine", "lineart"]) == ("edge_f1",)
    with pytest.raises(ConfigError, match=r"'a' has hint depth or b, .* set evaluation.measures.a"):
        by_hint("a", ["depth", "b"])


def test_every_choice_by_hint_is_registered() -> None:
    assert {name for chosen in BY_HINT.values() for name in chosen} <= set(registry.names("measure"))


@pytest.mark.parametrize("cells", [0, -1])
def test_palette_needs_a_cell(cells: int) -> None:
    with pytest.raises(ConfigError, match=r"palette.cells is"):
        registry.build("measure", {"name": "palette", "cells": cells})

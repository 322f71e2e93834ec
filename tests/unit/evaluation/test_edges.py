"""Edge maps and retrieval, by hand."""

import pytest
import torch

from ldm.evaluation.edges import edge_map
from ldm.evaluation.retrieval import recall_at


@pytest.mark.parametrize("vertical", [True, False])
def test_a_step_gives_one_line_of_one_pixel(vertical: bool) -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1.0
    edges = edge_map(image if vertical else image.mT)
    edges = edges if vertical else edges.mT
    assert edges[0, 0].sum(dim=1).tolist() == [1] * 8
    assert edges[0, 0].nonzero()[:, 1].unique().item() in (3, 4)


def test_flat_images_and_faint_steps_have_no_edges() -> None:
    image = torch.full((1, 3, 8, 8), 0.5)
    assert not edge_map(image).any()
    image[..., 4:] += 0.04  # gradient 0.02 on each side of the step, below the threshold
    assert not edge_map(image, threshold=0.05).any()
    assert edge_map(image, threshold=0.01).any()


def test_edges_of_a_colour_change_at_equal_brightness_are_found() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, :, :4] = 1.0
    image[:, 1, :, 4:] = 1.0
    assert edge_map(image).any()


def test_recall_counts_nearer_keys() -> None:
    queries = torch.eye(3)
    keys = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 2.0, 1.0]])  # query 1 is nearer to key 2 than to its own
    assert recall_at(queries, keys, 1) == pytest.approx(2 / 3)
    assert recall_at(queries, keys, 2) == 1.0


def test_recall_of_collapsed_or_broken_embeddings_is_not_perfect() -> None:
    same = torch.ones(10, 4)
    assert recall_at(same, same, 5) == 0.0
    assert recall_at(torch.full((10, 4), float("nan")), same, 5) == 0.0

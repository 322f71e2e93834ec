import math
from collections import Counter

import pytest
import torch

import ldm.data  # noqa: F401  registers the readers
from ldm.data.synthetic import COLOURS, HINTS, KINDS, draw_hint, draw_scene, keypoints, render
from ldm.data.transforms import to_hint
from ldm.registry import ConfigError, build

SCENES = range(40)
SIZES = (16, 33, 64)


def scenes():
    for index in SCENES:
        scene = draw_scene(5, index, max_shapes=4)
        for size in SIZES:
            yield scene, render(scene, size)


def occlusions(scene, rendered):
    """Pairs (near, far) where shape `near` visibly covers part of shape `far`."""
    for far in range(len(scene.shapes)):
        alone = render(type(scene)(scene.background, (scene.shapes[far],)), rendered.owner.shape[0]).owner == 1
        for near in rendered.owner[alone].unique().tolist():
            if near != far + 1:
                yield near - 1, far


def test_scene_is_fixed_by_seed_and_index():
    node = {"name": "synthetic", "size": 32, "hints": list(HINTS), "seed": 3}
    a, b = build("data", node)[7], build("data", node)[7]
    assert a.text == b.text and torch.equal(a.image, b.image)
    assert all(torch.equal(a.hints[name], b.hints[name]) for name in HINTS)
    assert build("data", {**node, "seed": 4})[7].text != a.text
    assert draw_scene(0, 0).text == "a striped pink cross on a yellow background"


def test_every_shape_is_named_and_visible():
    for scene, rendered in scenes():
        assert set(rendered.owner.unique().tolist()) >= set(range(1, len(scene.shapes) + 1))
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind}" in scene.text
        assert scene.text.endswith(f"{scene.background} background")


def test_colours_and_kinds_are_distinct_within_a_scene():
    for scene, _ in scenes():
        assert len({s.kind for s in scene.shapes}) == len(scene.shapes)
        assert len({scene.background, *(s.colour for s in scene.shapes)}) == len(scene.shapes) + 1


def test_image_shows_each_owner_in_its_own_two_tones():
    for scene, rendered in scenes():
        for number, name in enumerate([scene.background, *(s.colour for s in scene.shapes)]):
            light = torch.tensor(COLOURS[name], dtype=torch.uint8)
            pixels = rendered.image[:, rendered.owner == number].T
            dark = (light.float() * 0.6).to(torch.uint8)
            assert ((pixels == light).all(1) | (pixels == dark).all(1)).all()
            assert number or (pixels == light).all()


def test_edges_are_exactly_the_segmentation_boundaries():
    for scene, rendered in scenes():
        edge = draw_hint("edge", scene, rendered)
        segments = draw_hint("segmentation", scene, rendered)
        right = (segments[:, :-1, :-1] != segments[:, :-1, 1:]).any(0)
        below = (segments[:, :-1, :-1] != segments[:, 1:, :-1]).any(0)
        assert torch.equal(edge[0, :-1, :-1].bool(), right | below)
        assert torch.equal(edge[0], edge[1]) and set(edge.unique().tolist()) <= {0.0, 1.0}


def test_segmentation_has_the_colour_of_the_visible_kind():
    for scene, rendered in scenes():
        segments = draw_hint("segmentation", scene, rendered)
        for number, shape in enumerate(scene.shapes, start=1):
            expected = torch.tensor(KINDS[shape.kind]) / 255
            assert ((segments[:, rendered.owner == number].T - expected).abs() < 1e-6).all()
        assert (segments[:, rendered.owner == 0] == 0).all()


def test_depth_agrees_with_occlusion():
    seen = 0
    for scene, rendered in scenes():
        depth = draw_hint("depth", scene, rendered)
        for near, far in occlusions(scene, rendered):
            seen += 1
            values = [depth[0][rendered.owner == i + 1].unique() for i in (near, far)]
            assert values[0] > values[1] > 0
        assert (depth[:, rendered.owner == 0] == 0).all() and depth.max() <= 1
    assert seen > 10


@pytest.mark.parametrize("size", [16, 64])
def test_palette_is_the_mean_colour_of_each_cell(size):
    for index in SCENES:
        scene = draw_scene(5, index)
        rendered = render(scene, size)
        cell = size // 8
        cells = to_hint(rendered.image).view(3, 8, cell, 8, cell)
        expected = cells.mean((2, 4), keepdim=True).expand_as(cells).reshape(3, size, size)
        torch.testing.assert_close(draw_hint("palette", scene, rendered), expected, atol=1e-6, rtol=0)


def test_palette_of_one_colour_is_that_colour_at_any_size():
    for size in (17, 30, 100):
        rendered = render(draw_scene(0, 0), size)
        flat = type(rendered)(torch.full((3, size, size), 51, dtype=torch.uint8), rendered.owner)
        torch.testing.assert_close(
            draw_hint("palette", draw_scene(0, 0), flat), torch.full((3, size, size), 0.2), atol=1e-6, rtol=0
        )


def test_keypoints_mark_visible_points_of_their_shape():
    size, dots = 64, Counter()
    for index in SCENES:
        scene = draw_scene(5, index, max_shapes=4)
        rendered = render(scene, size)
        hint = draw_hint("keypoint", scene, rendered)
        expected = torch.zeros(size, size, dtype=torch.bool)
        for number, shape in enumerate(scene.shapes, start=1):
            for x, y in keypoints(shape):
                column, row = int(x * size), int(y * size)
                visible = 0 <= x < 1 and 0 <= y < 1 and rendered.owner[row, column] == number
                if visible:
                    expected[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
                    assert any(hint[:, row, column] > 0)
                    dots[shape.kind] += 1
        assert (hint[:, ~expected] == 0).all()
    assert set(dots) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_keypoints_lie_on_their_own_shape(kind):
    found = 0
    for index in range(200):
        scene = draw_scene(1, index, max_shapes=1)
        shape = scene.shapes[0]
        if shape.kind == kind:
            owner = render(scene, 128).owner
            for x, y in keypoints(shape):
                if 0 <= x < 1 and 0 <= y < 1:
                    assert owner[int(y * 128), int(x * 128)] == 1
                    found += 1
            assert all(math.hypot(x - shape.x, y - shape.y) <= shape.radius for x, y in keypoints(shape))
    assert found


def test_a_scene_looks_the_same_at_every_size():
    scene = draw_scene(2, 9)
    small, large = render(scene, 32), render(scene, 96)
    assert torch.equal(small.owner, large.owner[1::3, 1::3])  # centres coincide at three times the size


def test_hints_can_be_renamed_and_reference_is_the_image():
    node = {"name": "synthetic", "size": 16, "hints": {"lines": "edge"}, "reference": True}
    sample = build("data", node)[0]
    assert list(sample.hints) == ["lines"]
    assert sample.reference is not None and torch.equal(sample.reference, sample.image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "data.size is 8; must be a whole number of at least 16"),
        ({"length": 0}, "data.length is 0"),
        ({"max_shapes": 5}, "data.max_shapes is 5; allowed: 1 to 4"),
        ({"hints": ["edges"]}, "data.hints has 'edges'; allowed: edge, .*did you mean 'edge'"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=message):
        build("data", {"name": "synthetic", "size": 16, **options})


def test_index_past_the_end_is_an_index_error():
    with pytest.raises(IndexError, match="index is 3; the set has 3 samples"):
        build("data", {"name": "synthetic", "size": 16, "length": 3})[3]

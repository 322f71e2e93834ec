from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import grid


def flat(r: float, g: float, b: float, n: int = 2) -> torch.Tensor:
    return torch.tensor([r, g, b]).view(1, 3, 1, 1).expand(n, 3, 5, 7)


def test_columns_stand_side_by_side_and_rows_below_each_other() -> None:
    second = torch.cat([flat(0, 1, 0, 1), flat(0, 0, 1, 1)])
    sheet = grid.compose({"a": flat(1, 0, 0), "b": second}, scale=3)
    assert sheet.size == (2 * (21 + grid.PAD) + grid.PAD, grid.LABEL + 2 * (15 + grid.PAD) + grid.PAD)

    def tile(column: int, row: int) -> set[tuple[int, ...]]:
        x, y = grid.PAD + column * (21 + grid.PAD), grid.LABEL + grid.PAD + row * (15 + grid.PAD)
        colours = sheet.crop((x, y, x + 21, y + 15)).getcolors()
        assert colours is not None
        return {colour for _, colour in colours}  # pyright: ignore[reportReturnType]

    assert [tile(0, 0), tile(0, 1)] == [{(255, 0, 0)}] * 2
    assert [tile(1, 0), tile(1, 1)] == [{(0, 255, 0)}, {(0, 0, 255)}]


def test_labels_are_written_above() -> None:
    blank = grid.compose({"": flat(1, 1, 1)}, scale=4)
    named = grid.compose({"hint": flat(1, 1, 1)}, scale=4)
    assert blank.getextrema() == ((255, 255),) * 3
    assert named.crop((0, 0, named.width, grid.LABEL)).convert("L").getextrema()[0] < 64


def test_values_are_clamped_and_rounded() -> None:
    picture = grid.to_pil(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_one_channel_becomes_grey_and_half_precision_is_fine() -> None:
    picture = grid.to_pil(torch.full((1, 2, 3), 0.2, dtype=torch.bfloat16))
    assert picture.size == (3, 2) and picture.getpixel((0, 0)) == (51, 51, 51)


def test_save_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "images" / "step.png"
    grid.save({"a": flat(1, 0, 0)}, path)
    assert Image.open(path).size == (2 * grid.PAD + 14, grid.LABEL + 2 * (10 + grid.PAD) + grid.PAD)


@pytest.mark.parametrize("columns", [{}, {"a": flat(1, 0, 0), "b": flat(1, 0, 0, n=3)}])
def test_columns_must_have_one_size(columns: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"grid columns have sizes .* must be the same"):
        grid.compose(columns)


def test_sheets_stand_beside_each_other_with_their_last_rows_level() -> None:
    left, right = (
        grid.compose({label: flat(*colour)}, scale=2) for label, colour in (("a b c", (1, 0, 0)), ("", (0, 1, 0)))
    )
    left_high, right_high = left.height, right.height
    assert left_high > right_high  # three lines of labels: one word fits
    sheet = grid.beside(left, right)
    assert sheet.size == (left.width + right.width, left_high)
    assert sheet.crop((left.width, left_high - right_high, *sheet.size)).tobytes() == right.tobytes()
    assert sheet.crop((0, 0, left.width, left_high)).tobytes() == left.tobytes()

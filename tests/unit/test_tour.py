"""What scripts/tour.py (`make demo`) sets side by side belongs together."""

from pathlib import Path

from ldm import config
from scripts import tour

ROOT = Path(__file__).resolve().parents[2]


def test_seecoder_hears_the_references_of_the_other_adapters_row_by_row() -> None:
    adapters, seecoder = (config.load(ROOT / tour.EMOJI.format(name)) for name in ("adapters", "seecoder"))
    rows = [record["hints"]["reference"] for record in adapters.sample.prompts]
    assert len(rows) >= 4
    assert [record["hints"]["see"] for record in seecoder.sample.prompts] == rows
    assert (seecoder.sample.height, seecoder.sample.width) == (64, 64)  # as tour.py reads them


def test_what_is_drawn_at_the_end_is_what_was_trained() -> None:
    trained, drawn = (config.load(ROOT / tour.TINY.format(kind)) for kind in ("train", "sample"))
    assert {node["weights"] for node in drawn.adapters.values()} == {trained.run.dir}
    assert drawn.model.unet == trained.model.unet

"""`make demo`, or python scripts/tour.py: draw with every adapter that ships, train one, measure it, draw with it."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config
from scripts import evaluate, sample, train

EMOJI, TINY = "configs/sample/emoji/{}.yaml", "configs/{}/tiny/controlnet.yaml"
END = """done. {0}/adapters.png: what each adapter does
{0}/tiny/grid.png: drawn by the ControlNet that was trained just now (runs/tiny/controlnet/images: as it learned)
Next: .venv/bin/python scripts/sample.py out.dir=outputs/heart sample.prompts="a flat emoji of a red heart"
  docs/train-your-own-controlnet.md: the same with pictures of your own"""


def main(argv: list[str] | None = None) -> None:
    """Run all parts. Exits with code 2 and one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/tour"), help="folder of the pictures (outputs/tour)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training, e.g. train.steps=100")
    args, began = parser.parse_args(argv), time.perf_counter()

    def say(text: str) -> None:
        print(f"== {time.perf_counter() - began:.0f} s: {text.format(args.out)}", flush=True)

    say("1 of 4, every adapter in one picture, by the small models in checkpoints/emoji")
    draw(args.out)
    trained = ["--config", TINY.format("train"), *args.overrides]
    say("2 of 4, train a ControlNet; as it learns to obey, edge_f1 leaves edge_f1.base, which is without it")
    train.main(["validation.every=100", *trained])
    say("3 of 4, measure it on 128 scenes that it has not seen")
    evaluate.main(trained)
    say("4 of 4, draw with it")
    edge = f"adapters.edge.weights={config.load(trained[1], args.overrides).run.dir}"
    sample.main(["--config", TINY.format("sample"), f"out.dir={args.out}/tiny", edge])
    say(END)


def draw(out: Path) -> None:
    """Make OUT/adapters.png: the grid of adapters.yaml, beside it SeeCoder without text after the same references."""
    import torch
    from PIL import Image

    from ldm import grid
    from ldm.sampling.plan import load_hint

    for name in ("adapters", "seecoder"):
        sample.main(["--config", EMOJI.format(name), f"out.dir={out / name}", "sample.seeds=0"])
    pictures = torch.stack([load_hint(path, (64, 64)) for path in sorted((out / "seecoder").glob("*_s0.png"))])
    seecoder = grid.compose({"seecoder: reference, no prompt": pictures}, scale=2)
    grid.beside(Image.open(out / "adapters" / "grid.png"), seecoder).save(out / "adapters.png")


if __name__ == "__main__":
    main()

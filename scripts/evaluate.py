"""Held-out figures of trained weights, or of a folder of pictures, written to RUN/eval/ or FOLDER/eval/.

python scripts/evaluate.py --config configs/train/emoji/controlnet.yaml        the newest checkpoint of its run folder
python scripts/evaluate.py --run runs/emoji/controlnet                         the same, by the run's own config
python scripts/evaluate.py --config configs/evaluate/emoji/sketch_color.yaml   adapters of several runs, alone, together
python scripts/evaluate.py --images outputs/sample --reference real --config configs/evaluate/emoji/sets.yaml
torchrun --nproc-per-node 8 scripts/evaluate.py ...                            the items shared out, the same table

What is measured of the pictures themselves and of sets of them: evaluation.pictures and evaluation.sets
(docs/evaluation.md).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, console, explain
from ldm.registry import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = config.parser(__doc__ or "", dry_run=False)
    parser.add_argument("--run", metavar="RUN", help="run folder: its config.yaml, its newest checkpoint")
    parser.add_argument("--images", metavar="FOLDER", help="measure the pictures of this folder, draw nothing")
    parser.add_argument("--reference", metavar="FOLDER", help="with --images: folder of real pictures")
    args = parser.parse_intermixed_args(argv)
    with console.user_errors():
        if args.run is not None:
            if args.config is not None or args.images is not None:
                raise ConfigError(f"--run is {args.run}, which stands alone; drop --config and --images")
            args.config = str(Path(args.run) / "config.yaml")
            args.overrides = [f"run.dir={args.run}", *args.overrides]
        if args.reference is not None and args.images is None:
            raise ConfigError("--reference goes with --images; without it set evaluation.sets.NAME.reference")
        if args.config is None:
            raise ConfigError("--config is missing; e.g. configs/train/emoji/vae.yaml; or give --run runs/emoji/vae")
        cfg = config.load(args.config, args.overrides)
        if (text := explain.asked(args, cfg, args.config, args.overrides)) is not None:
            print(text)
            return
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        import ldm.training.run  # noqa: F401  registers the stages
        from ldm.evaluation import folder, run

        if args.images is not None:
            result = folder.evaluate_folder(cfg, Path(args.images), args.reference and Path(args.reference))
        else:
            result = run.evaluate(cfg)
        if os.environ.get("RANK", "0") == "0":  # of torchrun
            print(result.markdown())


if __name__ == "__main__":
    main()

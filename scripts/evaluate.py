"""Held-out figures of trained weights, written to RUN/eval/.

python scripts/evaluate.py --config configs/train/emoji/controlnet.yaml        the newest checkpoint of its run folder
python scripts/evaluate.py --config configs/evaluate/emoji/sketch_color.yaml   adapters of several runs, alone, together
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, explain
from ldm.registry import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    args = config.parser(__doc__ or "", dry_run=False).parse_intermixed_args(argv)
    with config.user_errors():
        if args.config is None:
            raise ConfigError("--config is missing; e.g. --config configs/train/emoji/vae.yaml")
        cfg = config.load(args.config, args.overrides)
        if (text := explain.asked(args, cfg, args.config, args.overrides)) is not None:
            print(text)
            return
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        import ldm.training.run  # noqa: F401  registers the stages
        from ldm.evaluation import run

        print(run.evaluate(cfg).markdown())


if __name__ == "__main__":
    main()

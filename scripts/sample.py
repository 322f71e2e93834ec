"""Draw images: prompts and seeds to PNG files, a grid and records.

python scripts/sample.py                                    the shipped emoji models
python scripts/sample.py --config configs/sample/tiny/ldm.yaml [key=value ...] [--dry-run] [--print-config] [--explain]
python scripts/sample.py --run runs/tiny/ldm sample.prompts='a red circle' sample.seeds=0-15
python scripts/sample.py --from outputs/emoji/ldm/00000_s0.png        the very same picture again, into outputs/again
torchrun --nproc_per_node 2 scripts/sample.py ...           prompts and seeds are split over the ranks
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, console, explain
from ldm.registry import ConfigError

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "sample" / "emoji" / "ldm.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = config.parser(__doc__ or "")
    parser.add_argument("--run", metavar="RUN", help="a training run's folder: its config and newest checkpoint")
    parser.add_argument("--from", dest="picture", metavar="PNG", help="draw this picture again, as it says itself")
    args = parser.parse_intermixed_args(argv)
    with console.user_errors():
        if sum(map(bool, (args.run, args.config, args.picture))) > 1:
            raise ConfigError("--run, --config and --from exclude each other; give one, and key=value for the rest")
        if args.picture:
            import adapters
            from ldm.sampling import again

            sys.stdout.write(again.answer(args, Path(args.picture)))
            return
        path, overrides = args.config or DEFAULT, args.overrides
        if args.run:
            from ldm.sampling import plan

            path, overrides = Path(args.run) / "config.yaml", [*plan.run_overrides(Path(args.run)), *overrides]
        if seed := next((word for word in args.overrides if word.startswith("seed=")), None):
            raise ConfigError(f"{seed} is a training's seed, which pictures do not use; set sample.seeds{seed[4:]}")
        cfg = config.load(path, overrides)
        if (text := explain.asked(args, cfg, path, overrides)) is not None:
            print(text)
            return
        import adapters  # noqa: F401
        from ldm.sampling import run

        if args.dry_run:
            print(run.dry_run(cfg))
        else:
            run.sample(cfg)


if __name__ == "__main__":
    main()

"""Train a VAE, a CLIP, a latent diffusion model or adapters from one YAML file.

python scripts/train.py --config configs/train/tiny/ldm.yaml [key=value ...] [--dry-run] [--print-config] [--explain]
torchrun --nproc_per_node 2 scripts/train.py --config ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, console, explain
from ldm.registry import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input, 75 where it was asked to stop."""
    parser = config.parser(__doc__ or "")
    args = parser.parse_intermixed_args(argv)
    with console.user_errors():
        if args.config is None:
            raise ConfigError("--config is missing; e.g. --config configs/train/tiny/ldm.yaml")
        cfg = config.load(args.config, args.overrides)
        if (text := explain.asked(args, cfg, args.config, args.overrides)) is not None:
            print(text)
            return
        if cfg.grid:
            raise ConfigError(f"grid is for sampling; it has {', '.join(cfg.grid)}: drop it, or use scripts/sample.py")
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        from ldm.training import estimate, run, signals

        if args.dry_run:
            print(estimate.dry_run(cfg))
            return
        try:
            run.train(cfg)
        except signals.Stopped as stopped:
            sys.stderr.write(f"{stopped}: the same command continues\n")
            raise SystemExit(signals.EXIT_CODE) from None


if __name__ == "__main__":
    main()

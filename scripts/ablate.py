"""Ablations: train and measure every row of a table, write it as Markdown, CSV and a plot.

python scripts/ablate.py --config configs/ablation/controlnet/zero_conv.yaml budget=short [key=value ...] [--dry-run]
python scripts/ablate.py --config configs/ablation budget=smoke     every table below a folder
python scripts/ablate.py report RESULTS DOCUMENT                    all tables that were run, as one document
python scripts/ablate.py compare RUN_A RUN_B [OUT]                  two runs: keys, figures, pictures
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import console
from ldm.registry import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input, 75 where it was asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="file or folder below configs/ablation")
    parser.add_argument("words", nargs="*", metavar="key=value", help="budget=smoke|short|paper, or any key of a run")
    parser.add_argument("--out", metavar="DIR", default="runs/ablation", help="where runs and tables go")
    parser.add_argument("--seeds", metavar="N", type=int, help="runs of each row (smoke: 1, short: 3, paper: 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="build every row without memory, say what is to do, stop"
    )
    args = parser.parse_intermixed_args(argv)
    with console.user_errors():
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        from ldm.ablation import commands
        from ldm.training.signals import EXIT_CODE, Stopped

        command, *rest = args.words or [""]
        if command in commands.COMMANDS and args.config is None:
            print(commands.COMMANDS[command](rest))
            return
        if args.config is None or any("=" not in word for word in args.words):
            raise ConfigError(
                "name --config FILE, or one of the commands: report RESULTS DOCUMENT, compare RUN_A RUN_B"
            )
        try:
            print(commands.tables(Path(args.config), args.words, Path(args.out), args.seeds, dry_run=args.dry_run))
        except Stopped as stopped:
            sys.stderr.write(f"{stopped}: the same command goes on from there\n")
            raise SystemExit(EXIT_CODE) from None


if __name__ == "__main__":
    main()

"""Make, check and look at data sets.

python scripts/prepare_data.py emoji --out data/emoji                      fetch, rasterise, caption, split four sets
python scripts/prepare_data.py check data/mine                             missing, corrupt, mismatched, odd-sized
python scripts/prepare_data.py preview configs/train/tiny/controlnet.yaml  a PNG of what the network sees
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, console, registry


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    emoji = commands.add_parser("emoji", help="build the emoji set from four npm packages")
    emoji.add_argument("--out", type=Path, required=True, help="folder to create")
    emoji.add_argument("--tarballs", type=Path, help="folder with the packages' .tgz files (default: `npm pack`)")
    emoji.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: 128)")
    checks = commands.add_parser("check", help="report missing, corrupt, mismatched and odd-sized entries")
    checks.add_argument("dir", type=Path, help="data folder, or YAML file with a data node, of any reader")
    preview = commands.add_parser("preview", help="write a PNG of exactly what the network will see")
    preview.add_argument("config", metavar="CONFIG", help="YAML file with a data node")
    preview.add_argument("overrides", nargs="*", metavar="key=value", help="override any key, e.g. data.size=32")
    preview.add_argument("--out", type=Path, default=Path("outputs/preview.png"), help="file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    with console.user_errors():
        import adapters  # noqa: F401  registers the hint extractors; slow to import, not needed for --help
        from ldm.data import check, emoji, preview

        if args.command == "emoji":
            manifest = emoji.build_emoji(args.out, tarballs=args.tarballs, size=args.size)
            print(args.out, f"{manifest['records']} images", *map(str, manifest["counts"].items()), sep="\n")
        if args.command == "check":
            print(*(report := check.check(args.dir)).lines(), sep="\n")
            raise SystemExit(0 if report.ok else 2)
        if args.command == "preview":
            cfg = config.load(args.config, args.overrides)
            if cfg.data is None:
                raise registry.ConfigError(f"{args.config} has no data node; add e.g. data: {{name: folder, ...}}")
            shown = preview.write_preview(registry.build("data", cfg.data), args.out, seed=cfg.seed)
            print(f"{args.out}: {shown} samples")


if __name__ == "__main__":
    main()

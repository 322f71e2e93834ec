"""Weight files: `share` writes the newest weights of a run as one small file.

python scripts/convert.py share runs/emoji/ldm checkpoints/emoji/unet.safetensors [--stem model] [--dtype fp16]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    share = commands.add_parser("share", help="write the newest weights of a run as one file")
    share.add_argument("run", type=Path, help="run folder")
    share.add_argument("out", type=Path, help="file to write")
    share.add_argument("--stem", default=None, help="file of the checkpoint (default: the only one)")
    share.add_argument("--dtype", default="fp16", choices=["fp32", "bf16", "fp16"])
    args = parser.parse_args(argv)
    with config.user_errors():
        from ldm.training import checkpoint  # torch: slow to import, not needed for --help

        size = checkpoint.share(args.run, args.out, stem=args.stem, dtype=args.dtype)
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

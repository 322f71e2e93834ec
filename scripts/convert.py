"""Weight files: what a file holds, published layouts to ours and back, and the newest weights of a run as one file.

python scripts/convert.py inspect v1-5-pruned-emaonly.safetensors
python scripts/convert.py import v1-5-pruned-emaonly.safetensors --out checkpoints/sd15
python scripts/convert.py export checkpoints/sd15 --layout original --out sd15.safetensors
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
    inspect = commands.add_parser("inspect", help="layout, architecture, size, dtype and what is missing")
    inspect.add_argument("path", type=Path, help="file or folder")
    take = commands.add_parser("import", help="write a published file or folder as our component files")
    take.add_argument("path", type=Path, help="file or diffusers folder")
    take.add_argument("--out", type=Path, required=True, help="folder to write")
    take.add_argument("--ema", action="store_true", help="the UNet's averaged weights of a training checkpoint")
    give = commands.add_parser("export", help="write networks in a published layout")
    give.add_argument("paths", type=Path, nargs="+", help="files or folders in any layout")
    give.add_argument(
        "--layout", required=True, help="original, diffusers or controlnet_{original,standalone,diffusers}"
    )
    give.add_argument("--out", type=Path, required=True, help="file to write; a folder for diffusers")
    share = commands.add_parser("share", help="write the newest weights of a run as one file")
    share.add_argument("run", type=Path, help="run folder")
    share.add_argument("out", type=Path, help="file to write")
    share.add_argument("--stem", default=None, help="file of the checkpoint (default: the only one)")
    share.add_argument("--dtype", default="fp16", choices=["fp32", "bf16", "fp16"])
    args = parser.parse_args(argv)
    with config.user_errors():
        import adapters  # noqa: F401  torch: slow to import, not needed for --help
        from ldm.convert import model
        from ldm.training import checkpoint

        if args.command == "inspect":
            print(*model.inspect(args.path), sep="\n")
        elif args.command == "import":
            print(*model.import_model(args.path, args.out, args.ema), sep="\n")
        elif args.command == "export":
            print(*model.export(args.paths, args.layout, args.out), sep="\n")
        else:
            size = checkpoint.share(args.run, args.out, stem=args.stem, dtype=args.dtype)
            print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

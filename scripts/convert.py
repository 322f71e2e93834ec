"""Weight files: download, what a file holds, published layouts to ours and back, newest weights of a run as one file.

python scripts/convert.py inspect v1-5-pruned-emaonly.safetensors
python scripts/convert.py import v1-5-pruned-emaonly.safetensors --out checkpoints/sd15 [--ema: its averaged UNet]
python scripts/convert.py export checkpoints/sd15 --layout LAYOUT --out sd15.safetensors; LAYOUT: original, diffusers,
    controlnet_{original,standalone,diffusers}, t2i_{original,diffusers,style}, coadapter_fuser, ip_adapter, seecoder
python scripts/convert.py fetch sd15 [--out checkpoints] [--sha256 HEX]
python scripts/convert.py share runs/emoji/ldm unet.safetensors [--stem model] [--dtype fp16] [--only PREFIX]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import console

LIST = Path(__file__).resolve().parents[1] / "checkpoints" / "weights.yaml"
PATH, OUT = {"type": Path, "help": "file or folder"}, {"type": Path, "required": True, "help": "what to write"}
STEM, ONLY = {"help": "which file of the checkpoint"}, {"default": "", "help": "names that begin so, e.g. image."}
DTYPE, NAME = {"default": "fp16", "choices": ["fp32", "bf16", "fp16"], "help": "type"}, {"help": "in weights.yaml"}
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "inspect": {"path": PATH},
    "import": {"path": PATH, "--out": OUT, "--ema": {"action": "store_true", "help": "its averaged UNet"}},
    "export": {"paths": PATH | {"nargs": "+"}, "--layout": {"required": True, "help": "see above"}, "--out": OUT},
    "fetch": {"name": NAME, "--out": PATH | {"default": LIST.parent}, "--sha256": {"help": "if the list has none"}},
    "share": {"run": PATH, "out": PATH, "--stem": STEM, "--dtype": DTYPE, "--only": ONLY},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, arguments in ARGUMENTS.items():
        command = commands.add_parser(name)
        [command.add_argument(flag, **how) for flag, how in arguments.items()]
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k != "command"}
    with console.user_errors():
        import adapters  # noqa: F401  (torch is slow to import, and not needed for --help)
        from ldm.convert import fetch, model
        from ldm.training import checkpoint

        actions = {
            "inspect": lambda: model.inspect(args.path),
            "import": lambda: model.import_model(args.path, args.out, args.ema),
            "export": lambda: model.export(args.paths, args.layout, args.out),
            "fetch": lambda: [fetch.fetch(args.name, fetch.published(LIST), args.out, args.sha256)],
            "share": lambda: [f"{checkpoint.share(**options):,} bytes; in a config it is weights: {args.out}"],
        }
        sys.stdout.writelines(f"{line}\n" for line in actions[args.command]())


if __name__ == "__main__":
    main()

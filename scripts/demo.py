"""A web page that draws: prompt, adapters, sketch and reference pictures (extra demo).

python scripts/demo.py                                       the shipped emoji models with every adapter
python scripts/demo.py --config configs/sample/sd15/controlnet_canny.yaml adapters.canny.weights=FILE
python scripts/demo.py --port 8080 --host 0.0.0.0            for others in the network: see docs/demo.md first
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import config, console, explain
from ldm.registry import ConfigError

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "sample" / "emoji" / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = config.parser(__doc__ or "", dry_run=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; only this machine by default")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--out", default="outputs/demo", metavar="DIR", help="where pictures go, uploaded ones too")
    args = parser.parse_intermixed_args(argv)
    with console.user_errors():
        path = args.config or DEFAULT
        cfg = config.load(path, args.overrides)
        if (text := explain.asked(args, cfg, path, args.overrides)) is not None:
            print(text)
            return
        if find_spec("gradio") is None:
            raise ConfigError("gradio is not installed; install the extra: pip install -c constraints.txt -e '.[demo]'")
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        from ldm.demo import page, studio

        page.serve(studio.Studio(cfg, Path(args.out)), args.host, args.port)


if __name__ == "__main__":
    main()

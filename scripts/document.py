"""Write docs/config.md, the reference of every config key, anew from the code.

python scripts/document.py                       docs/config.md
python scripts/document.py --out elsewhere.md    another file
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import console

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(argv: Sequence[str] | None = None) -> None:
    """Run with command-line arguments. Exits with code 2 and one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", type=Path, default=DOCS / "config.md", help="file to write")
    args = parser.parse_args(argv)
    with console.user_errors():
        import adapters  # noqa: F401  registers them; slow to import, not needed for --help
        from ldm import reference

        args.out.write_text(reference.render(reference.sections()), encoding="utf-8")
        print(args.out)


if __name__ == "__main__":
    main()

"""Tiny stand-ins for the npm packages: real tarballs with a handful of icons."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from ldm.data.emoji import Package

DISC = '<circle cx="16" cy="16" r="12" fill="{}"/>'
ICONS: dict[str, dict[str, Any]] = {
    "flat": {
        "abacus": {"body": DISC.format("#f00")},
        "aerial-tramway": {"body": DISC.format("#0f0")},
        "hand": {"body": DISC.format("#00f")},
        "hand-medium-dark": {"body": DISC.format("#830")},
        "old": {"body": "<nothing", "hidden": True},
    },
    "line": {
        "abacus": {"body": DISC.format("currentColor")},
        "aerial-tramway": {"body": DISC.format("currentColor")},
        "hand": {"body": '<rect x="0" y="0" width="32" height="16" fill="currentColor"/>'},
    },
    "noto": {
        "hand-light-skin-tone": {"body": DISC.format("#fc8")},
        "wide": {"body": '<rect x="-8" width="64" height="8" fill="#00f"/>', "left": -8, "width": 64, "height": 8},
        "flag-japan": {"body": DISC.format("#f00")},
    },
    "twemoji": {"abacus": {"body": DISC.format("#ff0")}},
}


def write_tarball(path: Path, members: dict[str, bytes]) -> str:
    """Write a .tgz and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_packages(folder: Path, icons: dict[str, dict[str, Any]] = ICONS) -> tuple[Package, ...]:
    """Tarballs of all four styles in `folder`, with an escaping member each, and the packages that pin them."""
    packages = []
    for style, table in icons.items():
        name, licence = f"@fake/{style}", "MIT" if style in ("flat", "line") else "CC-BY-4.0"
        content = json.dumps({"prefix": style, "icons": table, "width": 32, "height": 32}).encode()
        sha256 = write_tarball(
            folder / f"fake-{style}-1.0.0.tgz", {"../escaped.txt": b"out", "package/icons.json": content}
        )
        packages.append(Package(style, name, "1.0.0", sha256, licence, f"{style} by nobody"))
    return tuple(packages)

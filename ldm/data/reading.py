"""Image files to 8-bit RGB, converting only what is certain, and paths that stay inside their data folder."""

import struct
import warnings
import zlib
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image, ImageOps

from ldm.data.errors import DataError

MAX_PIXELS: Final = 8192 * 8192  # larger files are refused before decoding: a small file can unpack to gigabytes
SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_DECODE_ERRORS: Final = (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error, zlib.error)


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


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header alone; EXIF orientation may still swap the two.

    Raises: DataError when the file is missing, not an image or too large.
    """
    with _open(path) as image:
        return image.size


def read_image(path: Path, *, hint: bool = False) -> Image.Image:
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
        except _DECODE_ERRORS as error:
            raise DataError(f"{path} cannot be decoded ({error}); replace or remove it") from error


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
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


def _to_rgb(image: Image.Image, path: Path, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, path).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey (0..65535) or float grey (0..1) to 8 bits."""
    low, high = (float(v) for v in image.convert("F").getextrema())  # pyright: ignore[reportArgumentType]
    top = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0.0 and high <= top):
        raise DataError(f"{path} ({image.mode}) has values in [{low:g}, {high:g}], must be in [0, {top:g}]; rescale it")
    return image.convert("F").point(lambda v: v * (255.0 / top) + 0.5).convert("L")

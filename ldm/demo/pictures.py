"""Pictures that come through the web page: checked, cut to a bounded size, and kept by their content."""

import base64
import binascii
import hashlib
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from ldm.data.errors import DataError
from ldm.data.reading import image_size, read_image
from ldm.sampling.output import write_file

MAX_BYTES: Final = 8 * 2**20  # of a file
MAX_SIDE: Final = 4096  # pixels; read from the header, before anything is unpacked
SIDE: Final = 512  # the longer side of what is kept
KEPT: Final = 400  # files in a folder; the oldest go first
DATA_URL: Final = "data:image/png;base64,"
_KEEPING = threading.Lock()  # visitors may bring the same picture at once


@dataclass(frozen=True, slots=True)
class Upload:
    """The bytes of an uploaded file. Messages call it by its own name, not by where the server keeps it."""

    name: str
    data: bytes

    def read_bytes(self) -> bytes:
        """All of it. Raises: DataError if it is too large."""
        if len(self.data) > MAX_BYTES:
            raise DataError(f"{self.name} has {len(self.data):,} bytes; allowed: up to {MAX_BYTES:,}; shrink it first")
        return self.data

    def __str__(self) -> str:
        return self.name


def from_file(path: Path) -> Upload:
    """A file that the web server has stored."""
    with path.open("rb") as file:
        return Upload(path.name, file.read(MAX_BYTES + 1))


def from_data_url(text: str) -> Upload:
    """What a canvas gives. Raises: DataError if it is no PNG's data URL."""
    if len(text) > 2 * MAX_BYTES or not text.startswith(DATA_URL):
        raise DataError("the drawing is no PNG of a bounded size; reload the page and draw again")
    try:
        return Upload("the drawing", base64.b64decode(text.removeprefix(DATA_URL), validate=True))
    except binascii.Error as error:
        raise DataError(f"the drawing did not arrive whole ({error}); send it again") from error


def read(upload: Upload, size: tuple[int, int] | None, *, hint: bool) -> Image.Image:
    """Decode an upload to RGB.

    Args:
        upload: what came.
        size: (height, width) of the picture to draw, whose shape is cut from the middle; None keeps the whole.
        hint: transparent parts become black, not white, see `read_image`.

    Raises: DataError, naming the file, if it is no picture, or too large.
    """
    width, height = image_size(upload)
    if max(width, height) > MAX_SIDE or min(width, height) < 2:
        raise DataError(
            f"{upload} is {width}x{height} pixels; allowed: from 2x2 up to {MAX_SIDE}x{MAX_SIDE}; shrink it first"
        )
    image = read_image(upload, hint=hint)
    if size is None:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        return image
    times = max(SIDE // max(size), 1)
    return ImageOps.fit(image, (size[1] * times, size[0] * times), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """As a PNG without any text."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def data_url(data: bytes) -> str:
    """A PNG as text for a page."""
    return DATA_URL + base64.b64encode(data).decode()


def keep(folder: Path, data: bytes, *, most: int = KEPT) -> Path:
    """Write a PNG under the sha256 of its content, and drop the oldest beyond `most`, with what lies beside them."""
    file = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
    with _KEEPING:
        if file.exists():
            file.touch()
        else:
            write_file(file, data)
        ours = [path for path in folder.glob("*.png") if len(path.stem) == len(file.stem)]
        for path in sorted(ours, key=lambda path: path.stat().st_mtime_ns)[:-most]:
            path.unlink(missing_ok=True)
            path.with_suffix(".yaml").unlink(missing_ok=True)
    return file

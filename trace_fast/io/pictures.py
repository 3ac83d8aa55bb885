"""Opening of picture files: the one place of the package that calls PIL.Image.open.

Pillow chooses the format of a file by its first bytes, not by its ending. A file named photo.jpg may thus be
PostScript, for which Pillow starts Ghostscript. Only raster formats are opened here, which Pillow decodes itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from trace_fast.io.folders import HEIF_HINT, HEIF_SUFFIXES, reads_heif

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "MAX_PIXELS", "decode", "open_picture", "read_picture"]

# raster formats by their names in Pillow; HEIF is read by pillow-heif, where it is installed
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "MPO", "DIB", "HEIF")
MAX_PIXELS = 178_956_970  # largest accepted image: where Pillow refuses a file as a decompression bomb


def open_picture(subject: str, file: BinaryIO, name: str) -> Image.Image:
    """Open a picture by its header; its pixels are decoded later, while the file is open.

    Args:
        subject: function and argument, for the message, such as "edges: image".
        file: at the first byte of the picture.
        name: what the message calls the file.

    Returns:
        The picture, of at most `MAX_PIXELS` pixels.

    Raises:
        ValueError: the file is of another format, or damaged, or has more pixels.

    Example:
        >>> with open("photo.jpg", "rb") as file:  # doctest: +SKIP
        ...     size = open_picture("edges: image", file, "photo.jpg").size
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = _open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{subject} must have at most {MAX_PIXELS} pixels, got more in {name}") from None
    except UnidentifiedImageError:
        is_heic = name.strip("'\"").lower().endswith(HEIF_SUFFIXES) and "HEIF" not in Image.OPEN
        hint = f" without pillow-heif: {HEIF_HINT}" if is_heic else ""
        raise ValueError(f"{subject} must be an image file, got {name}, which Pillow cannot read{hint}") from None
    except Exception as error:  # each format's reader fails in its own way on damaged bytes
        raise ValueError(f"{subject} must be readable to its end, got {name}: {error}") from error
    # Pillow's own limit may have been changed or removed
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.height} x {picture.width}"
        raise ValueError(f"{subject} must have at most {MAX_PIXELS} pixels, got {size} in {name}")
    return picture


def _open(file: BinaryIO) -> Image.Image:
    """Open a picture by Pillow, which learns to read HEIC at the first file that it does not know."""
    from PIL import Image, UnidentifiedImageError

    def open_raster() -> Image.Image:
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])

    Image.init()
    try:
        return open_raster()
    except UnidentifiedImageError:
        if "HEIF" in Image.OPEN or not reads_heif():
            raise
        import pillow_heif

        pillow_heif.register_heif_opener()
        return open_raster()


def decode(subject: str, picture: Image.Image, name: str) -> None:
    """Decode the pixels of a picture that anybody has opened.

    Args:
        subject: function and argument, for the message.
        picture: decoded in place.
        name: what the message calls the picture.

    Raises:
        ValueError: the pixels are damaged, or the picture is PostScript that is not decoded yet.
    """
    # the caller may have opened a file without knowing what it is
    if picture.format == "EPS" and getattr(picture, "tile", None):
        raise ValueError(f"{subject} must be a raster image, got PostScript in {name}, which starts another program")
    try:
        picture.load()
    except Exception as error:  # Pillow opens a file by its header, so that damage shows only here
        raise ValueError(f"{subject} must be readable to its end, got {name}: {error}") from error


@contextlib.contextmanager
def read_picture(subject: str, source: str | os.PathLike[str] | BinaryIO) -> Iterator[Image.Image]:
    """Open a picture and decode its pixels; the file is closed when the block ends.

    Args:
        subject: function and argument, for the message.
        source: path of a file, or its bytes as a file.

    Yields:
        The picture as it is stored: of any mode, and not rotated.

    Raises:
        ValueError: the file is no raster image, is damaged, or has more than `MAX_PIXELS` pixels.
        OSError: the file is missing or cannot be read.

    Example:
        >>> with read_picture("segment: masks", "masks.png") as picture:  # doctest: +SKIP
        ...     labels = np.asarray(picture)
    """
    with contextlib.ExitStack() as stack:
        name, file = "an image in memory", source
        if isinstance(file, (str, os.PathLike)):
            name, file = repr(os.fspath(file)), stack.enter_context(open(file, "rb"))
        picture = open_picture(subject, file, name)
        decode(subject, picture, name)
        yield picture

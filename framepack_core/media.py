"""Pictures: reading, cropping and writing, with Pillow; and a look at a video. No torch here."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from framepack_core.buckets import Size, covering_size
from framepack_core.errors import RequestError

if TYPE_CHECKING:
    from av import VideoFrame

Picture = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3), RGB
Frames = np.ndarray[Any, np.dtype[np.uint8]]  # (T, H, W, 3), RGB
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # and no other: some of Pillow's readers start programs
MAX_PIXELS = 100_000_000  # of a picture: 0.4 GB when decoded, 1.2 GB on the way if it is WebP
# EXIF orientation -> how to turn the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_SIDEWAYS = 5  # from here on height and width change places


def open_picture(path: Path) -> Picture:
    """Read a picture upright, as 8-bit RGB; transparency is dropped.

    Raises:
        RequestError: it is not a picture, is damaged, too large, animated or has more than 8 bits.
    """
    with _decoded(path) as image:
        turn = UPRIGHT.get(_orientation(image))
        return np.array((image if turn is None else image.transpose(turn)).convert("RGB"))


def picture_size(path: Path) -> Size:
    """Decode a picture to its end, as ``open_picture`` does, and give its height and width upright.

    Raises:
        RequestError: as ``open_picture``.
    """
    with _decoded(path) as image:
        height, width = image.height, image.width
        return (width, height) if _orientation(image) >= FIRST_SIDEWAYS else (height, width)


@contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    """Open and decode a picture, and say in plain words why it cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in the file, and of sizes below our own limit
            with Image.open(path, formats=FORMATS) as image:
                _refuse_unusual(path, image)
                image.load()
                yield image
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{path.name} is not a picture that can be read: save it as PNG or JPEG and drop it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except RequestError:
        raise
    except MemoryError as error:
        raise RequestError(
            f"{path.name} needs too much memory to decode: save it again as PNG or JPEG and drop it again"
        ) from error
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise RequestError(
            f"{path.name} is damaged ({error}): save it again as PNG or JPEG and drop it again"
        ) from error


def _refuse_unusual(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    # MPO: a camera's JPEG with a preview or a depth map behind the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise RequestError(
            f"{path.name} is animated ({getattr(image, 'n_frames', 1)} frames): "
            "save the frame to start from as PNG and drop that"
        )
    if image.mode.startswith(("I", "F")):
        raise RequestError(
            f"{path.name} has more than 8 bits per channel (mode {image.mode}): "
            "save it with 8 bits per channel and drop it again"
        )


def _too_large(path: Path) -> RequestError:
    return RequestError(
        f"{path.name} is too large: it has more than {MAX_PIXELS // 10**6} megapixels: "
        "scale it down and drop it again"
    )


def _orientation(image: Image.Image) -> int:
    """Give the EXIF orientation, 1 to 8; 1, upright, where nothing sensible is said."""
    try:
        said = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF spoils no picture; viewers pass over it, too
        return 1
    return said if said in UPRIGHT else 1


def crop_to(picture: Picture, size: Size) -> Picture:
    """Scale a picture until it covers a size and cut the centre out, as the reference does.

    Rounding matters: sizes half to even, Lanczos, a crop box in fractions of a pixel.

    Raises:
        RequestError: it is a strip of a picture, which would be scaled to gigabytes.
    """
    height, width = size
    if picture.shape[:2] == (height, width):
        return picture
    scaled_height, scaled_width = covering_size(picture.shape[:2], size)
    scaled = Image.fromarray(
        resize(picture, (scaled_height, scaled_width), resample=Image.Resampling.LANCZOS)
    )
    # Fractions are meant: Pillow rounds the edges, each by itself.
    box: Any = (
        (scaled_width - width) / 2,
        (scaled_height - height) / 2,
        (scaled_width + width) / 2,
        (scaled_height + height) / 2,
    )
    return np.array(scaled.crop(box))


def resize(picture: Picture, size: tuple[int, int], *, resample: Image.Resampling) -> Picture:
    """Scale a picture (H, W, 3) to a size (height, width), to the same bits with every Pillow.

    Pillow scales width and height one after the other and rounds in between. Since version 13 the height
    comes first where it loses more than twice what the width does; before it never did. Here it does.
    """
    height, width = size
    lost_height, lost_width = picture.shape[0] - height, picture.shape[1] - width
    scaled = Image.fromarray(picture)
    if lost_height > 0 and lost_height > 2 * lost_width:
        scaled = scaled.resize((scaled.width, height), resample).resize((width, height), resample)
    else:
        scaled = scaled.resize((width, scaled.height), resample).resize((width, height), resample)
    return np.array(scaled)


def write_picture(file: Path | BinaryIO, picture: Picture) -> None:
    """Write a picture (H, W, 3) as PNG."""
    Image.fromarray(picture).save(file, format="PNG")


def count_frames(path: Path, look: "Callable[[int, VideoFrame], None] | None" = None) -> int:
    """Decode a video to its end and count its frames; ``look`` is shown each, with its number from 0.

    Raises:
        OSError, av.FFmpegError: it cannot be read.
    """
    import av

    count = 0
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if look is not None:
                look(count, frame)
            count += 1
    return count
